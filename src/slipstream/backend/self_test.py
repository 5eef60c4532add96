"""Which step sizes give a token the same bits on this machine: found out by comparing them, not assumed.

A step's size chooses the kernels of its matrix products, and so the order of their sums. The test puts the same few
tokens, with the same context of several blocks, into steps of every candidate size, in several places and beside other
sequences, and sorts the sizes by the bits that come out. The same is done for the number of logit rows, which chooses
the kernel of the projection to the vocabulary. The class that serves best is then tried on whole sequences.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np

from slipstream.backend.slots import EMPTY_SLOT, FIRST_SLOT, Slots
from slipstream.backend.step_cost import StepMeasurements
from slipstream.backend.steps import (
    BLOCK_SIZE,
    LONE_TOKEN_SIZE,
    SCRATCH_BLOCK,
    PagedChunk,
    Runner,
    StepClass,
    lay_out,
    pieces,
    run,
)
from slipstream.types import FloatArray, IntArray

# Few sizes, since the runtime prepares each apart; close enough that padding is at most an eighth of a large step. With
# AVX2 alone, sizes that are no multiple of 8 may give other bits; from 96 on, all do. Zen 4 has other bits up to 4.
SIZES = (2, 5, 8, 16, 24, 32, 40, 48, 56, 64, *range(80, 256, 16), *range(256, 513, 64))
ROW_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128)
OF_PROCESSORS = StepClass(SIZES, ROW_COUNTS)

PROBE_BLOCKS = 5
"""KV blocks that a probe takes, at most."""
SELF_TEST_BLOCKS = 1 + PROBE_BLOCKS + 3 * (3 + 1)
"""KV blocks that the test overwrites, the scratch block among them."""
PROBE_SLOTS = 1
SELF_TEST_SLOTS = FIRST_SLOT + PROBE_SLOTS + 2
"""Slots that the test overwrites where there are recurrent states, those for scratch among them."""

_NEEDED = 64
"""Larger sizes are tried as long as there is time: they make prompts of large models a little faster."""
_USABLE = 4
"""How many times as long a turn may take in steps of one class as in steps of any size: exact, but no slower."""
_PATIENCE = 5.0
"""Seconds after which no larger size is tried."""
_TIMED_SECONDS, _LEAST_ROUNDS, _MOST_ROUNDS = 1.0, 3, 10
"""How long sizes are timed, and how often: a tiny model's step takes less than other work's slice of time."""
_CONTEXT = 2 * BLOCK_SIZE + 6
WITNESS_CONTEXT = 6
"""Tokens of context where no class is looked for, but a known one confirmed: a large model takes seconds for more."""
_PROBE = 13
"""Tokens that follow the context, of which the first two are compared."""
_PROBED_SIZE = 16
_PROBED_ROWS = 8
_FOR_CONTEXT = StepClass((8, 64), (_PROBED_ROWS,))
"""What a context is computed in while no class is known."""
_SEQUENCE = 3 * BLOCK_SIZE + 5
_SEED = 20


@dataclass(frozen=True, slots=True)
class Trial:
    """What came of a step: the bits of the probed tokens, and how long it took, its preparation included."""

    bits: bytes | None
    """None if the same token came out differently within one step."""
    seconds: float


def find_step_class(runner: Runner, progress: Callable[[float], None] = lambda _: None) -> StepClass | None:
    """The step class that serves best of those that keep their bits, or None if none does; overwrites blocks."""
    probe = Probe(runner, first_block=1)
    sizes = try_sizes(probe, runner.candidates.sizes, progress)
    row_classes = sorted(classes(try_row_counts(probe, runner.candidates.row_counts)), key=_passes_for_rows)
    any_size = tuple(sizes)
    seconds = _seconds(probe, {end for each in (any_size, *classes(sizes)) for end in (each[0], each[-1])})

    def turn(size_class: Sequence[int]) -> float:
        return StepMeasurements(tuple((size, seconds[size]) for size in (size_class[0], size_class[-1]))).turn

    usable = [each for each in classes(sizes) if turn(each) <= _USABLE * turn(any_size)]
    for size_class in sorted(usable, key=turn):
        for row_class in row_classes:
            if holds(runner, found := StepClass(size_class, row_class)):
                return found
    return None


def classes(trials: Mapping[int, Trial]) -> list[tuple[int, ...]]:
    """The candidates by the bits that they gave, each class rising; those without bits of their own are left out."""
    found: dict[bytes, list[int]] = {}
    for candidate, trial in trials.items():
        if trial.bits is not None:
            found.setdefault(trial.bits, []).append(candidate)
    return [tuple(each) for each in found.values()]


def holds(runner: Runner, step_class: StepClass) -> bool:
    """Whether a sequence keeps its bits, logits and KV, however it is cut, forked and batched in steps of the class."""
    trial = _SequenceTrial(runner, step_class)
    expected = trial.bits()
    end = _SEQUENCE
    cuts = ([end - 1], [BLOCK_SIZE], [end // 2 + 1], range(end - 5, end), [3, 4, 40, 41, 43, 90])
    return (
        all(trial.bits(cuts=cut) == expected for cut in cuts)
        and all(trial.bits(cuts=[end // 3, end - 1], beside=count) == expected for count in (1, 7, 30))
        and trial.bits(cuts=[end - 8], rows=8) == expected
        and trial.bits(forked_at=end // 2) == expected
    )


def try_row_counts(probe: "Probe", counts: Sequence[int]) -> dict[int, Trial]:
    """A trial of each number of logit rows, in steps of one size."""
    return {count: probe.trial(_PROBED_SIZE, count, tokens=1) for count in counts}


def try_sizes(probe: "Probe", sizes: Sequence[int], progress: Callable[[float], None]) -> dict[int, Trial]:
    """A trial of each step size, all with as many rows, until time is up."""
    trials: dict[int, Trial] = {}
    started = time.perf_counter()
    for done, size in enumerate(sizes, start=1):
        if size > _NEEDED and time.perf_counter() - started > _PATIENCE:
            break
        trials[size] = probe.trial(size, _PROBED_ROWS)
        progress(done / len(sizes))
    return trials


def _seconds(probe: "Probe", sizes: Iterable[int]) -> dict[int, float]:
    """What steps take of sizes that were tried before: the first step of a size has to prepare it, for ten times that.

    Other work of the machine makes a step look slower, never faster, so the least of some rounds counts, the more the
    shorter they are, and none takes more than a larger one.
    """
    falling = sorted(sizes, reverse=True)
    found = dict.fromkeys(falling, math.inf)
    for done in range(_MOST_ROUNDS):
        if done >= _LEAST_ROUNDS and done * 2 * sum(found.values()) > _TIMED_SECONDS:
            break
        for size in falling:
            found[size] = min(found[size], *(probe.trial(size, _PROBED_ROWS).seconds for _ in range(2)))
    return dict(zip(falling, accumulate(found.values(), min), strict=True))


def _passes_for_rows(row_class: Sequence[int]) -> tuple[int, int]:
    """Passes of the steps that want one, some and many rows, and then how many rows are padded to at least."""
    return sum(-(-rows // row_class[-1]) for rows in (1, 8, 64)), row_class[0]


class Probe:
    """A few tokens after a context, to be computed in steps of any size: at the front, in the middle, at the end.

    Each place has a fork of the context: its full blocks shared, the partial one copied. It doesn't matter in which
    steps the context is computed, as long as all trials see the same; those of a class all give the same.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        first_block: int,
        slot: int = FIRST_SLOT,
        step_class: StepClass = _FOR_CONTEXT,
        context: int = _CONTEXT,
    ) -> None:
        self._runner = runner
        self._slots = Slots(slot, ())
        self._past = context
        tokens = _random_tokens(runner, context + _PROBE, seed=_SEED)
        self._tokens = tokens[context:]
        # All alike, for a mixture's expert may get all tokens of a step.
        self._others = np.full(runner.candidates.sizes[-1], self._tokens[0])
        *shared, partial = range(first_block, first_block + context // BLOCK_SIZE + 1)
        self._tables = [np.array([*shared, own], np.int32) for own in range(partial, partial + 3)]
        slots = Slots(EMPTY_SLOT, ((context, slot),))
        step_class.run(runner, [PagedChunk(tokens[:context], 0, self._tables[0], 0, slots)])
        for table in self._tables[1:]:
            _copy(runner, partial, int(table[-1]))

    def witness(self, step_class: StepClass) -> str | None:
        """A digest of what the class computes, by its smallest and its largest step; None if these differ."""
        found = {self._digest(step_class.sizes[side], step_class.row_counts[side]) for side in (0, -1)}
        return found.pop() if len(found) == 1 else None

    def agrees(self, size: int, row_count: int, witness: str) -> bool:
        """Whether steps of one more kind compute what a witness stands for."""
        return self._digest(size, row_count) == witness

    def _digest(self, size: int, row_count: int) -> str | None:
        bits = self.trial(size, row_count, tokens=1).bits
        return hashlib.sha256(bits).hexdigest() if bits is not None else None

    def trial(self, size: int, row_count: int, tokens: int = 2) -> Trial:
        """Run a step of that size and that many rows of logits, and compare the rows of the first probed `tokens`."""
        chunks, places = self._step(size)
        runner = self._runner
        inputs = lay_out(chunks, size, row_count, recurrent=runner.states is not None, windows=runner.window_tables)
        rows = [(begin + index, index) for index in range(tokens) for begin, count in places if index < count]
        rows = [rows[number % len(rows)] for number in range(row_count)]
        inputs["logit_rows"] = np.array([row for row, _ in rows], np.int64)
        started = time.perf_counter()
        logits = run(runner, inputs)
        seconds = time.perf_counter() - started
        seen: list[set[bytes]] = [set() for _ in range(tokens)]
        for row, (_, index) in zip(logits, rows, strict=True):
            seen[index].add(row.tobytes())
        bits = b"".join(each for one in seen for each in one) if all(len(one) == 1 for one in seen) else None
        return Trial(bits, seconds)

    def _step(self, size: int) -> tuple[list[PagedChunk], list[tuple[int, int]]]:
        """PagedChunks that fill a step, and where in it and how long the probed ones are."""
        if size < 4 * LONE_TOKEN_SIZE:
            return [self._chunk(0, size)], [(0, size)]
        left = size - 2 * LONE_TOKEN_SIZE
        middle = min(_PROBE, left - left // 3)
        filling = left - middle
        if filling < 2 * LONE_TOKEN_SIZE:
            middle, filling = min(_PROBE, left), left - min(_PROBE, left)
        before = filling // 2 if filling >= 2 * LONE_TOKEN_SIZE else 0
        chunks = [self._chunk(0, 2), self._filler(before), self._chunk(1, middle), self._filler(filling - before)]
        places = [(0, 2), (2 + before, middle), (size - LONE_TOKEN_SIZE, 1)]
        return [chunk for chunk in (*chunks, self._chunk(2, 1)) if len(chunk.tokens)], places

    def _chunk(self, fork: int, count: int) -> PagedChunk:
        return PagedChunk(self._tokens[:count], self._past, self._tables[fork], 0, self._slots)

    def _filler(self, count: int) -> PagedChunk:
        """Tokens of no sequence at all, to be computed beside the others."""
        table = np.full(count // BLOCK_SIZE + 1, SCRATCH_BLOCK, np.int32)
        return PagedChunk(self._others[:count], 0, table, 0)


class _SequenceTrial:
    """A sequence to be computed from its start, in one way or another."""

    def __init__(self, runner: Runner, step_class: StepClass) -> None:
        self._runner = runner
        self._class = step_class
        self._tokens = _random_tokens(runner, _SEQUENCE, seed=_SEED + 2)
        self._others = _random_tokens(runner, _SEQUENCE, seed=_SEED + 3)
        blocks = _SEQUENCE // BLOCK_SIZE + 1
        self._table, self._fork, self._other_table = (
            np.arange(first, first + blocks, dtype=np.int32)
            for first in range(1 + PROBE_BLOCKS, SELF_TEST_BLOCKS, blocks)
        )
        self._slot, self._fork_slot = range(FIRST_SLOT + PROBE_SLOTS, SELF_TEST_SLOTS)

    def bits(
        self, *, cuts: Iterable[int] = (), beside: int = 0, rows: int = 1, forked_at: int | None = None
    ) -> tuple[bytes, bytes]:
        """The last token's logits, and the KV of the full blocks with the recurrent state, if there is one.

        The sequence is computed in chunks that end at `cuts`, each beside `beside` tokens of another sequence, the last
        with `rows` rows of logits; or beyond `forked_at`, and from there on again in a fork.
        """
        table, start, source, slot = self._table, 0, EMPTY_SLOT, self._slot
        if forked_at is not None:
            beyond = range(forked_at + _PROBE)
            self._compute(beyond, table, 0, 0, Slots(source, ((forked_at, self._fork_slot), (beyond.stop, slot))))
            source = self._fork_slot
            full = forked_at // BLOCK_SIZE
            _copy(self._runner, int(table[full]), int(self._fork[full]))
            table = np.concatenate((table[:full], self._fork[full:]))
            start = forked_at
        for begin, end in pairwise([start, *(cut for cut in cuts if cut > start), _SEQUENCE]):
            slots = Slots(source, ((end, slot),))
            logits = self._compute(range(begin, end), table, rows if end == _SEQUENCE else 0, beside, slots)
            source = slot
        blocks = pieces(table[: _SEQUENCE // BLOCK_SIZE], self._runner.window_tables)
        kv = self._runner.read_blocks(blocks.ravel()).wait().tobytes()
        state = self._runner.states.read(slot).tobytes() if self._runner.states is not None else b""
        return logits[-1].tobytes(), kv + state

    def _compute(self, span: range, table: IntArray, rows: int, beside: int, slots: Slots) -> FloatArray:
        chunks = [PagedChunk(self._others[:beside], 0, self._other_table, 1)] if beside else []
        tokens = self._tokens[span.start : span.stop]
        chunks.append(PagedChunk(tokens, span.start, table, min(rows, len(span)), slots))
        return self._class.run(self._runner, chunks)


def _copy(runner: Runner, source: int, target: int) -> None:
    """Copy a block, in the tables of all layers."""
    for pair in zip(*pieces(np.array([source, target]), runner.window_tables).tolist(), strict=True):
        runner.copy_block(*pair)


def _random_tokens(runner: Runner, count: int, *, seed: int) -> IntArray:
    return np.random.default_rng(seed).integers(0, runner.vocab_size, count).astype(np.int32)
