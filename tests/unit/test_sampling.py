"""Sampling against a slow reference: float64, plain Python, the whole vocabulary sorted each time."""

import itertools
import math
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from slipstream.engine import SamplingParams
from slipstream.errors import InvalidRequestError
from slipstream.sampling import NO_TOKEN, Row, Sampler, choose_on_host
from slipstream.sampling.philox import uniforms
from slipstream.types import FloatArray

VOCABULARY = 49_152
CHI_SQUARE_LIMIT = {7: 29.88, 49: 94.6}
"""Values that chance exceeds once in 10,000 times, by degrees of freedom; with fixed seeds, never or always."""

EDGE = 1e-6
"""Relative; where a choice in the reference hangs on less, the float32 of the real thing may make another."""


class OnTheEdgeError(Exception):
    """The reference can't tell what rounding will make of this."""


@dataclass
class Reference:
    """What the documentation of `SamplingParams` says, one token at a time."""

    params: SamplingParams
    seed: int
    prompt: list[int]

    def sample(self, logits: list[float], generated: list[int], position: int) -> int:
        adjusted = self._adjusted(logits, generated)
        if self.params.temperature == 0:
            return adjusted.index(max(adjusted))
        choices = {self._draw(adjusted, position, edge) for edge in (-EDGE, 0.0, EDGE)}
        if len(choices) > 1:
            raise OnTheEdgeError
        return choices.pop()

    def _draw(self, logits: list[float], position: int, edge: float) -> int:
        candidates = self._candidates(logits, edge)
        uniform = np.random.Generator(np.random.Philox(key=self.seed % 2**64, counter=position)).random() + edge
        total = math.fsum(candidates.values())
        passed = 0.0
        for token in candidates:
            passed += candidates[token] / total
            if uniform < passed:
                return token
        return next(token for token in reversed(candidates) if candidates[token])

    def _adjusted(self, logits: list[float], generated: list[int]) -> list[float]:
        params, counts = self.params, Counter(generated)
        adjusted = list(logits)
        for token in {*self.prompt, *generated}:
            factor = params.repetition_penalty
            adjusted[token] = adjusted[token] / factor if adjusted[token] > 0 else adjusted[token] * factor
        for token, count in counts.items():
            adjusted[token] -= params.presence_penalty + params.frequency_penalty * count
        for token, bias in params.logit_bias.items():
            adjusted[token] += bias
        return adjusted

    def _candidates(self, logits: list[float], edge: float) -> dict[int, float]:
        """Weights of the tokens that top_k, min_p and top_p leave, applied in this order; likeliest first."""
        params, peak = self.params, max(logits)
        weights = [math.exp((logit - peak) / params.temperature) for logit in logits]
        ranked = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
        if params.top_k:
            ranked = ranked[: params.top_k]
        least = min(params.min_p * (1 + edge), 1.0)
        ranked = [token for token in ranked if weights[token] >= least]
        if params.top_p < 1:
            wanted = params.top_p * math.fsum(weights[token] for token in ranked) * (1 + edge)
            passed = list(itertools.accumulate(weights[token] for token in ranked))
            ranked = ranked[: 1 + sum(share < wanted for share in passed)]
        return {token: weights[token] for token in ranked}


# Multiples of a quarter, and penalties that are sums of powers of two: float32 is exact, so ties are ties in both.
Logits = st.lists(st.integers(-40, 40).map(lambda n: n / 4), min_size=1, max_size=24)
Shares = st.floats(0.01, 1.0)
Penalties = st.sampled_from([0.0, 0.0, -2.0, 0.25, 0.5, 2.0])


@st.composite
def cases(draw: st.DrawFn) -> tuple[SamplingParams, list[float], list[int], list[int]]:
    logits = draw(Logits)
    tokens = st.lists(st.integers(0, len(logits) - 1), max_size=6)
    params = SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.25, 0.7, 1.0, 1.9])),
        top_p=draw(st.one_of(st.just(1.0), Shares)),
        top_k=draw(st.one_of(st.just(0), st.integers(1, 30))),
        min_p=draw(st.one_of(st.just(0.0), st.floats(0.0, 1.0))),
        presence_penalty=draw(Penalties),
        frequency_penalty=draw(Penalties),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 0.5, 2.0, 4.0])),
        logit_bias=draw(st.dictionaries(st.integers(0, len(logits) - 1), st.sampled_from([-100, -0.5, 1.25, 100]))),
    )
    return params, logits, draw(tokens), draw(tokens)


