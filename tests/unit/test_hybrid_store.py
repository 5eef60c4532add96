"""Keys, values and recurrent states of a sequence: which states are kept, what they take, and how far it goes back."""

import pytest

from slipstream.backend import Chunk
from slipstream.backend.hybrid_store import MARKS, HybridState
from slipstream.backend.slots import fit_one_step
from tests.conformance.stores import carry_over, compute, ids
from tests.unit.toy_backend import HybridToy

INTERVAL = 8


@pytest.fixture
def toy() -> HybridToy:
    return HybridToy(500, interval=INTERVAL)


def opened(toy: HybridToy, length: int, room: int = 100) -> HybridState:
    state: HybridState = toy.store.open(room)
    compute(toy, state, ids([token % 40 + 1 for token in range(length)]))
    return state


def draft(toy: HybridToy, state: HybridState, count: int) -> None:
    """Compute a token, and `count` drafted ones along."""
    toy.launch([Chunk(state, ids([7] * (1 + count)), 1 + count)]).wait()


def test_a_fork_begins_at_the_nearest_state(toy: HybridToy) -> None:
    state = opened(toy, 30)
    assert [toy.store.reach(state, length) for length in (30, 29, 24, 23, 8, 7)] == [30, 24, 24, 16, 8, 0]
    fork = toy.store.fork(state, 27, 60)
    assert fork.length == 24
    assert toy.contents(fork) == toy.contents(state)[:24]


def test_states_at_intervals_are_shared_and_take_no_more_memory(toy: HybridToy) -> None:
    state = opened(toy, 30)
    free = toy.store.free
    forks = [toy.store.fork(state, 24, 0) for _ in range(5)]
    assert toy.store.free == free
    toy.store.check([state, *forks])


def test_a_rejected_draft_is_taken_back_without_computing_anything_again(toy: HybridToy) -> None:
    for confirmed in range(6):
        state = opened(toy, 13)
        draft(toy, state, 5)
        assert toy.store.rewind(state, 14 + confirmed) == 14 + confirmed
        assert len(toy.contents(state)) == 14 + confirmed
        toy.store.release(state)


def test_states_of_a_draft_are_given_back_with_the_next_step(toy: HybridToy) -> None:
    state = opened(toy, 13)
    compute(toy, state, ids([7]))
    free = toy.store.free
    draft(toy, state, 12)
    toy.store.rewind(state, 15)
    compute(toy, state, ids([7]))
    assert toy.store.free == free


def test_without_memory_for_them_a_draft_is_taken_back_to_the_step_before(toy: HybridToy) -> None:
    state = opened(toy, 13, room=60)
    others = []
    while toy.store.free >= toy.store.open_cost(1):
        others.append(toy.store.open(1))
    draft(toy, state, 30)
    assert 13 <= toy.store.rewind(state, 14) <= 14
    toy.store.check([state, *others])


def test_it_is_said_beforehand_whether_a_draft_can_be_taken_back(toy: HybridToy) -> None:
    state = opened(toy, 13, room=60)
    assert toy.store.keeps_draft(state, 1, 30, ())
    others = []
    while toy.store.free >= toy.store.open_cost(1):
        others.append(toy.store.open(1))
    assert not toy.store.keeps_draft(state, 1, 30, ())
    possible = max(count for count in range(30) if toy.store.keeps_draft(state, 1, count, ()))
    draft(toy, state, possible)
    assert toy.store.rewind(state, 14) == 14
    toy.store.check([state, *others])


def test_no_step_is_cut_for_the_sake_of_a_draft() -> None:
    """A prompt's last chunk would be: it leaves a state before its last token, too, and intervals are equal."""
    toy = HybridToy(1000, interval=64)
    for count, kept in ((5, True), (40, False)):
        state: HybridState = toy.store.open(200)
        marks = (count - 1,)
        assert toy.store.keeps_draft(state, count, 6, marks) == kept
        plan = toy.store.plan(state, count + 6, rows=7, marks=marks)
        assert fit_one_step(0, [at for at, _ in plan.kept])
        assert marks[0] in dict(plan.kept), "from there it's answered again"
        toy.store.commit(state, plan)
        assert toy.store.rewind(state, count + 2) == (count + 2 if kept else marks[0])
        toy.store.release(state)


def test_where_a_turn_ended_a_fork_may_begin(toy: HybridToy) -> None:
    state = opened(toy, 13)
    for length in (21, 30, 37):
        toy.store.trim(state)
        toy.store.set_evictable(state, True)
        toy.store.set_evictable(state, False)
        toy.store.reserve(state, 100)
        compute(toy, state, ids([3] * (length - state.length)))
    assert [toy.store.reach(state, length) for length in (15, 22, 31, 36)] == [13, 21, 30, 32]


