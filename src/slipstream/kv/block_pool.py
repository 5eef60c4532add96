"""Reference-counted KV blocks."""

from collections.abc import Callable

import numpy as np

from slipstream.backend.base import IntArray
from slipstream.errors import SlipstreamError


class OutOfBlocksError(SlipstreamError):
    """The pool has fewer free blocks than were asked for."""


class BlockPool:
    """Hands out blocks numbered 1 to `num_blocks`; a block is free again when its last holder releases it.

    The free list is a stack, so that a lightly used pool touches little memory. `copy_block(source, target)` copies
    the content of a block. All operations cost O(blocks named).
    """

    def __init__(self, num_blocks: int, block_size: int, copy_block: Callable[[int, int], None]) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.copy_block = copy_block
        self.references = np.zeros(num_blocks + 1, np.int32)
        self._free = np.arange(num_blocks, 0, -1, dtype=np.int32)
        self.free_count = num_blocks

    def allocate(self, count: int) -> IntArray:
        """Take `count` free blocks, each with one reference; raises `OutOfBlocksError` and takes none."""
        if count > self.free_count:
            raise OutOfBlocksError(f"{count} KV blocks asked for, {self.free_count} free")
        blocks = self._free[self.free_count - count : self.free_count][::-1].copy()
        self.free_count -= count
        self.references[blocks] = 1
        return blocks

    def share(self, blocks: IntArray) -> None:
        """Add a reference to each of the (distinct, held) blocks."""
        self.references[blocks] += 1

    def release(self, blocks: IntArray) -> None:
        """Drop a reference of each of the (distinct) blocks; raises `ValueError` if one has none."""
        if len(blocks) and self.references[blocks].min() < 1:
            raise ValueError("a KV block was released more often than it was taken")
        self.references[blocks] -= 1
        freed = blocks[self.references[blocks] == 0]
        self._free[self.free_count : self.free_count + len(freed)] = freed[::-1]
        self.free_count += len(freed)

    def blocks_for(self, tokens: int) -> int:
        """How many blocks hold that many tokens."""
        return -(-tokens // self.block_size)

    def check(self) -> None:
        """Assert that each block is either free, once, or referenced (for tests)."""
        free = self._free[: self.free_count]
        assert len(np.unique(free)) == self.free_count, "a block is free twice"
        assert not self.references[free].any(), "a free block has references"
        assert (self.references[1:] > 0).sum() == self.num_blocks - self.free_count, "a block is lost"
