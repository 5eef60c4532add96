"""The step class: what is found on processors of many kinds, and how chunks become steps of it. Needs no model."""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.backend import Exported, calibration, self_test
from slipstream.backend.logits import HostLogits
from slipstream.backend.self_test import (
    OF_PROCESSORS,
    PROBE_BLOCKS,
    ROW_COUNTS,
    SELF_TEST_BLOCKS,
    SIZES,
    Probe,
    find_step_class,
)
from slipstream.backend.steps import BLOCK_SIZE, PagedChunk, StepClass, StepInputs
from slipstream.types import IntArray
from tests.processors import AVX2, AVX2_NARROW, NO_CLASS, ZEN_4, Emulated
from tests.unit.toy_backend import VOCABULARY, Clock, toy_logits


def step_seconds(size: int) -> float:
    """What a toy's step takes; the clock adds it up without rounding, so times don't depend on when they were taken."""
    return 2.0**-7 + 2.0**-11 * size


class ToyRunner:
    """Computes any step exactly: its KV slots hold tokens, and logits are a hash of what is read back from them."""

    vocab_size = VOCABULARY
    states = None
    window_tables = window = 0
    candidates = OF_PROCESSORS
    queues = False
    clock = Clock()

    def __init__(self, num_blocks: int = SELF_TEST_BLOCKS) -> None:
        self.slots = np.zeros((num_blocks, BLOCK_SIZE), np.int32)
        self.sizes: list[int] = []

    def start(self, inputs: StepInputs) -> None:
        self.started = inputs

    def finish(self) -> HostLogits:
        inputs = self.started
        begins, tables = inputs["subsequence_begins"], inputs["block_indices_begins"]
        self.sizes.append(len(inputs["input_ids"]))
        self.clock.now += step_seconds(len(inputs["input_ids"]))
        assert begins[-1] == len(inputs["input_ids"])
        rows = np.empty((len(inputs["input_ids"]), VOCABULARY), np.float32)
        for index, past in enumerate(inputs["past_lens"]):
            tokens = inputs["input_ids"][begins[index] : begins[index + 1]]
            table = inputs["block_indices"][tables[index] : tables[index + 1]]
            places = np.arange(past, past + len(tokens))
            assert np.array_equal(inputs["position_ids"][begins[index] : begins[index + 1]], places)
            self.slots[table[places // BLOCK_SIZE], places % BLOCK_SIZE] = tokens
            seen = self.slots[table].ravel()[: past + len(tokens)]
            rows[begins[index] : begins[index + 1]] = toy_logits(seen, len(tokens))
        return HostLogits(rows[inputs["logit_rows"]])

    def copy_block(self, source: int, target: int) -> None:
        self.slots[target] = self.slots[source]

    def read_blocks(self, blocks: IntArray) -> Exported:
        return Exported.here(self.slots[blocks].astype(np.uint16))


class Leaky(ToyRunner):
    """A processor on which a sequence's bits depend on how many others are computed beside it."""

    def finish(self) -> HostLogits:
        return HostLogits(super().finish().host() + np.float32(len(self.started["past_lens"]) > 2) * np.float32(1e-6))


class Mixed(ToyRunner):
    """A mixture on a processor on which an expert that gets more than 80 tokens of a step gives other bits."""

    def finish(self) -> HostLogits:
        crowded = np.bincount(self.started["input_ids"]).max() > 80
        return HostLogits(super().finish().host() + np.float32(crowded) * np.float32(1e-6))


class Unhurried(ToyRunner):
    """A machine that takes seconds for the first step of a size, and has other work during every third step."""

    def finish(self) -> HostLogits:
        size = len(self.started["input_ids"])
        before = self.clock.now
        prepared = size in self.sizes
        logits = super().finish()
        self.clock.now += (0 if prepared else 2) + (9 * (self.clock.now - before) if len(self.sizes) % 3 == 0 else 0)
        return logits


class Interrupted(ToyRunner):
    """A machine that has other work from some step on, for a while, and little time for this one's."""

    def __init__(self, begin: int) -> None:
        super().__init__()
        self._busy = range(begin, begin + 12)

    def finish(self) -> HostLogits:
        before = self.clock.now
        logits = super().finish()
        self.clock.now += 99 * (self.clock.now - before) if len(self.sizes) in self._busy else 0
        return logits


@pytest.fixture(autouse=True)
def _only_steps_take_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_test, "time", ToyRunner.clock)


def split(counts: Sequence[int], bounds: Sequence[int]) -> list[tuple[int, ...]]:
    edges = [0, *bounds, math.inf]
    groups = [tuple(count for count in counts if low < count <= high) for low, high in pairwise(edges)]
    return [group for group in groups if group]


@pytest.mark.parametrize("rows", [(), (1,), (1, 6), (1, 6, 80)], ids=str)
@pytest.mark.parametrize("sizes", [(), AVX2, AVX2_NARROW, (40, 200), (8,)], ids=str)
def test_the_classes_put_in_are_found(sizes: tuple[int, ...], rows: tuple[int, ...]) -> None:
    probe = Probe(Emulated(ToyRunner(), sizes=sizes, rows=rows), first_block=1)
    found = self_test.classes(self_test.try_sizes(probe, SIZES, lambda _: None))
    assert sorted(found) == split(SIZES, sizes)
    found = self_test.classes(self_test.try_row_counts(probe, ROW_COUNTS))
    assert sorted(found) == split(ROW_COUNTS, rows)


@pytest.mark.parametrize("rows", [(), (1,), (1, 6, 80)], ids=str)
@pytest.mark.parametrize("sizes", [(), AVX2, AVX2_NARROW], ids=str)
def test_a_class_that_was_put_in_is_taken(sizes: tuple[int, ...], rows: tuple[int, ...]) -> None:
    found = find_step_class(Emulated(ToyRunner(), sizes=sizes, rows=rows))
    assert found is not None
    assert found.sizes in split(SIZES, sizes)
    assert found.row_counts in split(ROW_COUNTS, rows)
    assert found.sizes[0] <= 8, "a step that decodes one token is small"
    assert found.sizes[-1] >= 64, "a prompt is computed in large steps"
    assert found.row_counts[-1] >= 64, "a step that decodes for many has its rows at once"


def test_a_class_of_small_steps_is_taken_however_slow_they_were_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_test, "_PATIENCE", 100.0)
    found = find_step_class(Emulated(Unhurried(), sizes=AVX2))
    assert found is not None
    assert found.sizes == tuple(size for size in SIZES if 2 <= size <= 80)


