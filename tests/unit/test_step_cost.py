"""The cost of a step: read off what was measured, and moved by what steps really took."""

from collections.abc import Collection

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.backend import Load, StepCost, StepMeasurements

POINTS = ((2, 0.010), (8, 0.016), (32, 0.040), (128, 0.200))
PER_CONTEXT = 2e-6
PER_PAIR = 1e-7
PER_STATE = 1e-3


def cost_model(change: float = 0.0, prepared: Collection[int] = ()) -> StepCost:
    return StepCost(
        StepMeasurements(POINTS, change, PER_CONTEXT, PER_PAIR, PER_STATE),
        smallest_chunk=2,
        prepared=lambda: prepared,
    )


def seconds(tokens: int, *, past: int = 0, cost: StepCost | None = None) -> float:
    return (cost or cost_model()).seconds(Load(tokens, past, tokens * past))


@pytest.mark.parametrize(("tokens", "expected"), POINTS)
def test_a_measured_size_costs_what_was_measured(tokens: int, expected: float) -> None:
    assert seconds(tokens) == pytest.approx(expected)


@pytest.mark.parametrize(("tokens", "expected"), [(1, 0.010), (5, 0.016), (20, 0.040), (80, 0.200)])
def test_other_sizes_cost_what_they_are_padded_to(tokens: int, expected: float) -> None:
    assert seconds(tokens) == pytest.approx(expected)


def test_above_the_largest_size_the_cost_grows_in_proportion() -> None:
    assert seconds(256) == pytest.approx(0.400)


def test_a_context_costs_once_a_sequence_and_once_a_token() -> None:
    assert seconds(8, past=1000) == pytest.approx(0.016 + 1000 * PER_CONTEXT + 8 * 1000 * PER_PAIR)


def test_padding_looks_back_on_nothing() -> None:
    assert seconds(8, past=1000) - seconds(5, past=1000) == pytest.approx(3 * 1000 * PER_PAIR)


def test_the_load_of_a_step_is_that_of_its_chunks() -> None:
    cost = cost_model()
    load = cost.load([(10, 100), (1, 50)])
    assert load == Load(tokens=10 + 2, context=150, pairs=10 * 100 + 2 * 50, states=1 + 2)
    load = cost.longer(load, 1, 50)
    assert load == Load(tokens=10 + 2, context=150, pairs=10 * 100 + 2 * 50, states=1 + 2), "it was padded to two"
    longer = Load(tokens=11 + 2, context=150, pairs=11 * 100 + 2 * 50, states=2 + 2)
    assert cost.longer(load, 10, 100) == longer
    assert cost.longer(load, 10, 100, kept=False) == longer._replace(states=1 + 2)
    assert cost.load([(10, 100)]) + cost.load([(1, 50)]) == cost.load([(10, 100), (1, 50)])


def test_a_step_s_own_state_is_part_of_its_size_s_cost() -> None:
    for states, expected in ((0, 0.016), (1, 0.016), (5, 0.020)):
        assert cost_model().seconds(Load(8, states=states)) == pytest.approx(expected)


def test_what_a_state_costs_is_learned_for_other_sizes_too() -> None:
    cost = cost_model()
    for _ in range(300):
        cost.observe(Load(8, states=21), (), 0.060)
    assert cost.seconds(Load(8, states=21)) == pytest.approx(0.060, rel=0.01)
    assert cost.seconds(Load(32, states=21)) > 0.063
    assert seconds(32, cost=cost) == seconds(32)


@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 8000), st.integers(0, 8000))
def test_more_tokens_and_longer_contexts_never_cost_less(first: int, second: int, past: int, longer: int) -> None:
    least = seconds(min(first, second), past=min(past, longer))
    assert least <= seconds(max(first, second), past=max(past, longer))


@pytest.mark.parametrize(("tokens", "size"), [(1, 2), (2, 2), (3, 8), (8, 8), (9, 32), (128, 128), (129, 129)])
def test_counts_are_padded_to_the_next_measured_size(tokens: int, size: int) -> None:
    assert cost_model().rounded(tokens) == size


