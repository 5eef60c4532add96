"""A store of keys and values in blocks, and of recurrent states in slots: those of a sequence together or not at all.

A recurrent state can't be cut back, so some states along a sequence are kept: one every `interval` tokens, those at its
marks, where others are likely to part from it, and that before the last step. A sequence can be forked and rewound to
any of them, and what follows is computed again.
"""

import bisect
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import pairwise

import numpy as np

from slipstream.backend.paged_store import PagedState, PagedStore
from slipstream.backend.pool import Pool
from slipstream.backend.slots import EMPTY_SLOT, Slots, SlotStates, fit_one_step
from slipstream.backend.store import Blob, Exported, OutOfMemoryError, Span
from slipstream.types import IntArray

MARKS = 4
"""States that a sequence keeps besides those at intervals; of older ones, those that stand apart as memory is free."""
_WORKING = 2 + MARKS
"""Slots that a sequence with more to compute has for its own: the last state, the next, and those at its marks."""


class HybridState(PagedState):
    """A block table, and the slots of states along the sequence."""

    __slots__ = ("kept", "marks", "promised", "spare", "store")

    store: "HybridStore"

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[int, int] = {}
        """Slots by the length of the sequence when its state was the slot's; its own length among them, unless 0."""
        self.marks: list[int] = []
        """Lengths, off the intervals, whose states are worth keeping."""
        self.spare: list[int] = []
        """Slots that hold nothing yet."""
        self.promised = 0
        """The tokens, in all, that there are slots for."""

    @property
    def slots(self) -> IntArray:
        """All of them, int32."""
        return np.array([*self.kept.values(), *self.spare], np.int32)