def sampler(params: SamplingParams, prompt: list[int], generated: list[int], size: int, seed: int = 0) -> Sampler:
    made = Sampler(params, seed, np.array(prompt, np.int32), size)
    for token in generated:
        made.accept(token)
    return made


def frozen(logits: list[float]) -> FloatArray:
    """Logits that can't be written to."""
    array = np.array(logits, np.float32)
    array.setflags(write=False)
    return array


@settings(max_examples=400)
@given(case=cases(), seed=st.integers(0, 2**63), position=st.integers(0, 2**31))
def test_samples_agree_with_the_reference(
    case: tuple[SamplingParams, list[float], list[int], list[int]], seed: int, position: int
) -> None:
    params, logits, prompt, generated = case
    try:
        expected = Reference(params, seed, prompt).sample(logits, generated, position)
    except OnTheEdgeError:
        reject()
    chosen = sampler(params, prompt, generated, len(logits), seed)
    assert chosen.sample(frozen(logits), position) == expected


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.7, top_p=0.9),
        SamplingParams(temperature=1.5, top_p=0.999),  # a nucleus of thousands
        SamplingParams(temperature=0.8, top_k=40, top_p=0.95, min_p=0.05),
        SamplingParams(top_k=1000, repetition_penalty=2.0, presence_penalty=0.5, logit_bias={7: 5.0}),
        SamplingParams(min_p=0.02),
    ],
    ids=["plain", "nucleus", "wide nucleus", "everything", "penalties", "min_p"],
)
def test_samples_from_a_real_vocabulary_agree_with_the_reference(params: SamplingParams) -> None:
    rng = np.random.default_rng(1)
    logits = np.round(rng.normal(0, 3, VOCABULARY) * 64) / 64
    prompt, generated = [5, 7, 49_151], [7, 7, 11]
    seed = 5  # one with which no choice is on the edge
    chosen = sampler(params, prompt, generated, VOCABULARY, seed)
    reference = Reference(params, seed, prompt)
    for position in range(2):
        expected = reference.sample(logits.tolist(), generated, position)
        assert chosen.sample(frozen(logits.tolist()), position) == expected


class TestTies:
    def test_greedy_takes_the_lowest_of_equal_tokens(self) -> None:
        assert sampler(SamplingParams(temperature=0), [], [], 4).sample(frozen([1, 3, 3, 3]), 0) == 1

    def test_top_k_keeps_the_lowest_of_equal_tokens(self) -> None:
        assert drawn(SamplingParams(top_k=3), [1, 2, 1, 1, 1]) == {0, 1, 2}

    def test_top_p_keeps_no_more_of_equal_tokens_than_it_needs(self) -> None:
        assert drawn(SamplingParams(top_p=0.5), [0, 0, 0, 0]) == {0, 1}

    def test_top_p_counts_the_share_of_what_top_k_left(self) -> None:
        assert drawn(SamplingParams(top_p=0.5, top_k=2), [0, 0, 0, 0]) == {0}

    def test_min_p_of_one_keeps_all_of_the_likeliest(self) -> None:
        assert drawn(SamplingParams(min_p=1.0), [3, 0, 3, 1]) == {0, 2}

    def test_a_nucleus_wider_than_the_first_look_is_whole(self) -> None:
        assert drawn(SamplingParams(top_p=0.75), [0.0] * 512, positions=8000) == set(range(384))


def drawn(params: SamplingParams, logits: list[float], positions: int = 300) -> set[int]:
    """The tokens that come up at all."""
    chosen, row = sampler(params, [], [], len(logits)), frozen(logits)
    return {chosen.sample(row, position) for position in range(positions)}


@pytest.mark.parametrize("top_p", [0.0, 1e-9, 0.01])
def test_the_likeliest_token_always_remains(top_p: float) -> None:
    assert drawn(SamplingParams(top_p=top_p, min_p=1.0, top_k=1), [0, 2, 1]) == {1}


