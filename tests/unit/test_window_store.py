"""Layers with windows: which rows a sequence keeps, what they take, and how far it goes back."""

import pytest

from slipstream.backend import Chunk, OutOfMemoryError
from slipstream.backend.window_store import WindowState
from tests.conformance.stores import carry_over, compute, ids
from tests.unit.toy_backend import WindowToy

BLOCK, CHUNK = 4, 8
INTERVAL = 4 * 2 * 2 * BLOCK
"""Four times as many tokens as have blocks of one table for what two tables keep, of a window of two blocks."""


@pytest.fixture
def toy() -> WindowToy:
    return WindowToy(1000, longest_chunk=CHUNK)


def extend(toy: WindowToy, state: WindowState, length: int, marks: tuple[int, ...] = ()) -> None:
    """Compute tokens up to a length, in chunks as long as they may be."""
    while state.length < length:
        count = min(CHUNK, length - state.length)
        within = tuple(at for at in marks if state.length < at <= state.length + count)
        toy.launch([Chunk(state, ids([state.length % 40 + 1] * count), 0, within)]).wait()


def opened(toy: WindowToy, length: int, marks: tuple[int, ...] = (), room: int = 450) -> WindowState:
    state: WindowState = toy.store.open(room)
    extend(toy, state, length, marks)
    return state


def rows(state: WindowState) -> int:
    """How many rows it holds."""
    return int((state.rows[:, 0] > 0).sum()) + len(state.spare)