def test_a_size_that_is_not_prepared_costs_more() -> None:
    for prepared, expected in (({8}, 0.016), ({2, 8}, 0.016), ({2}, 0.021), ((), 0.016)):
        assert seconds(5, cost=cost_model(change=0.005, prepared=prepared)) == pytest.approx(expected)


@pytest.mark.parametrize("factor", [0.1, 0.5, 1.7, 5.0])
@pytest.mark.parametrize("tokens", [2, 32, 128])
@pytest.mark.parametrize("past", [0, 3000])
def test_a_repeated_observation_is_learned(tokens: int, factor: float, past: int) -> None:
    cost = cost_model()
    observed = seconds(tokens, past=past) * factor
    for _ in range(300):
        cost.observe(Load(tokens, past, tokens * past), (), observed)
    assert seconds(tokens, past=past, cost=cost) == pytest.approx(observed, rel=0.01)


def test_what_a_context_costs_is_learned_for_other_sizes_too() -> None:
    cost = cost_model()
    for _ in range(300):
        cost.observe(Load(8, 5000, 8 * 5000), (), seconds(8, past=5000) * 2)
    assert seconds(32, past=5000, cost=cost) > 1.1 * seconds(32, past=5000)
    assert seconds(32, cost=cost) == seconds(32)


def test_what_a_change_of_size_costs_is_not_learned_as_the_size_s_own() -> None:
    cost = cost_model(change=0.005)
    for _ in range(100):
        cost.observe(Load(32), (2,), 0.045)
        cost.observe(Load(2), (32,), 0.015)
    assert seconds(32, cost=cost) == pytest.approx(0.040)
    assert seconds(2, cost=cost) == pytest.approx(0.010)


def test_an_observation_without_context_moves_the_size_that_it_was_padded_to_and_no_other() -> None:
    cost = cost_model()
    cost.observe(Load(20), (), 0.060)
    assert seconds(32, cost=cost) > 0.040
    assert [seconds(size, cost=cost) for size in (2, 8, 128)] == [0.010, 0.016, 0.200]


def test_an_observation_above_the_largest_size_is_learned() -> None:
    cost = cost_model()
    for _ in range(150):
        cost.observe(Load(512), (), 1.2)
    assert seconds(512, cost=cost) == pytest.approx(1.2, rel=0.01)


def test_one_hiccup_hardly_moves_the_cost() -> None:
    cost = cost_model()
    cost.observe(Load(32), (), 30.0)
    assert seconds(32, cost=cost) == pytest.approx(0.040, rel=0.11)


@pytest.mark.parametrize(
    ("time", "past", "tokens"),
    [(0.015, 0, 2), (0.016, 0, 8), (0.039, 0, 8), (0.040, 0, 32), (0.040, 2000, 8), (9.0, 0, 128), (0.0, 0, 2)],
)
def test_the_largest_size_within_a_time_depends_on_the_context(time: float, past: int, tokens: int) -> None:
    assert cost_model().largest_within(time, past) == tokens


def test_what_was_learned_decides_what_fits() -> None:
    cost = cost_model()
    for _ in range(150):
        cost.observe(Load(32), (), 0.09)
    assert cost.largest_within(0.05, 0) == 8
    assert cost.largest == 128


def test_a_token_costs_more_in_a_longer_context() -> None:
    cost = cost_model()
    assert cost.token(0) == pytest.approx(0.190 / 126)
    assert cost.token(4000) == pytest.approx(0.190 / 126 + 4000 * PER_PAIR)


def test_a_chunk_has_room_beside_what_a_step_has_to_compute_anyway() -> None:
    cost = cost_model()
    load = cost.load([(1, 100)] * 4)
    room = cost.room_beside(load, 0.05, 10)
    assert room > 0
    assert cost.seconds(load + cost.load([(room, 10)])) <= 0.05
    next_size = cost.rounded(load.tokens + room + 1)
    assert cost.seconds(load + cost.load([(next_size - load.tokens, 10)])) > 0.05
    assert cost.room_beside(load, cost.seconds(load), 10) == 0
    assert cost.seconds(load, again=True) <= cost.seconds(load)
