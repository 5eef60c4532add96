"""The choice on the device against its definition, `Row.choose`, and against itself beside other rows."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from slipstream.backend.torch.chooser import choose_on_device
from slipstream.backend.torch.staging import Staging
from slipstream.sampling import Choice, Row, Sampler, SamplingParams
from tests.unit.test_sampling import random_rows

pytestmark = pytest.mark.torch
CPU = torch.device("cpu")
STAGING = Staging(CPU)


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
        for found, row in zip(choose_on_device(torch.from_numpy(logits), rows, STAGING), rows, strict=True):
            expected = row.choose(logits[row.index])
            if row.sampler.params.greedy or row.token is not None:
                assert_alike(found, expected)
                continue
            drawn += 1
            different += found.token != expected.token
    assert drawn > 3000
    assert different <= drawn // 1000, "more than rounding decides"


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
    found = choose_on_device(torch.from_numpy(logits), rows, STAGING)
    assert found == [row.choose(logits[row.index]) for row in rows]
    assert [each.token for each in found] != logits.argmax(1).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_chosen_alike_beside_any_others(dtype: torch.dtype) -> None:
    for seed in range(20):
        logits, rows = random_rows(80, seed)
        on_device = torch.from_numpy(logits).to(dtype)
        together = choose_on_device(on_device, rows, STAGING)
        assert choose_on_device(on_device, rows[::-1], STAGING) == together[::-1]
        for place in (0, 33, 79):
            alone = replace(rows[place], index=0)
            chosen = choose_on_device(on_device[rows[place].index : rows[place].index + 1], [alone], STAGING)
            assert chosen == [together[place]]


def test_of_equal_logits_the_lower_token_is_likelier() -> None:
    logits = torch.zeros(3, 64)
    logits[:, 40] = logits[:, 9] = 3
    params = [SamplingParams(temperature=0, logprobs=2), SamplingParams(top_k=1), SamplingParams(top_p=0.0)]
    rows = [Row(at, Sampler(each, 5, np.empty(0, np.int32), 64), 7) for at, each in enumerate(params)]
    rows[2].mask = np.array([-1 ^ 1 << 9, -1], np.int32)
    choices = choose_on_device(logits, rows, STAGING)
    assert [choice.token for choice in choices] == [9, 9, 40]
    assert choices[0].logprob is not None
    assert [token for token, _ in choices[0].logprob.top] == [9, 40]


def test_a_mask_reaches_every_token() -> None:
    logits = torch.arange(70, dtype=torch.float32)[None]
    for allowed in (0, 31, 32, 69):
        mask = np.zeros(3, np.int32)
        mask.view(np.uint8)[allowed // 8] = 1 << allowed % 8
        row = Row(0, Sampler(SamplingParams(), 1, np.empty(0, np.int32), 70), 3, mask)
        assert choose_on_device(logits, [row], STAGING) == [Choice(allowed)]


def test_draws_are_as_frequent_as_their_weights() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    count = 4000
    rows = [Row(0, Sampler(SamplingParams(), 11, np.empty(0, np.int32), 4), at) for at in range(count)]
    found = np.bincount([choice.token for choice in choose_on_device(logits, rows, STAGING)], minlength=4) / count
    assert np.abs(found - [0.5, 0.3, 0.15, 0.05]).max() < 0.03
