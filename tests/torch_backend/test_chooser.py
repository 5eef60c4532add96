"""The choice on the device against its definition, `Row.choose`, and against itself beside other rows."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from slipstream.backend.torch.chooser import DeviceLogits
from slipstream.backend.torch.kernel_operators import KernelOperators
from slipstream.backend.torch.operators import Operators, StepOutput
from slipstream.backend.torch.plain import PlainOperators
from slipstream.backend.torch.staging import Staging
from slipstream.sampling import NO_TOKEN, Choice, Row, Sampler, SamplingParams
from tests.unit.test_sampling import random_rows

pytestmark = pytest.mark.torch
CPU = torch.device("cpu")
PLAIN = PlainOperators()


class CountingStaging(Staging):
    """Counts what would wait for a GPU, were it one."""

    uploads = fetches = 0

    def upload(self, *args: Any) -> dict[str, torch.Tensor]:
        self.uploads += 1
        return super().upload(*args)

    def fetch(self, tensor: torch.Tensor) -> npt.NDArray[Any]:
        self.fetches += 1
        assert torch.is_inference_mode_enabled(), "buffers may have been made in it, and then change in it alone"
        return super().fetch(tensor)


def choose(logits: torch.Tensor, rows: Sequence[Row], operators: Operators = PLAIN) -> list[Choice]:
    """The choices after a step with these logits."""
    return DeviceLogits(StepOutput(logits, operators.argmax(logits)), operators, Staging(CPU)).choose(rows)


def assert_alike(found: Choice, expected: Choice) -> None:
    """Log-probabilities agree but for rounding; tokens are the same."""
    assert found.token == expected.token
    assert (found.logprob is None) == (expected.logprob is None)
    if found.logprob is not None and expected.logprob is not None:
        assert found.logprob.token_id == expected.logprob.token_id
        assert found.logprob.logprob == pytest.approx(expected.logprob.logprob, abs=1e-5)
        assert [token for token, _ in found.logprob.top] == [token for token, _ in expected.logprob.top]
        values = [value for _, value in expected.logprob.top]
        assert [value for _, value in found.logprob.top] == pytest.approx(values, abs=1e-5)


def test_the_choice_is_the_defined_one() -> None:
    drawn = different = 0
    for seed in range(120):
        logits, rows = random_rows(40, seed)
        for found, row in zip(choose(torch.from_numpy(logits), rows), rows, strict=True):
            expected = row.choose(logits[row.index])
            if row.sampler.params.greedy or row.token is not None:
                assert_alike(found, expected)
                continue
            drawn += 1
            different += found.token != expected.token
    assert drawn > 3000
    assert different <= drawn // 1000, "more than rounding decides"


@pytest.mark.parametrize("operators", [PLAIN, KernelOperators()], ids=["plain", "kernels"])
def test_nothing_is_chosen_from_what_is_no_number(operators: Operators) -> None:
    """Nor does it harm other rows."""
    logits = np.random.default_rng(0).normal(size=(4, 100)).astype(np.float32)
    logits[1, 70], logits[2, 3], logits[3] = np.nan, np.inf, -np.inf
    for params in KINDS:
        rows = [Row(index, Sampler(params, index, np.array([3], np.int32), 100), 7) for index in (0, 1, 2, 3, 0)]
        found = choose(torch.from_numpy(logits), rows, operators)
        assert [choice.token for choice in found[1:4]] == [NO_TOKEN] * 3
        for choice, row in ((found[0], rows[0]), (found[4], rows[4])):
            assert_alike(choice, row.choose(logits[0]))


GREEDY = SamplingParams(temperature=0)
KINDS = (
    GREEDY,
    GREEDY,
    SamplingParams(temperature=0, logprobs=0),
    SamplingParams(temperature=0, logprobs=3),
    SamplingParams(temperature=0, logit_bias={1: 4.0, 5: -100.0}),
    SamplingParams(temperature=0, repetition_penalty=1.4),
    SamplingParams(temperature=0.7, top_p=0.9),
)


def mixed_rows(count: int, size: int, rng: np.random.Generator, kinds: Sequence[SamplingParams] = KINDS) -> list[Row]:
    """Rows in any order, some more than once, of different kinds, with masks and without."""
    prompt = rng.integers(0, size, 5).astype(np.int32)
    rows = []
    for position, index in enumerate(rng.integers(0, count, count).tolist()):
        mask = rng.integers(-(2**31), 2**31, -(-size // 32)).astype(np.int32) if rng.random() < 0.4 else None
        if mask is not None:
            mask[0] |= 1  # something is allowed
        sampler = Sampler(kinds[rng.integers(len(kinds))], int(rng.integers(2**40)), prompt, size)
        rows.append(Row(index, sampler, position, mask, 3 if rng.random() < 0.1 else None))
    return rows


@pytest.mark.parametrize("kinds", [KINDS, (GREEDY,)], ids=["all", "greedy"])
@pytest.mark.parametrize("operators", [PLAIN, KernelOperators()], ids=["plain", "kernels"])
def test_rows_of_all_kinds_beside_each_other(operators: Operators, kinds: Sequence[SamplingParams]) -> None:
    drawn = different = 0
    for seed in range(30):
        rng = np.random.default_rng(seed)
        size = int(rng.choice([7, 100, 2050]))
        logits = torch.from_numpy(rng.normal(0, 3, (20, size))).bfloat16()  # with ties
        on_host = logits.float().numpy()
        rows = mixed_rows(20, size, rng, kinds)
        for found, row in zip(choose(logits, rows, operators), rows, strict=True):
            expected = row.choose(on_host[row.index])
            if row.sampler.params.greedy or row.token is not None:
                assert_alike(found, expected)
            else:
                drawn, different = drawn + 1, different + (found.token != expected.token)
    assert different <= drawn // 50, "more than rounding decides"


def row_of(index: int, params: SamplingParams = GREEDY, mask: int | None = None) -> Row:
    """A row of 32 tokens."""
    given = None if mask is None else np.array([mask], np.int32)
    return Row(index, Sampler(params, 0, np.empty(0, np.int32), 32), 0, given)


def test_plainly_greedy_rows_have_what_the_step_found() -> None:
    logits = torch.zeros(4, 32)
    logits[:, 20] = 1
    staging = CountingStaging(CPU)
    device_logits = DeviceLogits(StepOutput(logits, torch.tensor([4, 3, 2, 1])), PLAIN, staging)
    assert device_logits.choose([]) == []
    assert (staging.uploads, staging.fetches) == (0, 0), "nobody waits for a step of which nothing is wanted"
    assert device_logits.choose([row_of(2), row_of(0), row_of(2)]) == [Choice(2), Choice(4), Choice(2)]
    assert (staging.uploads, staging.fetches) == (0, 1)
    assert device_logits.choose([row_of(2, mask=0b1100), row_of(0, mask=-1)]) == [Choice(2), Choice(20)]
    assert (staging.uploads, staging.fetches) == (1, 2)
    adjusted = SamplingParams(temperature=0, logit_bias={7: 5.0})
    rows = [row_of(3), row_of(1, adjusted), row_of(1, mask=0b1000), row_of(0)]
    assert device_logits.choose(rows) == [Choice(1), Choice(7), Choice(3), Choice(4)]
    assert (staging.uploads, staging.fetches) == (2, 4), "masks are uploaded with all else"
    assert device_logits.kept(2).choose([row_of(1), row_of(0, mask=-1)]) == [Choice(3), Choice(20)]


def test_penalties_after_tokens_that_came() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(30, 500)).astype(np.float32)
    rows = []
    for index in range(30):
        params = SamplingParams(
            temperature=0,
            presence_penalty=float(rng.choice([0.0, 0.7])),
            frequency_penalty=float(rng.choice([0.0, -0.3, 0.4])),
            repetition_penalty=float(rng.choice([1.0, 0.8, 1.3])),
            logit_bias={int(token): float(rng.normal()) for token in rng.integers(0, 500, 20)},
        )
        sampler = Sampler(params, 0, rng.integers(0, 500, 100).astype(np.int32), 500)
        for token in [*rng.integers(0, 500, 60).tolist(), *logits[index].argsort()[-3:].tolist()]:
            sampler.accept(token)
        rows.append(Row(index, sampler, index))
    found = choose(torch.from_numpy(logits), rows)
    assert found == [row.choose(logits[row.index]) for row in rows]
    assert [each.token for each in found] != logits.argmax(1).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_chosen_alike_beside_any_others(dtype: torch.dtype) -> None:
    for seed in range(20):
        logits, rows = random_rows(80, seed)
        on_device = torch.from_numpy(logits).to(dtype)
        together = choose(on_device, rows)
        assert choose(on_device, rows[::-1]) == together[::-1]
        for place in (0, 33, 79):
            alone = replace(rows[place], index=0)
            chosen = choose(on_device[rows[place].index : rows[place].index + 1], [alone])
            assert chosen == [together[place]]


def test_of_equal_logits_the_lower_token_is_likelier() -> None:
    logits = torch.zeros(3, 64)
    logits[:, 40] = logits[:, 9] = 3
    params = [SamplingParams(temperature=0, logprobs=2), SamplingParams(top_k=1), SamplingParams(top_p=0.0)]
    rows = [Row(at, Sampler(each, 5, np.empty(0, np.int32), 64), 7) for at, each in enumerate(params)]
    rows[2].mask = np.array([-1 ^ 1 << 9, -1], np.int32)
    choices = choose(logits, rows)
    assert [choice.token for choice in choices] == [9, 9, 40]
    assert choices[0].logprob is not None
    assert [token for token, _ in choices[0].logprob.top] == [9, 40]


def test_a_mask_reaches_every_token() -> None:
    logits = torch.arange(70, dtype=torch.float32)[None]
    for allowed in (0, 31, 32, 69):
        mask = np.zeros(3, np.int32)
        mask.view(np.uint8)[allowed // 8] = 1 << allowed % 8
        row = Row(0, Sampler(SamplingParams(), 1, np.empty(0, np.int32), 70), 3, mask)
        assert choose(logits, [row]) == [Choice(allowed)]


def test_draws_are_as_frequent_as_their_weights() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    count = 4000
    rows = [Row(0, Sampler(SamplingParams(), 11, np.empty(0, np.int32), 4), at) for at in range(count)]
    found = np.bincount([choice.token for choice in choose(logits, rows)], minlength=4) / count
    assert np.abs(found - [0.5, 0.3, 0.15, 0.05]).max() < 0.03
