"""A store for models whose layers have sliding windows, some or all: those give back the blocks that nobody will need.

Such a sequence has blocks that hold what layers without windows keep of its tokens (one layer with a window, if all
have one), and *rows* of blocks for the others, one row for each block of tokens. It can be taken up wherever the rows
that a window sees from there are held: at its end and back to where its last step began, at intervals, and at its
marks, where others are likely to part from it. A fork or rewind goes back to the nearest of these places, and what
follows is computed again.
"""

import bisect
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from slipstream.backend.paged_store import PagedState, PagedStore
from slipstream.backend.store import Blob, Exported, OutOfMemoryError, Span
from slipstream.types import IntArray

MARKED = 2
"""Windows whose rows a sequence keeps for its marks: those of the first mark, where what many share often ends, and of
the latest. Marks that lie close together see much the same rows."""
_APART = 4
"""Rows at intervals take at most this part of the memory of what layers without windows keep; or, if all layers have
windows, of what all rows would take."""

Mask = npt.NDArray[np.bool_]


class WindowState(PagedState):
    """A block table, and the rows of layers with windows."""

    __slots__ = ("marks", "rows", "spare", "store")

    store: "WindowStore"
    rows: IntArray
    """By block of tokens, int32 [blocks, tables]; 0 where a row was given back."""
    spare: IntArray
    """Rows that hold nothing yet, int32 [rows, tables]."""

    def __init__(self) -> None:
        super().__init__()
        self.marks: list[int] = []
        """Lengths, rising, at which it may be taken up besides its end and intervals."""

    @property
    def blocks(self) -> IntArray:
        """All blocks that it holds, int32."""
        return np.concatenate((self.block_table, self.rows[self.rows > 0], self.spare.ravel()))


