"""A store of keys and values in blocks that sequences share."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Generic, Protocol, TypeVar

import numpy as np

from slipstream.backend.pool import Pool
from slipstream.backend.store import Blob, Exported, OutOfMemoryError, SequenceState, Span
from slipstream.types import IntArray

_SPAN_BLOCKS = 16
"""Blocks that are copied between two steps: a few milliseconds' worth."""


class Blocks(Protocol):
    """Keys and values, in all layers, by block."""

    def copy_block(self, source: int, target: int) -> None:
        """Copy the content of one block to another."""
        ...

    def read_blocks(self, blocks: IntArray) -> Exported:
        """A copy of what blocks hold, [blocks, ...]; they may be written to at once."""
        ...

    def write_blocks(self, blocks: IntArray, contents: Blob) -> None:
        """Fill blocks with what `read_blocks` gave."""
        ...


class PagedState(SequenceState):
    """A block table; blocks beyond those of `length` are reserved."""

    __slots__ = ("_size", "_table", "evictable")

    def __init__(self) -> None:
        self.length = self.room = 0
        self.evictable = False
        self._table = np.empty(4, np.int32)
        self._size = 0

    @property
    def block_table(self) -> IntArray:
        """The blocks in order, int32; a view, valid until the state changes."""
        return self._table[: self._size]

    @property
    def blocks(self) -> IntArray:
        """All blocks that it holds, int32."""
        return self.block_table

    def append(self, blocks: IntArray) -> None:
        """Add blocks at the end."""
        end = self._size + len(blocks)
        if end > len(self._table):
            self._table = np.concatenate((self._table, np.empty(max(end, len(self._table)), np.int32)))
        self._table[self._size : end] = blocks
        self._size = end

    def cut(self, count: int) -> IntArray:
        """Take off all but the first `count` blocks; returns them."""
        taken = self._table[count : self._size].copy()
        self._size = min(self._size, count)
        return taken


AnyState = TypeVar("AnyState", bound=PagedState)


