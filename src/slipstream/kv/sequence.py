"""A sequence: token ids and the KV blocks that hold their keys and values."""

from collections.abc import Sequence as ListLike

import numpy as np
import numpy.typing as npt

from slipstream.backend.base import IntArray, Piece
from slipstream.kv.block_pool import BlockPool


class Sequence:
    """Token ids, of which the first `computed` have their KV in the blocks of the block table.

    Forking shares full blocks and copies the partial one, so a computed slot is never written again while another
    sequence can see it. Methods that need blocks raise `OutOfBlocksError` when there are none.
    """

    __slots__ = ("__weakref__", "_blocks", "_num_blocks", "_num_tokens", "_pool", "_tokens", "computed", "released")

    def __init__(self, pool: BlockPool, tokens: npt.ArrayLike = ()) -> None:
        self._pool = pool
        self._tokens = np.array(tokens, np.int32)
        self._num_tokens = len(self._tokens)
        self._blocks = np.empty(0, np.int32)
        self._num_blocks = 0
        self.computed = 0
        self.released = False

    def __len__(self) -> int:
        return self._num_tokens

    @property
    def tokens(self) -> IntArray:
        """All token ids, int32 [len]; a view, valid until the sequence changes."""
        return self._tokens[: self._num_tokens]

    @property
    def block_table(self) -> IntArray:
        """The blocks in order, int32; a view, valid until the sequence changes."""
        return self._blocks[: self._num_blocks]

    @property
    def capacity(self) -> int:
        """How many tokens the blocks have room for."""
        return self._num_blocks * self._pool.block_size

    def extend(self, tokens: npt.ArrayLike) -> None:
        """Append token ids; their KV is yet to be computed."""
        added = np.asarray(tokens, np.int32)
        end = self._num_tokens + len(added)
        self._tokens = _grown(self._tokens, end)
        self._tokens[self._num_tokens : end] = added
        self._num_tokens = end

    def missing_blocks(self, slots: int) -> int:
        """How many blocks must be added for a room of `slots` tokens."""
        return max(0, self._pool.blocks_for(slots) - self._num_blocks)

    def reserve(self, slots: int) -> None:
        """Make room for `slots` tokens in all."""
        if missing := self.missing_blocks(slots):
            self._append_blocks(self._pool.allocate(missing))

    def piece(self, count: int, logit_rows: int, draft: ListLike[int] = ()) -> Piece:
        """The next `count` tokens without KV, and a draft of what follows them, as work for the backend.

        Room for all of them and one more must be reserved. What comes of the draft is not part of the sequence.
        """
        end = self.computed + count
        assert end + len(draft) < self.capacity, "a piece needs its slots and one more reserved"
        tokens = self._tokens[self.computed : end]
        if draft:
            tokens = np.concatenate((tokens, np.asarray(draft, np.int32)))
        return Piece(tokens, self.computed, self.block_table, logit_rows)

    def fork(self, length: int) -> "Sequence":
        """A new sequence of the first `length` tokens, all of them computed, sharing their KV."""
        assert length <= self.computed
        full, partial = divmod(length, self._pool.block_size)
        copied = self._pool.allocate(1 if partial else 0)
        shared = self._blocks[:full]
        self._pool.share(shared)
        if partial:
            self._pool.copy_block(int(self._blocks[full]), int(copied[0]))
        child = Sequence(self._pool, self._tokens[:length])
        child._append_blocks(shared)
        child._append_blocks(copied)
        child.computed = length
        return child

    def truncate(self, length: int) -> None:
        """Forget all tokens after the first `length`, and free the blocks that only they needed.

        Where the new end falls into a block that another sequence shares, the block is copied first.
        """
        assert length <= self._num_tokens
        kept = self._pool.blocks_for(length)
        copy_last = self.ends_in_shared_block(length)
        if kept < self._num_blocks:
            self._pool.release(self._blocks[kept : self._num_blocks])
            self._num_blocks = kept
        self._num_tokens = length
        self.computed = min(self.computed, length)
        if copy_last:
            (copy,) = self._pool.allocate(1)
            self._pool.copy_block(int(self._blocks[kept - 1]), int(copy))
            self._pool.release(self._blocks[kept - 1 : kept])
            self._blocks[kept - 1] = copy

    def ends_in_shared_block(self, length: int) -> bool:
        """Whether slot `length` lies in a block that holds tokens of this and of another sequence."""
        block, used = divmod(length, self._pool.block_size)
        return used > 0 and block < self._num_blocks and bool(self._pool.references[self._blocks[block]] > 1)

    def release(self) -> None:
        """Give all blocks back; the sequence must not be used again."""
        assert not self.released, "a sequence was released twice"
        self.truncate(0)
        self.released = True

    def _append_blocks(self, blocks: IntArray) -> None:
        end = self._num_blocks + len(blocks)
        self._blocks = _grown(self._blocks, end)
        self._blocks[self._num_blocks : end] = blocks
        self._num_blocks = end


def _grown(array: IntArray, size: int) -> IntArray:
    """The array, or a copy of at least twice its length, with room for `size` elements."""
    if size <= len(array):
        return array
    larger = np.empty(max(size, 2 * len(array), 16), np.int32)
    larger[: len(array)] = array
    return larger