def test_top_k_of_one_is_greedy() -> None:
    assert drawn(SamplingParams(top_k=1), [1, 2, 1.5]) == {1}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-307, 5e-324])
def test_temperatures_near_zero_are_nearly_greedy(temperature: float) -> None:
    assert drawn(SamplingParams(temperature=temperature), [17.5, 20.0, -3.0, 19.0]) == {1}


def test_a_banned_token_never_comes_up_and_a_forced_one_always() -> None:
    assert 1 not in drawn(SamplingParams(logit_bias={1: -100}), [0, 2, 1])
    assert drawn(SamplingParams(logit_bias={0: 100}), [0, 2, 1]) == {0}


def test_a_token_masked_with_minus_infinity_never_comes_up() -> None:
    assert drawn(SamplingParams(top_p=0.99999), [0, -math.inf, 0, -math.inf]) == {0, 2}


class TestPenalties:
    """Presence and frequency concern what was generated; repetition concerns the prompt too."""

    def test_the_prompt_counts_for_repetition_only(self) -> None:
        logits = [1.0, 1.5]
        assert greedy(SamplingParams(presence_penalty=2.0, frequency_penalty=2.0), logits, [1], []) == 1
        assert greedy(SamplingParams(repetition_penalty=2.0), logits, [1], []) == 0

    def test_presence_counts_once_and_frequency_each_time(self) -> None:
        logits = [1.0, 2.75]
        assert greedy(SamplingParams(presence_penalty=1.0), logits, [], [1, 1]) == 1
        assert greedy(SamplingParams(frequency_penalty=1.0), logits, [], [1]) == 1
        assert greedy(SamplingParams(frequency_penalty=1.0), logits, [], [1, 1]) == 0

    def test_repetition_makes_negative_logits_smaller_too(self) -> None:
        assert greedy(SamplingParams(repetition_penalty=2.0), [-1.0, -1.5], [0], []) == 1

    def test_repetition_does_not_grow_with_the_count(self) -> None:
        assert greedy(SamplingParams(repetition_penalty=2.0), [3.0, 8.0], [1, 1, 1], [1, 1]) == 1


def greedy(params: SamplingParams, logits: list[float], prompt: list[int], generated: list[int]) -> int:
    return sampler(replace(params, temperature=0), prompt, generated, len(logits)).sample(frozen(logits), 0)


class TestDeterminism:
    LOGITS = (0.0, 0.5, 1.0, 0.25, 0.75, -1.0, 0.5, 0.0)

    @given(st.permutations(range(20)), st.integers(0, 2**64 - 1))
    def test_the_order_of_positions_changes_nothing(self, order: list[int], seed: int) -> None:
        params, row = SamplingParams(top_p=0.9), frozen(list(self.LOGITS))
        one, other = (sampler(params, [], [], len(row), seed) for _ in range(2))
        straight = [one.sample(row, position) for position in range(20)]
        assert {position: other.sample(row, position) for position in order} == dict(enumerate(straight))

    def test_asking_twice_gives_the_same_token(self) -> None:
        chosen, row = sampler(SamplingParams(), [], [], 8), frozen(list(self.LOGITS))
        assert [chosen.sample(row, p) for p in range(50)] == [chosen.sample(row, p) for p in range(50)]

    @pytest.mark.parametrize("seed", [-1, 2**64, 2**80 + 5, -(2**70)])
    def test_any_integer_is_a_seed(self, seed: int) -> None:
        row = frozen(list(self.LOGITS))
        one, other = (sampler(SamplingParams(), [], [], 8, value) for value in (seed, seed % 2**64))
        assert [one.sample(row, p) for p in range(30)] == [other.sample(row, p) for p in range(30)]

    def test_other_seeds_and_other_positions_give_other_answers(self) -> None:
        row = frozen(list(self.LOGITS))
        answers = {
            tuple(sampler(SamplingParams(), [], [], 8, seed).sample(row, p) for p in range(30)) for seed in range(50)
        }
        assert len(answers) == 50


