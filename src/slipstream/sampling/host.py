"""The choice of tokens on the host, for backends that give logits: that of `Sampler`, many times faster.

`Sampler` sorts and sums the weights of the whole vocabulary, most of which has next to no weight. Here it is folded
first: of each `_FOLD` tokens the likeliest one is looked at. That finds the few tokens that matter, and their weights
are computed exactly. The weight of all tokens is then known to lie between two bounds, and so is the place where the
random number falls. It's rarely so near the border of two tokens that the bounds leave it open. Then the weights are
summed; and only if the token is none of those that matter, the definition is asked.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

from slipstream.sampling.params import SamplingParams
from slipstream.sampling.philox import uniforms
from slipstream.sampling.sampler import NO_TOKEN, Choice, Row, ranked, weigh
from slipstream.types import FloatArray

_FOLD = 4
"""More would make the bounds so wide that the weights are summed too often; measured with a small model's logits."""
_FAINT = 1e-5
"""Share of the weight of what is left after folding, below which a token isn't looked at."""
_ROUNDING = 1e-5
"""More than the relative error of pairwise float32 sums over a vocabulary, and of what they are used for here."""


def choose_on_host(logits: FloatArray, rows: Sequence[Row]) -> list[Choice]:
    """The choices for some rows of a step's float32 logits [step rows, vocab_size], equal to those of `Row.choose`."""
    scratch = _Scratch(logits.shape[-1])
    random = any(not row.sampler.params.greedy for row in rows)
    chances: list[float] = chances_of(rows).tolist() if random else [0.0] * len(rows)
    return [
        row.choose(logits[row.index], partial(_draw, params=row.sampler.params, chance=chance, scratch=scratch))
        for row, chance in zip(rows, chances, strict=True)
    ]


def chances_of(rows: Sequence[Row]) -> npt.NDArray[np.float64]:
    """The random number of each row: `Sampler.uniform` at its position."""
    keys = np.fromiter((row.sampler.key for row in rows), np.uint64, len(rows))
    return uniforms(keys, np.fromiter((row.position for row in rows), np.uint64, len(rows)))


class _Scratch:
    """Room for a row, so that none is allocated for each."""

    def __init__(self, size: int) -> None:
        self.fold = _FOLD if size % _FOLD == 0 else 1
        self.maxima = np.empty(size // self.fold, np.float32)
        self.weights = np.empty(size, np.float32)


def _draw(logits: FloatArray, *, params: SamplingParams, chance: float, scratch: _Scratch) -> int | None:
    """The token that `Sampler.draw` chooses, or None if it's none of those that matter."""
    temperature = params.temperature
    folded = logits.reshape(scratch.fold, -1)
    maxima = folded.max(axis=0, out=scratch.maxima)
    peak = maxima.max()
    if not math.isfinite(peak):
        return NO_TOKEN
    bounds = weigh(maxima, peak, temperature, out=maxima)
    total = float(bounds.sum())
    faint = _FAINT * total
    columns = np.flatnonzero(bounds > faint)
    weights = weigh(folded[:, columns].ravel(), peak, temperature)
    looked_at = float(weights.sum())
    others = max(0.0, total - float(bounds[columns].sum()))
    slack = _ROUNDING * scratch.fold * total
    least, most = looked_at + others - slack, looked_at + scratch.fold * others + slack
    kept = np.flatnonzero(weights > faint * (1 + _ROUNDING))  # with all others that weigh so much
    kept = kept[ranked(weights[kept])]
    rank = _pick(weights[kept], least, most, params, chance)
    if rank is None:
        total = float(weigh(logits, peak, temperature, out=scratch.weights).sum(dtype=np.float64))
        rank = _pick(weights[kept], total * (1 - _ROUNDING), total * (1 + _ROUNDING), params, chance)
    if rank is None:
        return None
    place, column = divmod(int(kept[rank]), len(columns))
    return place * len(maxima) + int(columns[column])


def _pick(weights: FloatArray, least: float, most: float, params: SamplingParams, chance: float) -> int | None:
    """The rank of the token that the random number picks, or None if it's open.

    `weights` are those of the likeliest tokens, falling; the weight of all tokens lies between two bounds.
    """
    count = min(params.top_k or len(weights), len(weights))
    if params.min_p:
        count = int((weights[:count] >= params.min_p).sum())
    cumulative: list[float] = weights[:count].cumsum(dtype=np.float64).tolist()
    if count == params.top_k or count < len(weights):  # these are all that is left
        least = most = cumulative[-1]
    elif params.top_k or params.min_p:  # of the others, who knows how many are left
        least = cumulative[-1]
    if params.top_p < 1.0:
        last = bisect_left(cumulative, params.top_p * most)
        if last >= count:
            return None
        least, most = cumulative[bisect_left(cumulative, params.top_p * least)], cumulative[last]
    rank = bisect_right(cumulative, chance * least)
    return rank if rank < count and chance * most < cumulative[rank] else None
