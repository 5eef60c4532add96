"""The cost curve of a step: read between its points, and moved by what steps really took."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.backend import StepMeasurements
from slipstream.engine.step_cost import StepCost

POINTS = ((2, 0.010), (8, 0.016), (32, 0.040), (128, 0.200))


def curve(change: float = 0.0) -> StepCost:
    return StepCost(StepMeasurements(POINTS, change))


@pytest.mark.parametrize(("tokens", "seconds"), POINTS)
def test_a_measured_size_costs_what_was_measured(tokens: int, seconds: float) -> None:
    assert curve().seconds(tokens) == pytest.approx(seconds)


@pytest.mark.parametrize(("tokens", "seconds"), [(5, 0.013), (20, 0.028), (80, 0.120)])
def test_between_two_sizes_the_cost_lies_on_a_straight_line(tokens: int, seconds: float) -> None:
    assert curve().seconds(tokens) == pytest.approx(seconds)


def test_below_the_smallest_size_the_cost_is_that_of_the_smallest() -> None:
    assert curve().seconds(1) == pytest.approx(0.010)


def test_above_the_largest_size_the_cost_grows_in_proportion() -> None:
    assert curve().seconds(256) == pytest.approx(0.400)


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 300))
def test_more_tokens_never_cost_less(first: int, second: int) -> None:
    assert curve().seconds(min(first, second)) <= curve().seconds(max(first, second))


@pytest.mark.parametrize(("tokens", "size"), [(1, 2), (2, 2), (3, 8), (8, 8), (9, 32), (128, 128), (129, 129)])
def test_counts_are_padded_to_the_next_measured_size(tokens: int, size: int) -> None:
    assert curve().rounded(tokens) == size


def test_a_step_pays_for_its_padding_and_for_a_change_of_size() -> None:
    cost = curve(change=0.005)
    assert cost.transition(8, 5) == pytest.approx(0.016)
    assert cost.transition(2, 5) == pytest.approx(0.021)
    assert cost.transition(8, 9) == pytest.approx(0.045)


@pytest.mark.parametrize("factor", [0.1, 0.5, 1.7, 5.0])
@pytest.mark.parametrize("tokens", [2, 32, 128])
def test_a_repeated_observation_is_learned(tokens: int, factor: float) -> None:
    cost = curve()
    seconds = dict(POINTS)[tokens] * factor
    for _ in range(150):
        cost.observe(tokens, tokens, seconds)
    assert cost.seconds(tokens) == pytest.approx(seconds, rel=0.01)


def test_what_a_change_of_size_costs_is_not_learned_as_the_size_s_own() -> None:
    cost = curve(change=0.005)
    for _ in range(100):
        cost.observe(2, 32, 0.045)
        cost.observe(32, 2, 0.015)
    assert cost.seconds(32) == pytest.approx(0.040)
    assert cost.seconds(2) == pytest.approx(0.010)


def test_an_observation_moves_the_size_that_it_was_padded_to_and_no_other() -> None:
    cost = curve()
    cost.observe(32, 20, 0.060)
    assert cost.seconds(32) > 0.040
    assert [cost.seconds(size) for size in (2, 8, 128)] == [0.010, 0.016, 0.200]


def test_an_observation_above_the_largest_size_is_learned() -> None:
    cost = curve()
    for _ in range(150):
        cost.observe(512, 512, 1.2)
    assert cost.seconds(512) == pytest.approx(1.2, rel=0.01)


def test_one_hiccup_hardly_moves_the_curve() -> None:
    cost = curve()
    cost.observe(32, 32, 30.0)
    assert cost.seconds(32) == pytest.approx(0.040, rel=0.11)


@pytest.mark.parametrize(
    ("seconds", "tokens"), [(0.015, 2), (0.016, 8), (0.039, 8), (0.040, 32), (0.199, 32), (0.200, 128), (9.0, 128)]
)
def test_the_largest_size_within_a_time_is_a_measured_one(seconds: float, tokens: int) -> None:
    assert curve().largest_within(seconds) == tokens


def test_no_time_at_all_still_allows_the_smallest_size() -> None:
    assert curve().largest_within(0.0) == curve().smallest == 2


def test_what_was_learned_decides_what_fits() -> None:
    cost = curve()
    for _ in range(150):
        cost.observe(32, 32, 0.09)
    assert cost.largest_within(0.05) == 8
    assert cost.largest == 128
