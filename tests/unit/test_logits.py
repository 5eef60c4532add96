"""Logits of several steps as if they were of one."""

import numpy as np

from slipstream.backend.logits import HostLogits, JoinedLogits
from slipstream.sampling import Row, Sampler, SamplingParams

VOCABULARY = 50
COUNTS = (3, 1, 4)


def row(index: int) -> Row:
    params = SamplingParams(temperature=index % 2, logprobs=1 if index == 3 else None)
    return Row(index, Sampler(params, index, np.empty(0, np.int32), VOCABULARY), 10 + index)


def test_rows_are_chosen_from_the_step_that_has_them() -> None:
    rng = np.random.default_rng(0)
    padded = [rng.normal(size=(count + 2, VOCABULARY)).astype(np.float32) for count in COUNTS]  # rows nobody wants
    whole = np.concatenate([part[:count] for part, count in zip(padded, COUNTS, strict=True)])
    joined = JoinedLogits([HostLogits(part) for part in padded], COUNTS)
    assert np.array_equal(joined.host(), whole)
    assert np.array_equal(joined.kept(5).host(), whole[:5])
    rows = [row(index) for index in (7, 0, 3, 2, 4, 6, 1, 5)]
    assert joined.choose(rows) == [each.choose(whole[each.index]) for each in rows]
    assert joined.choose([]) == []


def test_what_is_kept_outlives_the_next_step() -> None:
    logits = np.ones((3, VOCABULARY), np.float32)
    kept = HostLogits(logits).kept(2)
    logits[:] = 7
    assert np.array_equal(kept.host(), np.ones((2, VOCABULARY)))