class WindowStore:
    """A `Store` over a `PagedStore`, from whose blocks it takes its rows, too.

    Forks share rows by reference, and copy the one that isn't full. A sequence can always compute what it was promised,
    in chunks of at most `longest_chunk` tokens: it has spare rows for all that it can't take from what it gives back.
    """

    def __init__(
        self,
        kv: PagedStore[WindowState],
        *,
        window: int,
        tables: int,
        longest_chunk: int,
        has_full_attention: bool = True,
    ) -> None:
        self._kv = kv
        self._size = kv.block_size
        self._spare = kv.spare
        self._tables = tables
        self._window = -(-window // kv.block_size)
        """Rows that a window sees from where a row ends."""
        self.interval = _APART * (tables if has_full_attention else 1) * self._window * kv.block_size
        """Tokens between two places at which any sequence can be taken up."""
        self.longest_chunk = longest_chunk
        working = self._up_to(longest_chunk + kv.spare) + self._window + 1
        self._marked = MARKED * (self._window + 1)
        self._most = working + self._marked
        """Rows of its own, besides those at intervals, that a sequence takes at most."""
        self.capacity = bisect.bisect_right(range(kv.free + 1), kv.free, key=self.open_cost) - 1
        self.bytes_per_token = kv.bytes_per_token

    @property
    def free(self) -> int:
        """Memory that nothing holds, in tokens of layers without windows."""
        return self._kv.free

    @property
    def evictable(self) -> int:
        """Memory that evictable states alone hold, in the same."""
        return self._kv.evictable

    def open(self, room: int) -> WindowState:
        """A state of no tokens, with blocks and rows for `room` tokens."""
        self._require(self.open_cost(room))
        state = self._kv.open(room)
        state.store = self
        state.rows = state.spare = np.empty((0, self._tables), np.int32)
        self._settle(state)
        return state

    def fork(self, state: WindowState, length: int, room: int) -> WindowState:
        """A state of at most the first `length` tokens: full rows are shared, a partial one is copied."""
        self._require(self.fork_cost(state, length, room))
        length = self.reach(state, length)
        full, used = divmod(length, self._size)
        marks = [at for at in state.marks if at <= length]
        rows = np.where(self._kept(length, marks)[:, None], state.rows[: self._up_to(length)], 0)
        self._kv.pool.share(rows[:full][rows[:full] > 0])
        self._settle(state)
        child = self._kv.fork(state, length, room)
        child.store, child.marks, child.rows, child.spare = self, marks, rows, state.spare[:0]
        if used:
            rows[full] = self._copy_of(child, state.rows[full])
        self._settle(child)
        return child

    def reserve(self, state: WindowState, room: int) -> None:
        """Add blocks and rows up to `room` tokens in all."""
        self._require(self.reserve_cost(state, room))
        if room + self._spare > len(state.block_table) * self._size:
            self._settle(state, self._up_to(room + self._spare))
            self._kv.reserve(state, room)

    def reach(self, state: WindowState, length: int) -> int:
        """The longest length, up to another, from which all rows that a window sees are held."""
        held = np.concatenate(([False], state.rows[: self._up_to(length), 0] > 0, [False]))
        ends: list[list[int]] = np.flatnonzero(held[1:] != held[:-1]).reshape(-1, 2)[::-1].tolist()
        for first, end in ends:
            found = min(length, end * self._size)
            if first == 0 or found // self._size >= first + self._window:
                return found
        return 0

    def keeps_draft(self, state: WindowState, count: int, draft: int, marks: Sequence[int]) -> bool:  # noqa: ARG002
        """Any draft can be taken back: rows are given back with the next step."""
        return True

    def rewind(self, state: WindowState, length: int) -> int:
        """Forget all tokens after a length that can be reached.

        If there's no memory for copies of what a fork shares, the rewind goes on to where that begins.
        """
        if length >= state.length:
            return state.length
        while True:
            length = self.reach(state, length)
            full, used = divmod(length, self._size)
            copied = used > 0 and bool(self._shared(state.rows[full : full + 1])[0])
            needed = self._kv.ends_in_shared_block(state, length) + self._tables * (copied and not len(state.spare))
            if needed <= self._kv.pool.free:
                break
            length -= used
        self._cut(state, self._up_to(length))
        if copied:
            shared = state.rows[full].copy()
            state.rows[full] = self._copy_of(state, shared)
            self._kv.pool.give_back(shared, state.evictable)
        self._kv.rewind(state, length)
        state.marks = [at for at in state.marks if at <= length]
        self._settle(state)
        return length

    def trim(self, state: WindowState) -> None:
        """Give back what is beyond the state's tokens, and all rows that nothing needs."""
        self._cut(state, self._up_to(state.length))
        self._kv.trim(state)
        self._forget(state)

    def release(self, state: WindowState) -> None:
        """Give back all memory; the state must not be used again."""
        self._kv.pool.give_back(state.blocks[len(state.block_table) :], state.evictable)
        state.rows = state.spare = state.rows[:0]
        self._kv.release(state)

    def set_evictable(self, state: WindowState, evictable: bool) -> None:
        """Declare whether a state belongs to nobody. The end of one that is taken up again is worth a mark."""
        if state.evictable != evictable:
            self._kv.set_evictable(state, evictable)
            if not evictable:
                self._mark(state, [state.length])

    def open_cost(self, room: int) -> int:
        """The tokens of the blocks and rows that `room` tokens take."""
        return self._kv.open_cost(room) + self._tokens(self._needed(0, self._up_to(room + self._spare), 0, 0))

    def fork_cost(self, state: WindowState, length: int, room: int) -> int:
        """The same, less what is shared; and what the other needs in place of rows that were its own before."""
        length = self.reach(state, length)
        end = self._up_to(length)
        blocks = self._up_to(room + self._spare) if room > length else end
        copied = length % self._size > 0
        own = self._own(state)
        marks = [at for at in state.marks if at <= length]
        shared = own[: length // self._size] & self._kept(length, marks)[: length // self._size]
        others = self._needed(state.length, len(state.block_table), len(state.rows), int(own.sum() - shared.sum()))
        rows = copied + self._needed(length, blocks, end, int(copied)) + others - len(state.spare)
        return self._kv.fork_cost(state, length, room) + self._tokens(rows)

    def reserve_cost(self, state: WindowState, room: int) -> int:
        """The same, less what the state has."""
        blocks = self._up_to(room + self._spare)
        if blocks <= len(state.block_table):
            return 0
        rows = self._needed(state.length, blocks, len(state.rows), int(self._own(state).sum())) - len(state.spare)
        return self._kv.reserve_cost(state, room) + self._tokens(rows)

    def cut_cost(self, state: WindowState, length: int, room: int) -> int:
        """What a state has to take to lose its tail and have `room` tokens reserved, less what the tail alone held."""
        length = self.reach(state, length)
        end = self._up_to(length)
        marks = [at for at in state.marks if at <= length]
        kept = np.zeros(len(state.rows), np.bool_)
        kept[:end] = self._kept(length, marks)
        held = (state.rows[:, 0] > 0) & ~self._shared(state.rows)
        copied = length % self._size > 0 and not held[end - 1]
        own = int((held & kept & ~self._at_intervals(len(kept), length)).sum()) + copied
        freed = int((held & ~kept).sum()) + len(state.spare)
        rows = self._needed(length, max(end, self._up_to(room + self._spare)), end, own) + copied - freed
        return self._kv.cut_cost(state, length, room) + self._tokens(rows)

    def held(self, states: Iterable[WindowState]) -> int:
        """The tokens of the blocks that states have, each counted once."""
        return self._kv.held(states)

    def spans(self, start: int, end: int) -> Iterator[Span]:
        """The tokens from `start` to `end` in spans that all but the last end at an interval."""
        every = self.interval
        for first, last in pairwise([start, *range((start // every + 1) * every, end, every), end]):
            rows = self._seen(first, last)
            blocks = self._up_to(last) - first // self._size
            yield Span(first, last, blocks + self._tables * (rows.stop - rows.start))

    def aligned(self, start: int) -> int:
        """Any token may be the first of an export."""
        return start

    def export(self, state: WindowState, start: int, end: int) -> Exported:
        """The blocks of a span's tokens, and the rows among them that a window sees from its end."""
        rows = self._kv.blocks.read_blocks(state.rows[self._seen(start, end)].ravel())
        return Exported.joined((self._kv.export(state, start, end), rows))

    def install(self, state: WindowState, end: int, blob: Blob) -> None:
        """Extend a state by what was exported from its length up to `end`."""
        start, rows = state.length, self._seen(state.length, end)
        full = start // self._size
        split = self._up_to(end) - full
        self._kv.install(state, end, blob[:split])
        if rows.start > full:  # a row that isn't full will never be
            self._cut(state, full)
            state.rows = np.pad(state.rows, ((0, rows.start - full), (0, 0)))
        self._mark(state, [full * self._size if rows.start > full else start])
        self._extend(state, rows.stop)
        self._kv.blocks.write_blocks(state.rows[rows].ravel(), blob[split:])

    def check(self, states: Iterable[WindowState]) -> None:
        """Assert that blocks are had as they count, and rows are held where they must be (for tests)."""
        states = list(states)
        self._kv.check(states)
        for state in states:
            assert all(self.reach(state, at) == at for at in range(self.interval, state.length + 1, self.interval))
            assert self.reach(state, state.length) == state.length
            assert len(state.spare) >= self._lacking(state), "a state may have nothing to write to"
            written = state.rows[state.length // self._size :]
            assert not self._shared(written[written[:, 0] > 0]).any(), "two states write to one row"

    # What a step does

    def plan(self, state: WindowState, count: int, marks: Sequence[int]) -> IntArray:
        """The rows of the next `count` tokens and those that they see, int32 [blocks, tables]; 0 for all others.

        Rows that nobody needs any more are given back, if others are needed.
        """
        self._mark(state, [at for at in marks if at <= state.length + count])
        if (end := self._up_to(state.length + count + self._spare)) > len(state.rows):
            self._forget(state)
            self._extend(state, end)
        return state.rows

    # Rows

    def _up_to(self, length: int) -> int:
        """Blocks that so many tokens take."""
        return -(-length // self._size)

    def _tokens(self, rows: int) -> int:
        """The memory of so many rows."""
        return rows * self._tables * self._size

    def _seen(self, first: int, last: int) -> slice:
        """Rows of the tokens from `first` to `last` that a window sees from the latter."""
        return slice(max(first // self._size, self._first_seen(last)), self._up_to(last))

    def _first_seen(self, length: int) -> int:
        return max(0, length // self._size - self._window)

    def _shared(self, rows: IntArray) -> Mask:
        """Which rows several states hold."""
        return self._kv.pool.shared(rows[:, 0])

    def _own(self, state: WindowState) -> Mask:
        """Which rows a state alone holds, off the intervals."""
        alone = (state.rows[:, 0] > 0) & ~self._shared(state.rows)
        return alone & ~self._at_intervals(len(state.rows), state.length)

    def _at_intervals(self, count: int, length: int) -> Mask:
        """Which of the first rows a window sees from an interval up to a length."""
        every = self.interval // self._size
        rows = np.arange(count)
        return (rows % every >= every - self._window) & (rows < length // self.interval * every)

    def _kept(self, length: int, marks: Sequence[int]) -> Mask:
        """Which rows up to a length are needed, for the end, at intervals and for marks."""
        kept = self._at_intervals(self._up_to(length), length)
        kept[self._first_seen(length) :] = True
        left = self._marked
        for at in (*marks[:1], *reversed(marks[1:])):
            seen = kept[self._first_seen(at) : self._up_to(at)]
            left -= len(seen) - int(seen.sum())
            if left < 0:
                break
            seen[:] = True
        return kept

    def _needed(self, length: int, blocks: int, rows: int, own: int) -> int:
        """Spare rows for a state of a length that has room for `blocks`, so many rows, and of these its own."""
        ahead = (blocks * self._size - self._spare) // self.interval - length // self.interval
        return max(0, min(blocks - rows, self._most + max(0, ahead) * self._window - own))

    def _lacking(self, state: WindowState, blocks: int | None = None) -> int:
        """Spare rows that a state has to have, with room for what it has blocks for, or for so many."""
        blocks = len(state.block_table) if blocks is None else blocks
        return self._needed(state.length, blocks, len(state.rows), int(self._own(state).sum()))

    def _mark(self, state: WindowState, lengths: Iterable[int]) -> None:
        state.marks = sorted({*state.marks, *lengths} - {0})

    def _forget(self, state: WindowState) -> None:
        """Give back rows that nothing needs."""
        marks = [at for at in state.marks if at <= state.length]
        kept = np.ones(len(state.rows), np.bool_)
        kept[: self._up_to(state.length)] = self._kept(state.length, marks)
        self._drop(state, ~kept)
        state.marks = [at for at in state.marks if at > state.length or self.reach(state, at) == at]
        self._settle(state)

    def _drop(self, state: WindowState, dropped: Mask) -> None:
        """Make rows spare, or leave them to others that hold them, too."""
        dropped = dropped & (state.rows[:, 0] > 0)
        shared = self._shared(state.rows)
        self._kv.pool.give_back(state.rows[dropped & shared].ravel(), state.evictable)
        state.spare = np.concatenate((state.spare, state.rows[dropped & ~shared]))
        state.rows = np.where(dropped[:, None], 0, state.rows)

    def _cut(self, state: WindowState, count: int) -> None:
        """Have the first so many rows at most."""
        self._drop(state, np.arange(len(state.rows)) >= count)
        state.rows = state.rows[:count]

    def _extend(self, state: WindowState, end: int) -> None:
        """Have rows up to `end`; a chunk that is longer than promised takes them from what is free."""
        missing = max(0, end - len(state.rows))
        self._require(self._tokens(missing - len(state.spare)))
        self._take(state, missing - len(state.spare))
        state.rows = np.concatenate((state.rows, state.spare[:missing]))
        state.spare = state.spare[missing:]

    def _settle(self, state: WindowState, blocks: int | None = None) -> None:
        """Have as many spare rows as needed; if there's no memory for them, less room."""
        needed = self._lacking(state, blocks)
        self._kv.pool.give_back(state.spare[needed:].ravel(), state.evictable)
        state.spare = state.spare[:needed]
        self._take(state, min(needed - len(state.spare), self._kv.pool.free // self._tables))
        if len(state.spare) < needed:
            self._kv.shorten(state, len(state.rows) + len(state.spare))

    def _copy_of(self, state: WindowState, row: IntArray) -> IntArray:
        """A spare row with what another has."""
        if not len(state.spare):
            self._take(state, 1)
        copy: IntArray = state.spare[0]
        state.spare = state.spare[1:]
        for source, target in zip(row.tolist(), copy.tolist(), strict=True):
            self._kv.blocks.copy_block(source, target)
        return copy

    def _take(self, state: WindowState, count: int) -> None:
        taken = self._kv.pool.take(max(0, count) * self._tables, state.evictable)
        state.spare = np.concatenate((state.spare, taken.reshape(-1, self._tables)))

    def _require(self, size: int) -> None:
        if size > self.free:
            raise OutOfMemoryError(f"memory for {size} tokens was asked for, {self.free} are free")