def test_rows_that_nobody_needs_are_given_back(toy: WindowToy) -> None:
    assert toy.store.interval == INTERVAL
    state = opened(toy, 431)
    toy.store.trim(state)
    assert rows(state) == 2 * (431 // INTERVAL) + 3, "of two each at intervals, and those that a window sees at the end"
    assert len(state.block_table) == 108
    assert 1000 * BLOCK - toy.store.free == (108 + 2 * rows(state)) * BLOCK == toy.store.held([state])


@pytest.mark.parametrize("every", [5, 1000])
def test_a_sequence_never_takes_more_than_it_was_promised(toy: WindowToy, every: int) -> None:
    state: WindowState = toy.store.open(900)
    assert 1000 * BLOCK - toy.store.free < 226 * 3 * BLOCK * 0.6, "which is less than all blocks would be"
    others = []
    for length in range(1, 900, 7):
        while toy.store.free >= toy.store.open_cost(1):
            others.append(toy.store.open(1))
        extend(toy, state, length, tuple(range(0, length, every)))
        toy.store.check([state, *others])
        assert state.room >= 900


def test_it_can_be_taken_up_at_its_end_at_intervals_and_at_marks(toy: WindowToy) -> None:
    state = opened(toy, 431, marks=(10, 301))
    toy.store.trim(state)
    reached = {length: toy.store.reach(state, length) for length in (431, 428, 427, 370, 310, 302, 130, 60, 7)}
    assert reached == {431: 431, 428: 428, 427: 384, 370: 320, 310: 304, 302: 302, 130: 128, 60: 12, 7: 7}
    fork = toy.store.fork(state, 310, 350)
    assert fork.length == 304, "the block of a mark is full"
    assert toy.contents(fork) == toy.contents(state)[:304]
    assert toy.store.reach(fork, 100) == 64


def test_of_many_marks_the_first_and_the_latest_are_kept(toy: WindowToy) -> None:
    state = opened(toy, 431, marks=(10, *range(70, 350, 30), 380))
    toy.store.trim(state)
    assert state.marks[0] == 10
    assert 380 in state.marks
    assert not {100, 160, 220} & set(state.marks)
    assert rows(state) <= 2 * (431 // INTERVAL) + 3 + 6


def test_where_a_turn_ended_it_can_be_taken_up_again(toy: WindowToy) -> None:
    state = opened(toy, 203)
    toy.store.trim(state)
    toy.store.set_evictable(state, True)
    toy.store.set_evictable(state, False)
    toy.store.reserve(state, 300)
    extend(toy, state, 290)
    assert toy.store.reach(state, 210) == 204


def test_a_rejected_draft_is_taken_back_without_computing_anything_again(toy: WindowToy) -> None:
    for confirmed in range(6):
        state = opened(toy, 101 + confirmed)
        length = state.length
        assert toy.store.keeps_draft(state, 1, 6, ())
        toy.launch([Chunk(state, ids([7] * 7), 7)]).wait()
        assert toy.store.rewind(state, length + 1 + confirmed) == length + 1 + confirmed
        assert len(toy.contents(state)) == length + 1 + confirmed
        toy.store.release(state)


def test_forks_share_rows_and_copy_the_one_that_is_not_full(toy: WindowToy) -> None:
    state = opened(toy, 431)
    toy.store.trim(state)
    free = toy.store.free
    fork = toy.store.fork(state, 431, 0)
    assert free - toy.store.free == (1 + 2) * BLOCK
    assert toy.store.fork_cost(state, 428, 0) == 0
    toy.store.release(state)
    assert toy.contents(fork)


def test_a_sequence_that_was_forked_goes_on_with_what_it_was_promised(toy: WindowToy) -> None:
    state = opened(toy, 101)
    forks = [toy.store.fork(state, 101, 200), toy.store.fork(state, 101, 0)]
    others = []
    while toy.store.free >= toy.store.open_cost(1):
        others.append(toy.store.open(1))
    extend(toy, state, 399)
    extend(toy, forks[0], 199)
    toy.store.check([state, *forks, *others])
    assert len(toy.contents(forks[1])) == 101


def test_without_memory_for_copies_a_rewind_goes_back_to_where_they_begin(toy: WindowToy) -> None:
    toy = WindowToy(44, longest_chunk=CHUNK)
    state = opened(toy, 30, (24,), room=30)
    toy.store.trim(state)
    fork = toy.store.fork(state, 28, 0)
    while toy.store.free:
        toy.store._kv.pool.take(1)
    assert toy.store.rewind(state, 27) == 24
    assert len(toy.contents(fork)) == 28


def test_a_chunk_longer_than_promised_takes_what_is_free(toy: WindowToy) -> None:
    state: WindowState = toy.store.open(400)
    compute(toy, state, ids([3] * 390))
    extend(toy, state, 400)
    toy.store.check([state])
    small = WindowToy(170, longest_chunk=CHUNK)
    state = small.store.open(300)
    with pytest.raises(OutOfMemoryError):
        compute(small, state, ids([3] * 300))


def test_a_cut_costs_what_it_takes(toy: WindowToy) -> None:
    state = opened(toy, 431, marks=(203, 301, 380))
    toy.store.trim(state)
    fork = toy.store.fork(state, 320, 0)
    for asked, room in ((430, 450), (301, 301), (250, 380), (200, 200), (100, 120)):
        length = toy.store.reach(state, asked)
        cost, free = toy.store.cut_cost(state, length, room), toy.store.free
        assert toy.store.rewind(state, length) == length
        toy.store.trim(state)
        toy.store.reserve(state, room)
        assert free - toy.store.free == cost
        toy.store.trim(state)
    toy.store.check([state, fork])


def test_what_was_exported_brings_its_rows_along(toy: WindowToy) -> None:
    state = opened(toy, 130)
    copy = toy.store.open(200)
    taken = carry_over(toy.store, state, copy, 0, 130)
    assert taken == 16 + 16 + 1 + 2 * (2 + 2 + 1), "blocks, and rows at the ends of two intervals and of the rest"
    assert toy.contents(copy) == toy.contents(state)
    assert [toy.store.reach(copy, length) for length in (129, 100)] == [129, 64]
    extend(toy, state, 150)
    carry_over(toy.store, state, copy, 130, 150)
    assert toy.contents(copy) == toy.contents(state)
    assert toy.store.reach(copy, 149) == 149
    assert toy.store.reach(copy, 131) == 128
    toy.store.trim(copy)
    assert toy.store.reach(copy, 135) == 128, "the block of the end before isn't full, and its rest isn't there"
    toy.store.check([state, copy])


def test_capacity_is_what_fits_with_rows(toy: WindowToy) -> None:
    store = toy.store
    assert store.open_cost(store.capacity) <= store.free < store.open_cost(store.capacity + 1)
    assert store.capacity > 1000 * BLOCK * 0.75, "rows at intervals take a fourth of the rest"


def test_a_short_sequence_takes_no_more_than_its_tokens(toy: WindowToy) -> None:
    assert toy.store.open_cost(11) == 3 * 3 * BLOCK
    assert toy.store.open_cost(0) == 3 * BLOCK