class TestDistribution:
    LOGITS = (0.0, 0.5, 1.0, 0.25, 0.75, -1.0, 0.5, 0.0)

    def shares(self, temperature: float = 1.0) -> FloatArray:
        weights = np.exp(np.array(self.LOGITS) / temperature)
        return (weights / weights.sum()).astype(np.float32)

    @pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
    def test_positions_are_drawn_as_often_as_the_logits_say(self, temperature: float) -> None:
        chosen, row = sampler(SamplingParams(temperature=temperature), [], [], 8, seed=1), frozen(list(self.LOGITS))
        tokens = [chosen.sample(row, position) for position in range(8000)]
        assert chi_square(np.bincount(tokens, minlength=8), self.shares(temperature)) < CHI_SQUARE_LIMIT[7]

    def test_seeds_are_drawn_as_often_as_the_logits_say(self) -> None:
        row = frozen(list(self.LOGITS))
        tokens = [sampler(SamplingParams(), [], [], 8, seed).sample(row, 100) for seed in range(8000)]
        assert chi_square(np.bincount(tokens, minlength=8), self.shares()) < CHI_SQUARE_LIMIT[7]

    @pytest.mark.parametrize("stride", [1, 4])
    def test_neighbouring_positions_are_independent(self, stride: int) -> None:
        chosen, row = sampler(SamplingParams(), [], [], 8, seed=2), frozen(list(self.LOGITS))
        tokens = np.array([chosen.sample(row, position) for position in range(8000)])
        pairs = np.bincount(tokens[:-stride] * 8 + tokens[stride:], minlength=64)
        expected = np.outer(self.shares(), self.shares()).ravel()
        assert chi_square(pairs, expected.astype(np.float32)) < 120  # 63 degrees of freedom, 1 in 50,000

    def test_a_nucleus_keeps_the_proportions_within_it(self) -> None:
        chosen, row = sampler(SamplingParams(top_k=3), [], [], 8, seed=4), frozen(list(self.LOGITS))
        tokens = [chosen.sample(row, position) for position in range(4000)]
        kept = np.where(np.isin(np.arange(8), (1, 2, 4)), self.shares(), 0)
        counts = np.bincount(tokens, minlength=8)
        assert counts[kept == 0].sum() == 0
        assert chi_square(counts[kept > 0], kept[kept > 0] / kept.sum()) < 18.42  # 2 degrees of freedom, 1 in 10,000


def chi_square(counts: np.ndarray, shares: FloatArray) -> float:
    expected = shares * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


class TestLogprobs:
    ROW = (1.5, -2.0, 0.25, 1.5, 7.0, -30.0, 0.25, 3.0)

    @pytest.mark.parametrize("token", range(8))
    def test_the_logprob_is_that_of_the_unmodified_logits(self, token: int) -> None:
        params = SamplingParams(
            logprobs=0, temperature=0.3, top_k=1, repetition_penalty=3.0, presence_penalty=2.0, logit_bias={2: 9.0}
        )
        found = sampler(params, [0, 1, 2], [2, 4], 8).logprob(frozen(list(self.ROW)), token)
        expected = self.ROW[token] - math.log(math.fsum(map(math.exp, self.ROW)))
        assert found.token_id == token
        assert found.logprob == pytest.approx(expected, abs=1e-6)
        assert found.top == ()

    def test_alternatives_come_likeliest_first_and_equal_ones_by_id(self) -> None:
        found = sampler(SamplingParams(logprobs=6), [], [], 8).logprob(frozen(list(self.ROW)), 1)
        assert [token for token, _ in found.top] == [4, 7, 0, 3, 2, 6]

    def test_all_probabilities_sum_to_one(self) -> None:
        found = sampler(SamplingParams(logprobs=8), [], [], 8).logprob(frozen(list(self.ROW)), 0)
        assert math.fsum(math.exp(logprob) for _, logprob in found.top) == pytest.approx(1.0, abs=1e-6)

    @given(st.lists(st.floats(-80, 80, width=32), min_size=5, max_size=40), st.integers(0, 4))
    def test_logprobs_agree_with_a_float64_softmax(self, row: list[float], token: int) -> None:
        found = sampler(SamplingParams(logprobs=5), [], [], len(row)).logprob(frozen(row), token)
        normaliser = max(row) + math.log(math.fsum(math.exp(logit - max(row)) for logit in row))
        ranked = sorted((logit - normaliser for logit in row), reverse=True)[:5]
        assert found.logprob == pytest.approx(row[token] - normaliser, abs=1e-4)
        assert [logprob for _, logprob in found.top] == pytest.approx(ranked, abs=1e-4)
        assert all(row[at] - normaliser == pytest.approx(logprob, abs=1e-4) for at, logprob in found.top)

    def test_logits_far_from_zero_do_not_overflow(self) -> None:
        found = sampler(SamplingParams(logprobs=1), [], [], 2).logprob(frozen([30_000.0, 29_999.0]), 1)
        assert found.logprob == pytest.approx(-1.3132617, abs=1e-3)

    def test_a_real_vocabulary_sums_to_one(self) -> None:
        row = np.random.default_rng(5).normal(0, 3, VOCABULARY).tolist()
        chosen, logits = sampler(SamplingParams(logprobs=20), [], [], VOCABULARY), frozen(row)
        total = math.fsum(math.exp(chosen.logprob(logits, token).logprob) for token in range(0, VOCABULARY, 64))
        weights = np.exp(np.array(row, np.float32).astype(np.float64))
        assert total == pytest.approx(weights[::64].sum() / weights.sum(), rel=1e-5)


