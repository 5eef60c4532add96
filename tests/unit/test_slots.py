"""Where steps find recurrent states and leave others: what is planned, and what the operators then write."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from slipstream.backend.slots import EMPTY_SLOT, FIRST_SLOT, Slots, slot_inputs, writes


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
    first, rest = slots.cut(100)
    assert (first, rest) == (Slots(50, ((64, 51), (100, 52))), Slots(52, ((130, 53),)))
    first, rest = slots.cut(90)
    assert (first, rest) == (Slots(50, ((64, 51), (90, 53))), Slots(53, ((100, 52), (130, 53))))
