"""Backends without a model, for tests of everything above them: paged, with checkpoints only, and not exact.

Their memory holds the tokens themselves, and logits are a hash of what is read back from it. So a wrong block, a slot
that was overwritten or never computed, a state that was not rewound, or a row that is out of place gives other tokens.
They do all that the contracts of `Backend` and `Store` allow, and insist on all that these promise them.
"""

import bisect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from slipstream.backend import Blob, Chunk, Exported, OutOfMemoryError, SequenceState, StepCost, StepMeasurements
from slipstream.backend.hybrid_store import HybridState, HybridStore
from slipstream.backend.paged_store import PagedState, PagedStore
from slipstream.backend.slots import FIRST_SLOT, Slots, slot_inputs
from slipstream.backend.steps import PagedChunk, StepClass
from slipstream.backend.store import Span
from slipstream.backend.window_store import WindowState, WindowStore
from slipstream.sampling import Choice, Row
from slipstream.types import FloatArray, IntArray

VOCABULARY = 50
STOP = 0
STEP_SIZES = (2, 4, 8, 16, 32, 64, 128)
SECONDS_PER_TOKEN = 0.01
SECONDS_PER_STEP = 0.0
SECONDS_PER_STATE = 0.0
"""What a step and a recurrent state are said to cost besides."""

RUBBISH = -2
"""What a slot holds that was written for nobody."""
_EMPTY = -1
_LONGEST = 4096
_POWERS = np.random.default_rng(0).integers(1, 2**63, _LONGEST, dtype=np.uint64) | np.uint64(1)
_IDS = np.arange(VOCABULARY, dtype=np.uint64)