class PagedStore(Generic[AnyState]):
    """A `Store` in `num_blocks` blocks numbered from `first_block` on, each with a count of the states that have it.

    Forking shares full blocks and copies a partial one, so a slot that holds a token is never written again while
    another state can see it. `spare` slots after a state's last token are the backend's own, for whatever it writes
    there. All operations cost O(blocks named).
    """

    def __init__(
        self,
        blocks: Blocks,
        new_state: type[AnyState],
        *,
        num_blocks: int,
        block_size: int,
        block_bytes: int,
        spare: int = 0,
        first_block: int = 1,
    ) -> None:
        self.blocks = blocks
        self.block_size = block_size
        self.block_bytes = block_bytes
        self.spare = spare
        self.capacity = num_blocks * block_size - spare
        self.bytes_per_token = block_bytes // block_size
        self.pool = Pool(num_blocks, first_block)
        self._new_state = new_state

    @property
    def free(self) -> int:
        """Memory that nothing holds, in tokens."""
        return self.pool.free * self.block_size

    @property
    def evictable(self) -> int:
        """Memory that evictable states alone hold, in tokens."""
        return self.pool.evictable * self.block_size

    def open(self, room: int) -> AnyState:
        """A state of no tokens, with blocks for `room` tokens."""
        state = self._new_state()
        self._take(state, self.open_cost(room))
        return state

    def fork(self, state: AnyState, length: int, room: int) -> AnyState:
        """A state of the first `length` tokens of another: full blocks are shared, a partial one is copied."""
        full, partial = divmod(length, self.block_size)
        child = self._new_state()
        child.append(state.block_table[:full])
        self._require(cost := self.fork_cost(state, length, room))
        self.pool.share(child.block_table)
        self._take(child, cost)
        if partial:
            self.blocks.copy_block(int(state.block_table[full]), int(child.block_table[full]))
        child.length = length
        self._note_room(child)
        return child

    def reserve(self, state: AnyState, room: int) -> None:
        """Add blocks up to `room` tokens in all."""
        self._take(state, self.reserve_cost(state, room))

    def reach(self, state: AnyState, length: int) -> int:  # noqa: ARG002 - any state can be cut anywhere
        """Any length can be reached."""
        return length

    def keeps_draft(self, state: AnyState, count: int, draft: int, marks: Sequence[int]) -> bool:  # noqa: ARG002
        """Any draft can be taken back."""
        return True

    def rewind(self, state: AnyState, length: int, most: int | None = None) -> int:
        """Forget all tokens after the first `length`.

        Blocks from the new end on that another state has too are exchanged for free ones, as far as there are any. If
        the end falls into such a block, that one is copied; if memory has none left for it, the rewind goes on to where
        it begins. It takes at `most` so many blocks.
        """
        at, used = divmod(length, self.block_size)
        if (shared := self.pool.shared(state.block_table[at:])).any():
            tail = state.cut(at)
            free = self.pool.free if most is None else min(most, self.pool.free)
            fresh = self.pool.take(min(free, int(shared.sum())), state.evictable)
            own = tail[~shared]
            if used and shared[0] and len(fresh):
                self.blocks.copy_block(int(tail[0]), int(fresh[0]))
            elif used and shared[0]:
                length = at * self.block_size
            self.pool.give_back(tail[shared], state.evictable)
            state.append(np.concatenate((fresh, own) if shared[0] else (own, fresh)))
            self._note_room(state)
        state.length = length
        return length

    def trim(self, state: AnyState) -> None:
        """Give back the blocks beyond those of the state's tokens."""
        self.shorten(state, -(-state.length // self.block_size))

    def shorten(self, state: AnyState, count: int) -> None:
        """Give back all but the first `count` blocks."""
        self.pool.give_back(state.cut(count), state.evictable)
        self._note_room(state)

    def release(self, state: AnyState) -> None:
        """Give back all blocks; the state must not be used again."""
        assert state.length >= 0, "a state was released twice"
        self.pool.give_back(state.cut(0), state.evictable)
        state.length = -1

    def set_evictable(self, state: AnyState, evictable: bool) -> None:
        """Declare whether a state belongs to nobody."""
        if state.evictable != evictable:
            self.pool.set_evictable(state.blocks, evictable)
            state.evictable = evictable

    def open_cost(self, room: int) -> int:
        """The tokens of the blocks that `room` tokens take."""
        return -(-(room + self.spare) // self.block_size) * self.block_size

    def fork_cost(self, state: AnyState, length: int, room: int) -> int:  # noqa: ARG002 - costs the same from any
        """The same, less the full blocks that are shared; a fork without more room needs no spare slots."""
        needed = self.open_cost(room) if room > length else -(-length // self.block_size) * self.block_size
        return needed - length // self.block_size * self.block_size

    def reserve_cost(self, state: AnyState, room: int) -> int:
        """The same, less the blocks that the state has."""
        return max(0, self.open_cost(room) - len(state.block_table) * self.block_size)

    def cut_cost(self, state: AnyState, length: int, room: int) -> int:
        """What a state has to take to lose its tail and have `room` tokens reserved, less what the tail alone held."""
        kept = -(-length // self.block_size)
        freed = self.pool.unshared(state.block_table[kept:])
        copied = self.ends_in_shared_block(state, length)
        return max(0, self.open_cost(room) - kept * self.block_size) + (copied - freed) * self.block_size

    def held(self, states: Iterable[AnyState]) -> int:
        """The tokens of the blocks that states have, each block counted once."""
        held = [state.blocks for state in states]
        return len(np.unique(np.concatenate(held))) * self.block_size if held else 0

    def spans(self, start: int, end: int) -> Iterator[Span]:
        """The tokens from `start` to `end` in spans that all but the last end with a block."""
        size = _SPAN_BLOCKS * self.block_size
        for first, last in pairwise([start, *range((start // size + 1) * size, end, size), end]):
            yield Span(first, last, -(-last // self.block_size) - first // self.block_size)

    def aligned(self, start: int) -> int:
        """Where the block of a token begins."""
        return start - start % self.block_size

    def export(self, state: AnyState, start: int, end: int) -> Exported:
        """A copy of the blocks of the tokens from `start` to `end`, whole, so that some rubbish may be at its end."""
        return self.blocks.read_blocks(self._span(state, start, end))

    def install(self, state: AnyState, end: int, blob: Blob) -> None:
        """Extend a state that ends with a block by what was exported up to `end`."""
        self.blocks.write_blocks(self._span(state, state.length, end), blob)
        state.length = end

    def ends_in_shared_block(self, state: AnyState, length: int) -> bool:
        """Whether slot `length` lies behind a token, in a block that another state has too."""
        block, used = divmod(length, self.block_size)
        table = state.block_table
        return used > 0 and block < len(table) and bool(self.pool.shared(table[block : block + 1])[0])

    def room(self, state: AnyState) -> int:
        """The tokens, in all, that a state has blocks for."""
        return len(state.block_table) * self.block_size - self.spare

    def check(self, states: Iterable[AnyState]) -> None:
        """Assert that each block is either free, once, or had by as many of these states as it counts (for tests)."""
        states = list(states)
        self.pool.check((state.blocks, state.evictable) for state in states)
        assert all(0 <= state.length <= len(state.block_table) * self.block_size for state in states)

    def _span(self, state: AnyState, start: int, end: int) -> IntArray:
        return state.block_table[start // self.block_size : -(-end // self.block_size)]

    def _require(self, size: int) -> None:
        if size > self.free:
            raise OutOfMemoryError(f"KV memory for {size} tokens was asked for, {self.free} are free")

    def _take(self, state: AnyState, size: int) -> None:
        self._require(size)
        state.append(self.pool.take(size // self.block_size, state.evictable))
        self._note_room(state)

    def _note_room(self, state: AnyState) -> None:
        state.room = self.room(state)