class HybridStore:
    """A `Store` over a `PagedStore` and slots, which take their memory from what there is for blocks.

    Slots at intervals are shared by forks; all others are a state's own, so that it always has one to write to.
    """

    def __init__(self, kv: PagedStore[HybridState], states: SlotStates, *, first_slot: int, interval: int) -> None:
        assert interval % kv.block_size == 0
        self._kv = kv
        self._states = states
        self.interval = interval
        self.slot_rows = -(-states.slot_bytes // kv.block_bytes)
        """Blocks that take as much memory as a slot."""
        self.gap = self._slot_tokens = self.slot_rows * kv.block_size
        """Tokens, at least, between the end of a message and the state before it for its own to be kept: whose keys and
        values take as much memory."""
        self._pool = Pool(kv.pool.size // self.slot_rows, first_slot)
        self.capacity = bisect.bisect_right(range(kv.free + 1), kv.free, key=self.open_cost) - 1
        self.bytes_per_token = kv.bytes_per_token + states.slot_bytes // interval

    @property
    def free(self) -> int:
        """Memory that nothing holds, in tokens."""
        return self._kv.free - (self._pool.size - self._pool.free) * self._slot_tokens

    @property
    def evictable(self) -> int:
        """Memory that evictable states alone hold, in tokens."""
        return self._kv.evictable + self._pool.evictable * self._slot_tokens

    def open(self, room: int) -> HybridState:
        """A state of no tokens, with blocks and slots for `room` tokens."""
        self._require(self.open_cost(room))
        state = self._kv.open(room)
        state.store = self
        self._take(state, self._needed(0, room))
        self._promise(state, room)
        return state

    def fork(self, state: HybridState, length: int, room: int) -> HybridState:
        """A state of at most the first `length` tokens: slots at intervals are shared, that at its end is copied."""
        self._require(self.fork_cost(state, length, room))
        length = self.reach(state, length)
        child = self._kv.fork(state, length, room)
        child.store = self
        shared = {at: slot for at, slot in state.kept.items() if at <= length and self._at_interval(at)}
        self._pool.share(np.array(list(shared.values()), np.int32))
        child.kept = shared
        self._take(child, self._forked(length, room))
        if length and length not in shared:
            child.kept[length] = child.spare.pop()
            self._states.copy(state.kept[length], child.kept[length])
        self._promise(child, max(room, length))
        return child

    def reserve(self, state: HybridState, room: int) -> None:
        """Add blocks and slots up to `room` tokens in all; older marks and a draft's states make room if need be."""
        self._require(self.reserve_cost(state, room))
        if self._growth(state, room) > self.free:
            self._forget(state, [*self._passing(state), *state.marks[: self._surplus(state)]])
            excess = self._own(state) - self._needed(state.length, max(room, state.promised))
            self._give_back(state, [state.spare.pop() for _ in range(excess)])
        self._kv.reserve(state, room)
        self._take(state, max(0, self._needed(state.length, room) - self._own(state)))
        self._promise(state, max(room, state.promised))

    def reach(self, state: HybridState, length: int) -> int:
        """The longest length, up to another, whose state is kept."""
        return max((at for at in state.kept if at <= length), default=0)

    def keeps_draft(self, state: HybridState, count: int, draft: int, marks: Sequence[int]) -> bool:
        """Whether there is memory for the states after each token of a draft, and the step can write them."""
        end = state.length + count + draft
        kept = self._lengths(state, end, draft, self._marks(state, end - draft, marks))
        return kept.issuperset(range(end - draft, end))

    def rewind(self, state: HybridState, length: int) -> int:
        """Forget all tokens after a length whose state is kept.

        If there's no memory for a copy of the block that a fork shares, the rewind goes on to an earlier one.
        """
        if length >= state.length:
            return state.length
        while (reached := self.reach(state, length)) and self.free < self._kv.block_size:
            if not self._kv.ends_in_shared_block(state, reached):
                break
            length = reached - 1
        room = state.room
        self._kv.rewind(state, reached, self.free // self._kv.block_size)
        self._forget(state, [at for at in state.kept if at > reached])
        missing = self._needed(reached, state.promised) - self._own(state)
        self._take(state, max(0, min(missing, self.free // self._slot_tokens)))
        while state.promised > reached and self._needed(reached, state.promised) > self._own(state):
            state.promised -= self.interval
        self._promise(state, max(reached, state.promised))
        state.room = min(room, state.room)
        return reached

    def trim(self, state: HybridState) -> None:
        """Give back what is beyond the state's tokens, and all slots but those at intervals, marks and the end."""
        self._forget(state, self._passing(state))
        self._give_back(state, state.spare)
        state.spare = []
        self._kv.trim(state)
        self._promise(state, state.length)

    def release(self, state: HybridState) -> None:
        """Give back all memory; the state must not be used again."""
        self._give_back(state, [*state.kept.values(), *state.spare])
        state.kept, state.spare, state.marks = {}, [], []
        self._kv.release(state)

    def set_evictable(self, state: HybridState, evictable: bool) -> None:
        """Declare whether a state belongs to nobody. The end of one that is taken up again is worth a mark."""
        if state.evictable != evictable:
            self._pool.set_evictable(state.slots, evictable)
            self._kv.set_evictable(state, evictable)
            if not evictable:
                self._mark(state, state.length)

    def open_cost(self, room: int) -> int:
        """The tokens of the blocks and slots that `room` tokens take."""
        return self._kv.open_cost(room) + self._needed(0, room) * self._slot_tokens

    def fork_cost(self, state: HybridState, length: int, room: int) -> int:
        """The same, less what is shared."""
        length = self.reach(state, length)
        return self._kv.fork_cost(state, length, room) + self._forked(length, room) * self._slot_tokens

    def reserve_cost(self, state: HybridState, room: int) -> int:
        """The same, less what the state has; if memory is short, older marks and a draft's states are among it."""
        cost = self._growth(state, room)
        if cost <= self.free or room <= state.length:
            return cost
        slots = self._needed(state.length, max(room, state.promised)) - self._own(state) - self._surplus(state)
        return self._kv.reserve_cost(state, room) + slots * self._slot_tokens

    def cut_cost(self, state: HybridState, length: int, room: int) -> int:
        """What a state has to take to lose its tail and have `room` tokens reserved, less what the tail alone held."""
        length = self.reach(state, length)
        marks = [at for at in state.kept if at in state.marks and at <= length]
        own = len(marks) + (length not in marks and length > 0 and not self._at_interval(length))
        tail = [slot for at, slot in state.kept.items() if at > length and self._at_interval(at)]
        freed = len(state.spare) + len(self._own_kept(state)) + self._pool.unshared(np.array(tail, np.int32))
        held = max(own, self._needed(length, room) + max(0, len(marks) - MARKS))
        return self._kv.cut_cost(state, length, room) + self._slot_tokens * (held - freed)

    def held(self, states: Iterable[HybridState]) -> int:
        """The tokens of the blocks and slots that states have, each counted once."""
        states = list(states)
        slots = np.unique(np.concatenate([state.slots for state in states])) if states else ()
        return self._kv.held(states) + len(slots) * self._slot_tokens

    def spans(self, start: int, end: int) -> Iterator[Span]:
        """The tokens from `start` to `end` in spans that all but the last end where a state is kept."""
        every = self.interval
        for first, last in pairwise([start, *range((start // every + 1) * every, end, every), end]):
            blocks = -(-last // self._kv.block_size) - first // self._kv.block_size
            yield Span(first, last, blocks + self.slot_rows)

    def aligned(self, start: int) -> int:
        """Any token may be the first of an export."""
        return start

    def export(self, state: HybridState, start: int, end: int) -> Exported:
        """The blocks of a span's tokens, and the state at its end."""
        blocks = self._kv.export(state, start, end).wait()  # they are on the host, as the recurrent states are
        rows = np.zeros((self.slot_rows, *blocks.shape[1:]), np.uint16)
        content = self._states.read(state.kept[end])
        rows.reshape(-1)[: len(content)] = content
        return Exported.here(np.concatenate((blocks, rows)))

    def install(self, state: HybridState, end: int, blob: Blob) -> None:
        """Extend a state by what was exported from its length up to `end`."""
        self._mark(state, state.length)
        self._kv.install(state, end, blob[: -self.slot_rows])
        state.kept[end] = slot = state.spare.pop()
        self._states.write(slot, blob[-self.slot_rows :].reshape(-1))

    def check(self, states: Iterable[HybridState]) -> None:
        """Assert that blocks and slots are had as they count, and states are kept where they must be (for tests)."""
        states = list(states)
        self._kv.check(states)
        self._pool.check((state.slots, state.evictable) for state in states)
        own = [slot for state in states for slot in (*state.spare, *self._own_kept(state).values())]
        assert len(set(own)) == len(own), "two states write to one slot"
        for state in states:
            assert list(state.kept) == sorted(state.kept)
            assert max(state.kept, default=0) == state.length
            assert all(at in state.kept for at in range(self.interval, state.length + 1, self.interval))
            assert self._own(state) >= self._needed(state.length, state.promised), (
                "a state may have nothing to write to"
            )
        assert self.free >= 0

    # What a step does

    def plan(self, state: HybridState, count: int, *, rows: int, marks: Sequence[int]) -> Slots:
        """Where the next `count` tokens find the state and leave others; nothing has changed until `commit`.

        States are kept at intervals and at the end in any case; as far as memory is free, at `marks` that stand apart
        from other states, and after each of the last `rows` tokens, of which all but the first may be forgotten again.
        For those a long chunk would be cut before its draft: a step more, and that's what drafts are to save.
        """
        self._forget(state, self._passing(state))
        excess = self._own(state) - self._needed(state.length, state.promised)
        if excess > 0:
            self._give_back(state, [state.spare.pop() for _ in range(excess)])
        past, end, draft = state.length, state.length + count, max(0, rows - 1)
        marks = self._marks(state, end - draft, marks)
        lengths = self._lengths(state, end, draft, marks)
        self._take(state, self._missing(state, lengths, marks))
        for at in marks:
            if at in lengths:
                self._mark(state, at)
        kept = tuple(zip(sorted(lengths), reversed(state.spare), strict=False))
        return Slots(state.kept.get(past, EMPTY_SLOT), kept)

    def commit(self, state: HybridState, slots: Slots) -> None:
        """Note that the tokens of a plan are computed."""
        del state.spare[-len(slots.kept) :]
        state.kept.update(slots.kept)
        state.length = slots.kept[-1][0]

    def _marks(self, state: HybridState, end: int, marks: Iterable[int]) -> list[int]:
        """Those of a chunk's marks that are worth a state; `end` is where its draft begins.

        All but the last, from which a prompt is answered again, move back to the end of a block: states that lie a
        whole number of blocks apart are written in one step, and a chunk would be cut for others.
        """
        places = {at if at == end - 1 else at - at % self._kv.block_size for at in marks if at < end}
        return self._apart(state, [at for at in sorted(places) if at > state.length], always={end - 1})

    def _lengths(self, state: HybridState, end: int, draft: int, marks: Collection[int]) -> set[int]:
        """Lengths up to `end` whose states the next step keeps, of which the last `draft` tokens are a draft."""
        certain = {*range((state.length // self.interval + 1) * self.interval, end, self.interval), end}
        drafted = range(end - draft, end)
        if not fit_one_step(state.length, {*certain, *marks, *drafted}):
            drafted = range(0)
        return next(
            lengths
            for lengths in ({*certain, *marks, *drafted}, {*certain, *drafted}, {*certain, *marks}, certain)
            if self._missing(state, lengths, marks) <= self.free // self._slot_tokens
        )

    def _missing(self, state: HybridState, lengths: Collection[int], marks: Iterable[int]) -> int:
        """Slots that a state needs besides its own to keep states at lengths, and more than its few marks for good."""
        surplus = max(0, len(state.marks) + sum(at in lengths for at in marks) - MARKS) - self._surplus(state)
        return max(len(lengths) - len(state.spare) - len(self._passing(state)), surplus, 0)

    # Slots

    def _at_interval(self, length: int) -> bool:
        return length % self.interval == 0

    def _needed(self, length: int, room: int) -> int:
        """Slots of its own that a state of a length has if there's room for `room` tokens."""
        return room // self.interval - length // self.interval + _WORKING if room > length else 0

    def _forked(self, length: int, room: int) -> int:
        """Slots that a fork takes."""
        return max(self._needed(length, room), int(length > 0 and not self._at_interval(length)))

    def _own_kept(self, state: HybridState) -> dict[int, int]:
        return {at: slot for at, slot in state.kept.items() if not self._at_interval(at)}

    def _own(self, state: HybridState) -> int:
        """How many slots a state has for its own: all but those at intervals, and those of older marks."""
        return len(state.spare) + len(self._own_kept(state)) - self._surplus(state)

    def _surplus(self, state: HybridState) -> int:
        """How many marks are kept that the state has no right to."""
        return max(0, sum(at in state.kept for at in state.marks) - MARKS)

    def _growth(self, state: HybridState, room: int) -> int:
        """What a state takes to have `room` tokens in all, without giving anything up."""
        slots = max(0, self._needed(state.length, room) - self._own(state))
        return self._kv.reserve_cost(state, room) + slots * self._slot_tokens

    def _passing(self, state: HybridState) -> list[int]:
        """Lengths that are kept for no longer than the next step."""
        return [at for at in self._own_kept(state) if at != state.length and at not in state.marks]

    def _mark(self, state: HybridState, length: int) -> None:
        """Have the state at a length kept; of marks older than the last few, only those that stand apart."""
        if length and not self._at_interval(length) and length not in state.marks:
            marks, state.marks = sorted([*state.marks, length]), []
            state.marks = self._apart(state, marks, always=set(marks[-MARKS:]))

    def _apart(self, state: HybridState, lengths: Iterable[int], always: set[int]) -> list[int]:
        """Which of the rising lengths, off the intervals, lie a gap behind the state before; some do `always`."""
        found: list[int] = []
        for at in lengths:
            marked = (mark for mark in (*state.marks, *found) if mark < at)
            before = max(at // self.interval * self.interval, max(marked, default=0))
            if not self._at_interval(at) and (at in always or at - before >= self.gap):
                found.append(at)
        return found

    def _forget(self, state: HybridState, lengths: Iterable[int]) -> None:
        """Make the slots of lengths spare, or leave them to others that have them, too."""
        for at in lengths:
            slot = state.kept.pop(at)
            if self._pool.shared(np.array([slot], np.int32))[0]:
                self._give_back(state, [slot])
            else:
                state.spare.append(slot)
        state.marks = [at for at in state.marks if at in state.kept]

    def _take(self, state: HybridState, count: int) -> None:
        state.spare += self._pool.take(count, state.evictable).tolist()

    def _give_back(self, state: HybridState, slots: Sequence[int]) -> None:
        self._pool.give_back(np.array(slots, np.int32), state.evictable)

    def _promise(self, state: HybridState, room: int) -> None:
        """Note for how many tokens there are slots."""
        whole = (room // self.interval + 1) * self.interval - 1  # tokens that take no more slots
        state.promised = whole if room > state.length else room
        state.room = min(self._kv.room(state), state.promised)

    def _require(self, size: int) -> None:
        if size > self.free:
            raise OutOfMemoryError(f"memory for {size} tokens was asked for, {self.free} are free")