@dataclass
class Clock:
    """Stands for the `time` module: nothing takes time but the steps of a toy backend."""

    now: float = 0.0

    def perf_counter(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now


@dataclass(frozen=True)
class ToyChunk:
    """A `Chunk` as it was when its step was launched."""

    state: SequenceState
    tokens: IntArray
    past: int
    rows: int
    marks: tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """What a step was asked to compute; `size` includes padding."""

    chunks: tuple[ToyChunk, ...]
    size: int

    @property
    def tokens(self) -> int:
        return sum(len(chunk.tokens) for chunk in self.chunks)


class Toy:
    """A deterministic `Backend` whose steps take `SECONDS_PER_TOKEN` of the clock's time for each token."""

    vocab_size = VOCABULARY
    longest_token = 6
    fingerprint = "toy"
    exact = True
    largest_draft: int | None = None
    queues = False
    store: Any

    def __init__(self, clock: Clock | None = None) -> None:
        self.steps: list[Step] = []
        self.before_step: Callable[[], None] = lambda: None
        """Called at the start of each step on the engine's thread; what it raises is how the step fails."""
        self.before_choice: Callable[[], None] = lambda: None
        """The same, for each time that tokens are chosen."""
        self.before_arrival: Callable[[], None] = lambda: None
        """Called before what is exported is on the host, by who waits for it; what it raises is how the copy fails."""
        self.violations: list[str] = []
        self.events: list[str] = []
        """What was asked of steps, and of copies that are exported, in order."""
        self.cost = StepCost(
            StepMeasurements(
                tuple((size, SECONDS_PER_STEP + size * SECONDS_PER_TOKEN) for size in STEP_SIZES),
                per_state=SECONDS_PER_STATE,
            ),
            smallest_chunk=2,
        )
        self._clock = clock or Clock()
        self.latest: ToyTicket | None = None

    def launch(self, chunks: Sequence[Chunk]) -> "ToyTicket":
        chunks = [ToyChunk(c.state, c.tokens.copy(), c.past, c.rows, c.marks) for c in chunks]
        self.events.append("launched")
        self.latest = ToyTicket(self, chunks, self.latest if self.latest is not None and not self.latest.done else None)
        return self.latest

    def compute(self, chunks: Sequence[ToyChunk]) -> FloatArray:
        """The logits of a step."""
        size = padded(sum(max(2, len(chunk.tokens)) for chunk in chunks))
        self.steps.append(Step(tuple(chunks), size))
        self._clock.now += size * SECONDS_PER_TOKEN
        self.before_step()
        with self.watching():
            assert chunks, "a step has something to compute"
            assert len({id(chunk.state) for chunk in chunks}) == len(chunks), "a step has one chunk of a sequence"
            for chunk in chunks:
                self._check(chunk)
            for chunk in chunks:
                self.write(chunk)
            rows = [row for chunk in chunks for row in toy_logits(self.read(chunk), chunk.rows)]
            for chunk in chunks:
                self.advance(chunk)
        return np.array(rows, np.float32).reshape(len(rows), self.vocab_size)

    def exported(self, blob: Blob) -> Exported:
        """A copy that arrives late."""

        def wait() -> Blob:
            self.before_arrival()
            self.events.append("arrived")
            return blob

        self.events.append("exported")
        return Exported(blob.nbytes, wait)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Remember what was asked for against the contract, for nobody may see the error."""
        try:
            yield
        except AssertionError as error:
            self.violations.append(str(error))
            raise

    def _check(self, chunk: ToyChunk) -> None:
        count = len(chunk.tokens)
        assert count >= 1, "a chunk has a token"
        assert chunk.tokens.dtype == np.int32
        assert 0 <= chunk.tokens.min() <= chunk.tokens.max() < self.vocab_size, "tokens are in the vocabulary"
        assert 0 <= chunk.rows <= count, "rows are wanted of tokens that are computed"
        assert chunk.state.length == chunk.past, "a state changes in a step alone, or when it is rewound"

    def advance(self, chunk: ToyChunk) -> None:
        """Let the state know that it has the chunk's tokens."""
        chunk.state.length += len(chunk.tokens)

    def write(self, chunk: ToyChunk) -> None:
        """Take the chunk's tokens into memory."""
        raise NotImplementedError

    def read(self, chunk: ToyChunk) -> IntArray:
        """All tokens up to the chunk's last, read back from memory."""
        raise NotImplementedError

    def contents(self, state: Any) -> list[int]:
        """What a state holds."""
        raise NotImplementedError


class ToyTicket:
    """Computes when it is waited for: nothing that it reads may change before. If it is queued, when it's launched."""

    def __init__(self, backend: Toy, chunks: list[ToyChunk], behind: "ToyTicket | None") -> None:
        self._backend = backend
        self._chunks = chunks
        self._logits: FloatArray | None = None
        self._behind = behind
        self._error: Exception | None = None
        self.done = False
        self.queued = backend.queues and not any(chunk.rows for chunk in chunks)
        with backend.watching():
            assert behind is None or behind.queued, "a step is launched behind a queued one alone"
            assert behind is None or behind._behind is None or behind._behind.done, "two steps are under way at most"
        if self.queued:
            try:
                self._compute()
            except Exception as error:
                self._error = error
                for chunk in chunks:
                    backend.advance(chunk)

    def wait(self, rows: Sequence[Row] = ()) -> list[Choice]:
        with self._backend.watching():
            assert not self.done, "a ticket is waited for once"
            assert self._behind is None or self._behind.done, "steps are waited for in order"
        self.done = True
        self._backend.events.append("waited")
        if self._error is not None:
            for chunk in self._chunks:
                chunk.state.length = min(chunk.state.length, chunk.past)
            raise self._error
        if not self.queued:
            self._compute()
        return self.choose(rows) if rows else []

    def _compute(self) -> None:
        if self._behind is not None and self._behind._error is not None:
            raise RuntimeError("the step before failed")
        self._logits = self._backend.compute(self._chunks)

    def choose(self, rows: Sequence[Row]) -> list[Choice]:
        self._backend.before_choice()
        with self._backend.watching():
            assert self._backend.latest is self, "a step's rows are chosen before the next is launched"
            assert self._logits is not None, "tokens are chosen when the step is done"
            assert all(0 <= row.index < len(self._logits) for row in rows), "rows are the step's"
            return [row.choose(self._logits[row.index].copy()) for row in rows]


class ToyBackend(Toy):
    """With keys and values in blocks, and rubbish in the slot after a chunk's last token."""

    def __init__(self, num_blocks: int, block_size: int = 4, clock: Clock | None = None) -> None:
        super().__init__(clock)
        self.block_size = block_size
        self.num_blocks = num_blocks
        self._slots = np.full((num_blocks + 1, block_size), _EMPTY)
        self.store: Any = self._blocks(PagedState, num_blocks, block_size)

    def _blocks(self, kind: type[PagedState], num_blocks: int, block_bytes: int) -> PagedStore[Any]:
        size = self.block_size
        return PagedStore(self, kind, num_blocks=num_blocks, block_size=size, block_bytes=block_bytes, spare=1)

    def copy_block(self, source: int, target: int) -> None:
        self._slots[target] = self._slots[source]

    def read_blocks(self, blocks: IntArray) -> Exported:
        return self.exported(self._slots[blocks].astype(np.int16).view(np.uint16))

    def write_blocks(self, blocks: IntArray, contents: Blob) -> None:
        self._slots[blocks] = contents.view(np.int16)

    def write(self, chunk: ToyChunk) -> None:
        table = self._table(chunk)
        end = chunk.past + len(chunk.tokens)
        assert len(table) * self.block_size > end, "there is room for one more token"
        assert 1 <= table.min() <= table.max() <= self.num_blocks, "blocks are the store's"
        assert len(set(table.tolist())) == len(table), "a table names a block once"
        for position, token in zip(range(chunk.past, end), chunk.tokens, strict=True):
            self._slots[table[position // self.block_size], position % self.block_size] = token
        self._slots[table[end // self.block_size], end % self.block_size] = RUBBISH

    def read(self, chunk: ToyChunk) -> IntArray:
        tokens = self._slots[self._table(chunk)].ravel()[: chunk.past + len(chunk.tokens)]
        assert tokens.min() > _EMPTY, "all slots that are read were computed"
        assert np.array_equal(tokens[chunk.past :], chunk.tokens), "no two chunks write to one slot"
        return tokens

    def contents(self, state: PagedState) -> list[int]:
        tokens: list[int] = self._slots[state.block_table].ravel()[: state.length].tolist()
        return tokens

    def _table(self, chunk: ToyChunk) -> IntArray:
        assert isinstance(chunk.state, PagedState)
        return chunk.state.block_table


class QueueToy(ToyBackend):
    """Whose device does one thing after the other."""

    queues = True


class InexactToy(ToyBackend):
    """Whose logits depend on the size of their step."""

    exact = False

    def compute(self, chunks: Sequence[ToyChunk]) -> FloatArray:
        logits = super().compute(chunks)
        return logits + np.float32(0.01) * (self.steps[-1].size % 3) * np.arange(VOCABULARY, dtype=np.float32)


class CheckpointState(SequenceState):
    """A recurrent state, which is all tokens so far, and copies of it as it was every so many tokens."""

    __slots__ = ("checkpoints", "evictable", "reserved", "tokens")

    def __init__(self, reserved: int, every: int) -> None:
        self.length = 0
        self.reserved = reserved
        self.room = reserved - every
        self.evictable = False
        self.tokens: tuple[int, ...] = ()
        self.checkpoints: dict[int, tuple[int, ...]] = {}


class CheckpointStore:
    """A `Store` of states that can be cut at a checkpoint alone. States share no memory."""

    bytes_per_token = 1

    def __init__(self, memory: int, every: int) -> None:
        self.every = every
        self.capacity = memory - 2 * every
        self._memory = memory
        self._states: dict[CheckpointState, None] = {}

    @property
    def free(self) -> int:
        return self._memory - self.held(self._states)

    @property
    def evictable(self) -> int:
        return self.held(state for state in self._states if state.evictable)

    def open(self, room: int) -> CheckpointState:
        self._require(self.open_cost(room))
        self._states[state := CheckpointState(self.open_cost(room), self.every)] = None
        return state

    def fork(self, state: CheckpointState, length: int, room: int) -> CheckpointState:
        self._require(cost := self.fork_cost(state, length, room))
        self._states[child := CheckpointState(cost, self.every)] = None
        child.length, child.tokens, child.checkpoints = state.length, state.tokens, dict(state.checkpoints)
        self.rewind(child, length)
        return child

    def reserve(self, state: CheckpointState, room: int) -> None:
        self._require(cost := self.reserve_cost(state, room))
        state.reserved += cost
        state.room = state.reserved - self.every

    def reach(self, state: CheckpointState, length: int) -> int:
        kept = (0, *state.checkpoints, state.length)
        return max(at for at in kept if at <= length)

    def keeps_draft(self, state: CheckpointState, count: int, draft: int, marks: Sequence[int]) -> bool:
        return draft == 0

    def rewind(self, state: CheckpointState, length: int) -> int:
        if length < state.length:
            state.length = max((at for at in state.checkpoints if at <= length), default=0)
            state.tokens = state.checkpoints.get(state.length, ())
            state.checkpoints = {at: kept for at, kept in state.checkpoints.items() if at <= state.length}
        return state.length

    def trim(self, state: CheckpointState) -> None:
        state.reserved = self.open_cost(state.length)
        state.room = state.reserved - self.every

    def release(self, state: CheckpointState) -> None:
        del self._states[state]

    def set_evictable(self, state: CheckpointState, evictable: bool) -> None:
        state.evictable = evictable

    def open_cost(self, room: int) -> int:
        return (-(-room // self.every) + 1) * self.every

    def fork_cost(self, state: CheckpointState, length: int, room: int) -> int:
        return self.open_cost(max(room, min(length, state.length)))

    def reserve_cost(self, state: CheckpointState, room: int) -> int:
        return max(0, self.open_cost(room) - state.reserved)

    def cut_cost(self, state: CheckpointState, length: int, room: int) -> int:
        return self.open_cost(max(room, length)) - state.reserved

    def held(self, states: Iterable[CheckpointState]) -> int:
        return sum(state.reserved for state in states)

    def spans(self, start: int, end: int) -> Iterator[Span]:
        yield Span(start, end, end)

    def aligned(self, start: int) -> int:
        return 0

    def export(self, state: CheckpointState, start: int, end: int) -> Exported:
        return Exported.here(np.array(state.tokens[:end], np.uint16))

    def install(self, state: CheckpointState, end: int, blob: Blob) -> None:
        state.length, state.tokens = end, tuple(blob.tolist())
        state.checkpoints = {end: state.tokens}

    def check(self, states: Iterable[CheckpointState]) -> None:
        assert set(states) == set(self._states), "a state is lost, or was released"
        assert all(state.reserved >= state.length for state in self._states)
        assert self.held(self._states) <= self._memory

    def _require(self, size: int) -> None:
        if size > self.free:
            raise OutOfMemoryError("no memory left")


class CheckpointToy(Toy):
    """With recurrent states, which can be rewound to checkpoints alone."""

    def __init__(self, memory: int = 4096, every: int = 5, clock: Clock | None = None) -> None:
        super().__init__(clock)
        self.store = CheckpointStore(memory, every)

    def write(self, chunk: ToyChunk) -> None:
        state = chunk.state
        assert isinstance(state, CheckpointState)
        assert state.reserved >= chunk.past + len(chunk.tokens), "there is room for the tokens"
        assert len(state.tokens) == chunk.past
        for token in chunk.tokens.tolist():
            state.tokens += (token,)
            if len(state.tokens) % self.store.every == 0:
                state.checkpoints[len(state.tokens)] = state.tokens

    def read(self, chunk: ToyChunk) -> IntArray:
        assert isinstance(chunk.state, CheckpointState)
        return np.array(chunk.state.tokens, np.int32)

    def contents(self, state: CheckpointState) -> list[int]:
        assert len(state.tokens) == state.length
        return list(state.tokens)


class ToyStates:
    """The memory of recurrent states of two words."""

    def __init__(self, num_slots: int, slot_bytes: int) -> None:
        self.slot_bytes = slot_bytes
        self.allocate(num_slots)

    def allocate(self, num_slots: int) -> None:
        self._words = np.zeros((num_slots, 2), np.uint16)

    def copy(self, source: int, target: int) -> None:
        self._words[target] = self._words[source]

    def read(self, slot: int) -> Blob:
        return self._words[slot].copy()

    def write(self, slot: int, content: Blob) -> None:
        self._words[slot] = content[:2]


class HybridToy(ToyBackend):
    """With keys and values in blocks, and recurrent states in slots: how many tokens there were, and a hash of them."""

    def __init__(self, num_blocks: int, block_size: int = 4, interval: int = 8, clock: Clock | None = None) -> None:
        super().__init__(num_blocks, block_size, clock)
        self.states = ToyStates(FIRST_SLOT + num_blocks, slot_bytes=2 * block_size)
        self._plans: dict[SequenceState, Slots] = {}
        kv = self._blocks(HybridState, num_blocks, 2 * block_size)
        self.store = HybridStore(kv, self.states, first_slot=FIRST_SLOT, interval=interval)

    def write(self, chunk: ToyChunk) -> None:
        super().write(chunk)
        count = len(chunk.tokens)
        plan = self.store.plan(chunk.state, count, rows=chunk.rows, marks=chunk.marks)
        self._plans[chunk.state] = plan
        table = self._table(chunk)
        for (part,) in StepClass((_LONGEST,), (_LONGEST,)).cut([PagedChunk(chunk.tokens, chunk.past, table, 0, plan)]):
            padded = [*part.tokens.tolist(), *[0] * (2 - len(part.tokens))]
            self._run(padded, **slot_inputs([(part.past, len(padded), part.slots)]))

    def advance(self, chunk: ToyChunk) -> None:
        self.store.commit(chunk.state, self._plans.pop(chunk.state))

    def contents(self, state: PagedState) -> list[int]:
        assert isinstance(state, HybridState)
        tokens = super().contents(state)
        for length, slot in state.kept.items():
            assert self.states.read(slot).tolist() == _recurrent(tokens[:length])
        return tokens

    def _run(self, tokens: list[int], **inputs: IntArray) -> None:
        """What the runtime's operators do with a chunk: see `tests/engine/test_recurrent_operators.py`."""
        source, *targets = inputs["la.block_indices"].tolist()
        assert len(set(targets)) == len(targets), "a slot is written once"
        assert source not in targets[1:], "a slot that is read may be the first to be written, no other"
        state = self.states.read(source).tolist()
        offset, interval = int(inputs["la.past_lens"][0]), int(inputs["la.cache_interval"][0])
        for done, token in enumerate(tokens, start=1):
            state = _recurrent([token], state)
            if (offset + done) % interval == 0 or done == len(tokens):
                self.states.write(targets.pop(0), np.array(state, np.uint16))
        assert not targets, "there is a state for each slot"


class WindowToy(ToyBackend):
    """With two more tables, of layers that see the last few tokens: their blocks hold other numbers for tokens."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int = 4,
        window: int = 5,
        longest_chunk: int = STEP_SIZES[-1],
        clock: Clock | None = None,
        *,
        has_full_attention: bool = True,
    ) -> None:
        super().__init__(num_blocks, block_size, clock)
        self.window = window
        self._rows: dict[SequenceState, IntArray] = {}
        self.store = WindowStore(
            self._blocks(WindowState, num_blocks, block_size),
            window=window,
            tables=2,
            longest_chunk=longest_chunk,
            has_full_attention=has_full_attention,
        )

    def write(self, chunk: ToyChunk) -> None:
        super().write(chunk)
        rows = self._rows[chunk.state] = self.store.plan(chunk.state, len(chunk.tokens), chunk.marks).copy()
        end = chunk.past + len(chunk.tokens)
        for position, token in zip(range(chunk.past, end + 1), (*chunk.tokens, RUBBISH), strict=True):
            row = rows[position // self.block_size]
            assert row.min() > 0, "there is a row for each token that is computed"
            self._slots[row, position % self.block_size] = token + _OF_TABLE

    def read(self, chunk: ToyChunk) -> IntArray:
        tokens = super().read(chunk)
        self._look(self._rows.pop(chunk.state), tokens, max(0, chunk.past + 1 - self.window))
        return tokens

    def contents(self, state: PagedState) -> list[int]:
        assert isinstance(state, WindowState)
        tokens = super().contents(state)
        self._look(state.rows, np.array(tokens, np.int32), max(0, state.length + 1 - self.window))
        held = np.flatnonzero(state.rows[: state.length // self.block_size, 0]) * self.block_size
        for first in held.tolist():
            self._look(state.rows, np.array(tokens[: first + self.block_size], np.int32), first)
        return tokens

    def _look(self, rows: IntArray, tokens: IntArray, first: int) -> None:
        """Assert that rows hold the tokens from `first` on: that none was given back, and taken by others."""
        positions = np.arange(first, len(tokens))
        seen = rows[positions // self.block_size]
        assert seen.min(initial=1) > 0, "a row that a window sees was given back"
        found = self._slots[seen, positions[:, None] % self.block_size]
        assert np.array_equal(found, tokens[first:, None] + _OF_TABLE), "a row that a window sees was overwritten"


_OF_TABLE = np.array([1000, 2000])
"""What is added to tokens in blocks of the first and of the second table."""


def _recurrent(tokens: Iterable[int], state: Iterable[int] = (0, 0)) -> list[int]:
    count, hashed = state
    for token in tokens:
        count, hashed = count + 1, (hashed * 31 + token + 1) % 2**16
    return [count, hashed]


def toy_logits(tokens: IntArray, rows: int = 1) -> FloatArray:
    """Logits after each of the last `rows` tokens, float32 [rows, vocabulary].

    Mostly a hash of the last token, so that answers repeat themselves and drafts come true; and a little of all tokens,
    so that none can be wrong unnoticed.
    """
    terms = (tokens.astype(np.uint64) + np.uint64(1)) * _POWERS[: len(tokens)]
    all_before = terms.cumsum(dtype=np.uint64)[len(tokens) - rows :]
    last = tokens[len(tokens) - rows :].astype(np.uint64)
    return 6 * _uniform(last) + 2 * _uniform(all_before)


def _uniform(seeds: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> FloatArray:
    """Hashes of each seed and each token of the vocabulary, in 0 to 1 (SplitMix64)."""
    mixed = (seeds[:, None] + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + _IDS * np.uint64(0xD1342543DE82EF95)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return (mixed >> np.uint64(40)).astype(np.float32) / np.float32(2**24)


def padded(tokens: int) -> int:
    index = bisect.bisect_left(STEP_SIZES, tokens)
    return STEP_SIZES[index] if index < len(STEP_SIZES) else tokens


class ToyTokenizer:
    """As much of a tokenizer as the engine uses; the last two tokens are halves of `é`."""

    vocab_size = VOCABULARY
    longest_token = 6
    _bytes = (
        b"<stop>",
        *(bytes([byte]) for byte in b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTU"),
        b"\xc3",
        b"\xa9",
    )

    def token_bytes(self, id: int) -> bytes:
        return self._bytes[id]

    def is_special(self, id: int) -> bool:
        return id == STOP

    def is_control(self, id: int) -> bool:
        return id == STOP

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(self._bytes[id] for id in ids if id != STOP).decode(errors="replace")
