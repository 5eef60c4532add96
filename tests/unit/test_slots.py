"""Where steps find recurrent states and leave others: what is planned, and what the operators then write."""

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from slipstream.backend.slots import EMPTY_SLOT, FIRST_SLOT, Slots, slot_inputs, writes
from slipstream.backend.steps import PagedChunk, StepClass


@given(past=st.integers(0, 40), size=st.integers(1, 40), data=st.data())
def test_what_is_kept_is_written_and_nothing_else(past: int, size: int, data: st.DataObject) -> None:
    inner = data.draw(st.sets(st.integers(1, size)))
    kept = [(past + place, FIRST_SLOT + place) for place in sorted({*inner, size})]
    plan = writes(past, size, kept)
    slots = list(plan.slots)
    written = {
        past + done: slots.pop(0)
        for done in range(1, size + 1)
        if (plan.offset + done) % plan.interval == 0 or done == size
    }
    assert not slots
    assert {at: slot for at, slot in written.items() if slot is not None} == dict(kept)


def test_neighbouring_states_take_no_others() -> None:
    """Those after each token of a draft, for example."""
    assert writes(70, 5, [(72 + index, FIRST_SLOT + index) for index in range(4)]).unwanted == 1
    assert writes(70, 500, [(128, 40), (256, 41), (384, 42), (512, 43), (570, 44)]).unwanted == 0
    assert writes(70, 80, [(149, 40), (150, 41)]).unwanted == 0


def test_a_dummy_second_token_leaves_no_trace() -> None:
    inputs = slot_inputs([(9, 2, Slots(40, ((10, 41),)))])
    assert inputs["la.block_indices"].tolist() == [40, 41, 1]
    offset, interval = int(inputs["la.past_lens"][0]), int(inputs["la.cache_interval"][0])
    assert [(offset + done) % interval == 0 for done in (1, 2)] == [True, False]


def test_what_nobody_wants_goes_to_slots_of_its_own() -> None:
    """For the operators write no slot twice."""
    inputs = slot_inputs([(0, 6, Slots(EMPTY_SLOT, ((2, 40), (3, 41), (6, 42)))), (0, 2, None), (0, 9, None)])
    tables, begins = inputs["la.block_indices"].tolist(), inputs["la.block_indices_begins"].tolist()
    targets = [slot for begin, end in pairwise(begins) for slot in tables[begin + 1 : end]]
    assert len(set(targets)) == len(targets)
    assert EMPTY_SLOT not in targets
    assert {slot for slot in targets if slot >= FIRST_SLOT} == {40, 41, 42}


def test_the_second_part_of_a_cut_chunk_reads_what_the_first_leaves() -> None:
    slots = Slots(50, ((64, 51), (100, 52), (130, 53)))
    first, rest = slots.cut(100, 33)
    assert (first, rest) == (Slots(50, ((64, 51), (100, 52))), Slots(52, ((130, 53),)))
    first, rest = slots.cut(90, 33)
    assert (first, rest) == (Slots(50, ((64, 51), (90, 33))), Slots(33, ((100, 52), (130, 53))))


@given(data=st.data())
def test_however_chunks_are_cut_each_part_finds_its_state_and_no_step_reads_what_it_writes(data: st.DataObject) -> None:
    chunks: list[PagedChunk] = []
    content: dict[int, tuple[int, int]] = {}
    free = iter(range(FIRST_SLOT, 10_000))
    for number in range(data.draw(st.integers(1, 4))):
        past, size = data.draw(st.integers(0, 40)), data.draw(st.integers(1, 120))
        lengths = data.draw(st.sets(st.integers(past + 1, past + size), max_size=6)) | {past + size}
        source = next(free) if past else EMPTY_SLOT
        content[source] = number, past
        slots = Slots(source, tuple((length, next(free)) for length in sorted(lengths)))
        rows = data.draw(st.integers(0, min(size, 5)))
        chunks.append(PagedChunk(np.full(size, number, np.int32), past, np.empty(0, np.int32), rows, slots))
    for step in StepClass((8, 64), (1, 8)).cut(chunks):
        parts = [(part.past, max(2, len(part.tokens)), part.slots) for part in step]
        inputs = slot_inputs(parts)
        tables = np.split(inputs["la.block_indices"], inputs["la.block_indices_begins"][1:-1])
        targets = [slot for table in tables for slot in table[1:].tolist()]
        assert len(set(targets)) == len(targets)
        for part, table in zip(step, tables, strict=True):
            source, number = int(table[0]), int(part.tokens[0])
            assert source not in targets or source == table[1], "the operators refuse that"
            assert source == EMPTY_SLOT or content[source] == (number, part.past)
        for part in step:
            assert part.slots is not None
            content |= {slot: (int(part.tokens[0]), length) for length, slot in part.slots.kept}
    for number, chunk in enumerate(chunks):
        assert chunk.slots is not None
        assert all(content[slot] == (number, length) for length, slot in chunk.slots.kept)