def test_older_marks_make_room(toy: HybridToy) -> None:
    state = opened(toy, 1)
    marked = [length for length in range(3, 60, 3) if length % INTERVAL]
    for length in marked:
        toy.launch([Chunk(state, ids([3] * (length + 1 - state.length)), 0, (length,))]).wait()
    toy.store.trim(state)
    kept = [length for length in state.kept if length % INTERVAL]
    assert kept[-MARKS - 1 :] == [*marked[-MARKS:], state.length]
    older = kept[: -MARKS - 1]
    assert older == [6, 12, 21, 30, 36]
    assert all(length - toy.store.reach(state, length - 1) >= toy.store.gap for length in older)


def test_a_message_that_ends_apart_has_the_state_at_the_end_of_the_block_before(toy: HybridToy) -> None:
    """Those lie evenly, so that the operators write them in one step; a prompt's last token has its own, if odd."""
    ends = (5, 6, 13, 14, 23, 47, 63, 77, 78, 99)
    for marks, last in ((ends, []), ((*ends, 109), [109])):
        state: HybridState = toy.store.open(200)
        toy.launch([Chunk(state, ids([token % 40 + 1 for token in range(110)]), 1, marks)]).wait()
        toy.store.trim(state)
        assert [length for length in state.kept if length % INTERVAL] == [4, 12, 20, 44, 60, 76, *last, 110]
        assert toy.contents(state)
        assert [toy.store.reach(state, length) for length in (100, 79, 63)] == [96, 76, 60]
        toy.store.release(state)


def test_no_step_is_cut_for_the_sake_of_messages() -> None:
    toy = HybridToy(4000, block_size=32, interval=64)
    state: HybridState = toy.store.open(600)
    plan = toy.store.plan(state, 512, rows=0, marks=tuple(range(45, 500, 45)))
    kept = [at for at, _ in plan.kept]
    assert fit_one_step(0, kept)
    assert set(range(32, 480, 64)) & set(kept)
    toy.store.commit(state, plan)


def test_older_marks_make_room_for_the_sequence_itself(toy: HybridToy) -> None:
    toy = HybridToy(80, interval=INTERVAL)
    state: HybridState = toy.store.open(1)
    marked = range(5, 1000, INTERVAL)
    while toy.store.reserve_cost(state, state.length + INTERVAL) <= toy.store.free:
        toy.store.reserve(state, state.length + INTERVAL)
        at = marked[state.length // INTERVAL]
        toy.launch([Chunk(state, ids([3] * INTERVAL), 0, (at,))]).wait()
        toy.store.check([state])
    assert state.length + INTERVAL > toy.store.capacity
    assert len(state.marks) <= MARKS + 1


def test_a_drafts_states_make_room_for_the_sequence_itself(toy: HybridToy) -> None:
    state: HybridState = toy.store.open(42)
    marks = tuple(range(5, 29, INTERVAL))
    toy.launch([Chunk(state, ids([3] * 29), 1, marks)]).wait()
    draft(toy, state, 12)
    others = []
    while toy.store.free >= toy.store.open_cost(1):
        others.append(toy.store.open(1))
    room = max(room for room in range(42, 200) if toy.store.reserve_cost(state, room) <= toy.store.free)
    toy.store.reserve(state, room)
    assert state.room >= room > 42
    toy.store.check([state, *others])


def test_a_cut_costs_what_it_takes_with_older_marks(toy: HybridToy) -> None:
    state: HybridState = toy.store.open(200)
    toy.launch([Chunk(state, ids([3] * 110), 1, tuple(range(5, 110, INTERVAL)))]).wait()
    toy.store.trim(state)
    for asked, room in ((90, 150), (63, 63), (40, 120)):
        length = toy.store.reach(state, asked)
        cost, free = toy.store.cut_cost(state, length, room), toy.store.free
        toy.store.rewind(state, length)
        toy.store.trim(state)
        toy.store.reserve(state, room)
        assert free - toy.store.free == cost
        toy.store.trim(state)


def test_what_was_exported_brings_its_states_along(toy: HybridToy) -> None:
    state = opened(toy, 30)
    copy = toy.store.open(30)
    carry_over(toy.store, state, copy, 0, 30)
    assert toy.contents(copy) == toy.contents(state)
    assert [toy.store.reach(copy, length) for length in (29, 23)] == [24, 16]


def test_a_part_goes_on_where_the_last_one_ended(toy: HybridToy) -> None:
    state = opened(toy, 13)
    copy = toy.store.open(23)
    carry_over(toy.store, state, copy, 0, 13)
    compute(toy, state, ids([5] * 10))
    carry_over(toy.store, state, copy, 13, 23)
    assert toy.contents(copy) == toy.contents(state)
    assert toy.store.reach(copy, 15) == 13


def test_capacity_is_what_fits_with_states(toy: HybridToy) -> None:
    store = toy.store
    assert store.open_cost(store.capacity) <= store.free < store.open_cost(store.capacity + 1)