def test_no_class_is_ruled_out_by_what_the_machine_did_for_a_while() -> None:
    runner = ToyRunner()
    find_step_class(Emulated(runner, sizes=ZEN_4))
    for begin in range(0, len(runner.sizes), 3):
        found = find_step_class(Emulated(Interrupted(begin), sizes=ZEN_4))
        assert found is not None, f"busy from step {begin} on"
        assert found.sizes[0] == 5


def test_a_step_is_said_to_take_what_it_takes_once_it_is_prepared_and_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "time", ToyRunner.clock)
    measured = calibration.measure(Unhurried(), StepClass((2, 8, 16, 32, 64, 80), (8,)), lambda _: None)
    assert dict(measured.seconds) == {size: step_seconds(size) for size in (2, 8, 16, 32, 64, 80)}


def test_a_class_has_no_size_in_which_an_expert_may_get_too_many_tokens() -> None:
    found = find_step_class(Mixed())
    assert found is not None
    assert found.sizes[-1] < 112


@pytest.mark.parametrize(
    "runner", [Emulated(ToyRunner(), places=True), Leaky()], ids=["by place in a step", "by neighbours"]
)
def test_where_nothing_keeps_its_bits_there_is_no_class(runner: ToyRunner) -> None:
    assert find_step_class(runner) is None


def test_sizes_that_all_differ_leave_one_of_them() -> None:
    found = find_step_class(Emulated(ToyRunner(), sizes=NO_CLASS))
    assert found is not None
    assert len(found.sizes) == 1


def test_larger_sizes_are_tried_as_long_as_there_is_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_test, "_PATIENCE", 0.0)
    found = find_step_class(ToyRunner())
    assert found is not None
    assert found.sizes == tuple(size for size in SIZES if size <= 64)


def test_a_witness_is_of_the_bits() -> None:
    step_class = StepClass((8, 16), (8, 16))
    runner = ToyRunner(1 + 2 * PROBE_BLOCKS)
    witness = Probe(runner, first_block=1).witness(step_class)
    assert witness is not None
    assert Probe(runner, first_block=1 + PROBE_BLOCKS).witness(step_class) == witness
    assert Probe(Emulated(ToyRunner(), sizes=(12,)), first_block=1).witness(step_class) is None
    other = Probe(Emulated(ToyRunner()), first_block=1)
    assert other.witness(step_class) not in (None, witness)
    assert not other.agrees(8, 8, witness)


@st.composite
def chunks_and_class(draw: st.DrawFn) -> tuple[list[PagedChunk], StepClass]:
    sizes = sorted(draw(st.sets(st.integers(2, 40), min_size=1, max_size=4)))
    rows = sorted(draw(st.sets(st.integers(1, 20), min_size=1, max_size=3)))
    chunks = []
    for index in range(draw(st.integers(1, 6))):
        count, past = draw(st.integers(1, 90)), 0
        tokens = np.array(draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=count, max_size=count)), np.int32)
        chunks.append(PagedChunk(tokens, past, np.arange(1 + 4 * index, 5 + 4 * index), draw(st.integers(0, count))))
    return chunks, StepClass(tuple(sizes), tuple(rows))


@given(chunks_and_class())
def test_whatever_the_class_all_is_computed_in_steps_of_it(case: tuple[list[PagedChunk], StepClass]) -> None:
    chunks, step_class = case
    runner = ToyRunner(1 + 4 * 6)
    logits = step_class.run(runner, chunks)
    expected = [toy_logits(chunk.tokens, chunk.rows) for chunk in chunks]
    assert np.array_equal(logits, np.concatenate(expected))
    assert set(runner.sizes) <= set(step_class.sizes)
    for step in step_class.cut(chunks):
        assert sum(chunk.rows for chunk in step) <= step_class.row_counts[-1]


def test_what_fits_is_one_step() -> None:
    chunks = [PagedChunk(np.zeros(count, np.int32), 0, np.arange(1, 3), 1) for count in (1, 5, 3)]
    assert list(StepClass((8, 16), (1, 4)).cut(chunks)) == [chunks]


def test_a_runner_says_which_sizes_are_worth_a_trial() -> None:
    runner = ToyRunner()
    runner.candidates = StepClass((16, 64, 256, 1024), (16, 64))
    assert find_step_class(runner) == runner.candidates
    assert {*runner.sizes} <= {8, *runner.candidates.sizes}, "and 8 for what comes before"
    runner = Leaky()
    runner.candidates = StepClass((16, 64), (16,))
    found = calibration.calibrate(runner, lambda _: None)
    assert not found.exact
    assert found.step_class == runner.candidates, "of which some step is the fastest"