class TestValidation:
    @pytest.mark.parametrize(
        ("param", "values"),
        [
            ("max_tokens", [0, -1]),
            ("temperature", [-0.1, 100.5, math.nan, math.inf]),
            ("top_p", [-0.5, 1.01, math.nan]),
            ("top_k", [-1]),
            ("min_p", [-0.01, 1.01, math.nan]),
            ("presence_penalty", [-2.01, 2.01, math.nan]),
            ("frequency_penalty", [-2.01, 2.01, math.nan]),
            ("repetition_penalty", [0.0, -1.0, 10.1, math.nan]),
            ("logit_bias", [{3: 101.0}, {3: -101.0}, {3: 1.0, 4: math.nan}]),
            ("stop", [("",), ("a", ""), ("x",) * 17]),
            ("logprobs", [-1, 21]),
        ],
    )
    def test_what_is_out_of_range_is_refused_by_name(self, param: str, values: list[object]) -> None:
        for value in values:
            with pytest.raises(InvalidRequestError) as caught:
                SamplingParams(**{param: value})  # type: ignore[arg-type]
            assert caught.value.param == param
            assert caught.value.code == "invalid_value"
            assert param in str(caught.value)

    @pytest.mark.parametrize(
        ("param", "values"),
        [
            ("max_tokens", [None, 1]),
            ("temperature", [0.0, 100.0]),
            ("top_p", [0.0, 1e-9, 1.0]),
            ("top_k", [0, 10**6]),
            ("min_p", [0.0, 1.0]),
            ("presence_penalty", [-2.0, 2.0]),
            ("frequency_penalty", [-2.0, 2.0]),
            ("repetition_penalty", [0.1, 10.0]),
            ("logit_bias", [{}, {0: -100, 1: 100}]),
            ("stop", [(), ("x",) * 16]),
            ("logprobs", [None, 0, 20]),
        ],
    )
    def test_the_limits_themselves_are_accepted(self, param: str, values: list[object]) -> None:
        for value in values:
            assert getattr(SamplingParams(**{param: value}), param) == value  # type: ignore[arg-type]


def random_rows(count: int, seed: int) -> tuple[np.ndarray, list[Row]]:
    """Rows of many shapes: peaked and flat, with ties, masks, penalties and biases, of small and large vocabularies."""
    rng = np.random.default_rng(seed)
    size = int(rng.choice([7, 100, 1000, 3000]))
    logits = (rng.normal(size=(count, size)) * rng.choice([0.1, 1, 3, 8])).astype(np.float32)
    logits[np.arange(count), rng.integers(0, size, count)] += np.float32(rng.choice([0, 5, 15]))
    if rng.random() < 0.2:
        logits = np.round(logits)  # with ties
    params = SamplingParams(
        temperature=float(rng.choice([0, 0.01, 0.3, 0.8, 1.0, 2.0])),
        top_p=float(rng.choice([1.0, 0.95, 0.5, 0.05, 0.0])),
        top_k=int(rng.choice([0, 0, 3, 40])),
        min_p=float(rng.choice([0, 0, 0.05])),
        repetition_penalty=float(rng.choice([1.0, 1.0, 1.2])),
        logit_bias={1: 4.0} if rng.random() < 0.2 else {},
        logprobs=2 if rng.random() < 0.1 else None,
    )
    prompt = rng.integers(0, size, 5).astype(np.int32)
    rows = []
    for index in rng.permutation(count).tolist():
        mask = None
        if rng.random() < 0.3:
            mask = rng.integers(-(2**31), 2**31, -(-size // 32)).astype(np.int32)
            mask[0] |= 1  # something is allowed
        chosen = Sampler(params, int(rng.integers(2**40)), prompt, size)
        rows.append(Row(index, chosen, int(rng.integers(10_000)), mask, 3 if rng.random() < 0.05 else None))
    return logits, rows


def assert_the_host_chooses_alike(batches: int) -> None:
    for seed in range(batches):
        logits, rows = random_rows(100, seed)
        before = logits.copy()
        assert choose_on_host(logits, rows) == [row.choose(logits[row.index]) for row in rows]
        assert np.array_equal(logits, before)


def test_the_batched_choice_is_the_defined_one() -> None:
    assert_the_host_chooses_alike(60)


@pytest.mark.parametrize("cut", [{"top_k": 2000}, {"min_p": 2e-5}, {"top_k": 900, "min_p": 1e-5}], ids=str)
@pytest.mark.parametrize("top_p", [1.0, 0.98])
def test_the_batched_choice_cuts_where_few_tokens_matter(cut: dict[str, float], top_p: float) -> None:
    params = SamplingParams(top_p=top_p, **cut)  # type: ignore[arg-type]
    logits = np.random.default_rng(0).normal(0, 3, (100, 4096)).astype(np.float32)
    logits[:, 7] = 14
    rows = [Row(index, Sampler(params, index, np.empty(0, np.int32), 4096), index) for index in range(100)]
    assert choose_on_host(logits, rows) == [row.choose(logits[row.index]) for row in rows]


@pytest.mark.parametrize(
    "params", [{"temperature": 0}, {}, {"top_p": 0.9}, {"top_k": 3}, {"min_p": 0.1}, {"logprobs": 2}], ids=str
)
def test_nothing_is_chosen_from_what_is_no_number(params: dict[str, float]) -> None:
    """Sums that have overflown: not the first token, and no error for the other rows of a step."""
    logits = np.random.default_rng(0).normal(size=(4, 128)).astype(np.float32)
    logits[1, 70], logits[2, 3], logits[3, :64] = np.nan, np.inf, -np.inf
    mask = np.array([0, -1, 0, 0], np.int32)
    chosen = Sampler(SamplingParams(**params), 1, np.empty(0, np.int32), 128)  # type: ignore[arg-type]
    rows = [Row(index, chosen, 5, mask if index == 3 else None) for index in (0, 1, 2, 3, 0)]
    for found in (choose_on_host(logits, rows), [row.choose(logits[row.index]) for row in rows]):
        assert [choice.token for choice in found[1:4]] == [NO_TOKEN] * 3
        assert 0 <= found[0].token < 128
        assert found[0] == found[4]


@pytest.mark.long
def test_the_batched_choice_is_the_defined_one_over_100_000_rows() -> None:
    assert_the_host_chooses_alike(1000)


def test_many_random_numbers_at_once_are_those_of_each() -> None:
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 2**64, 500, dtype=np.uint64)
    counters = np.array([0, 1, 2**32 - 1, 2**32, 2**63, *rng.integers(0, 2**20, 495)], np.uint64)
    expected = [
        np.random.Generator(np.random.Philox(key=int(key), counter=int(counter))).random()
        for key, counter in zip(keys, counters, strict=True)
    ]
    assert uniforms(keys, counters).tolist() == expected
