"""The choice of tokens on the host, for backends that give logits: that of `Sampler`, several times faster.

`Sampler` orders and sums the whole vocabulary in float64. Most of it has next to no weight. So a cheap bound on the
weights finds the few tokens that matter; theirs are computed exactly, and the rest is known to lie between two bounds.
They tell which token comes out, unless the random number falls so near the border of two tokens, or that of the nucleus
between two so likely, that the bounds leave it open. Then the definition decides.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from slipstream.sampling.params import SamplingParams
from slipstream.sampling.philox import uniforms
from slipstream.sampling.sampler import Choice, Row, masked
from slipstream.types import FloatArray

_MANTISSA = 2.0**23
_EXPONENT_BIAS = 127
_OVERESTIMATE = 1.0615
"""The largest ratio of 1 + x to 2 to the power of x, for x from 0 to 1."""
_SUMMING = 3e-6
"""Bound on the relative error of a pairwise float32 sum over a vocabulary."""
_SCALING = 1e-4
"""Bound on the relative error of a weight made of bits, as long as scaled logits are below `_FINE`."""
_FINE = 2.0**32
_FAINT = 1e-5
"""Share of the whole weight below which a token is not looked at."""


def choose_on_host(logits: FloatArray, rows: Sequence[Row]) -> list[Choice]:
    """The choices for some rows of a step's float32 logits [step rows, vocab_size], equal to those of `Row.choose`."""
    scratch = _Scratch(logits.shape[-1])
    chances = _chances(rows) if any(not row.sampler.params.greedy for row in rows) else [0.0] * len(rows)
    with np.errstate(invalid="ignore"):  # what minus infinity is as an integer doesn't matter
        return [_choose(logits[row.index], row, chance, scratch) for row, chance in zip(rows, chances, strict=True)]


def _chances(rows: Sequence[Row]) -> list[float]:
    """The random number of each row."""
    keys = np.fromiter((row.sampler.key for row in rows), np.uint64, len(rows))
    found: list[float] = uniforms(keys, np.fromiter((row.position for row in rows), np.uint64, len(rows))).tolist()
    return found


class _Scratch:
    """Room for a row, so that none is allocated for each."""

    def __init__(self, size: int) -> None:
        self.floats = np.empty(size, np.float32)
        self.bits = np.empty(size, np.int32)


def _choose(logits: FloatArray, row: Row, chance: float, scratch: _Scratch) -> Choice:
    sampler = row.sampler
    params = sampler.params
    if params.logprobs is not None or row.token is not None or params.top_k or params.min_p:
        return row.choose(logits)
    if row.mask is not None:
        logits = masked(logits, row.mask)
    if sampler.adjusts:
        logits = sampler.adjust(logits)
    if params.greedy:
        return Choice(int(logits.argmax()))
    token = _draw(logits, params, chance, scratch)
    return Choice(sampler.draw(logits, row.position) if token is None else token)


class _Likely(NamedTuple):
    """The tokens that matter, in order; what the others weigh together lies between two bounds."""

    ids: npt.NDArray[np.intp]
    weights: FloatArray
    least: float
    most: float


def _draw(logits: FloatArray, params: SamplingParams, chance: float, scratch: _Scratch) -> int | None:
    """The token that `Sampler.draw` chooses, or None if the bounds can't tell."""
    likely = _likely(logits, max(params.temperature, 1e-6), scratch)
    if likely is None:
        return None
    return _from_nucleus(likely, params.top_p, chance) if params.top_p < 1.0 else _from_all(likely, chance)


def _likely(logits: FloatArray, temperature: float, scratch: _Scratch) -> _Likely | None:
    """Find the tokens that matter by weights made as bits of floats: the scaled logit is the exponent, and its fraction
    passes for the mantissa (Schraudolph 1999). They are too large by `_OVERESTIMATE` at the most, and never too small.
    """
    peak = logits.max()
    scale = _MANTISSA / (temperature * math.log(2))
    if abs(float(peak)) * scale > _FINE:  # a temperature near zero
        return None
    np.multiply(logits, np.float32(scale), out=scratch.floats)
    np.add(scratch.floats, np.float32(_EXPONENT_BIAS * _MANTISSA - float(peak) * scale), out=scratch.floats)
    np.copyto(scratch.bits, scratch.floats, casting="unsafe")
    np.maximum(scratch.bits, np.int32(0), out=scratch.bits)
    bounds = scratch.bits.view(np.float32)
    total = float(bounds.sum())
    ids = np.flatnonzero(bounds > np.float32(_FAINT * total))
    weights = np.exp((logits[ids] - peak) / np.float32(temperature))
    others = max(0.0, total - float(bounds[ids].sum()))
    slack = _SUMMING * total
    least = max(0.0, others * (1 - _SCALING) / _OVERESTIMATE - slack)
    return _Likely(ids, weights, least, others * (1 + _SCALING) + slack)


def _from_nucleus(likely: _Likely, top_p: float, chance: float) -> int | None:
    order = np.argsort(-likely.weights, kind="stable")
    cumulative = likely.weights[order].cumsum(dtype=np.float64)
    sum_of_likely = float(cumulative[-1])
    size = int(cumulative.searchsorted(top_p * (sum_of_likely + likely.least)))
    if size >= len(order) or cumulative[size] <= top_p * (sum_of_likely + likely.most):
        return None
    kept = np.sort(order[: size + 1])
    cumulative = likely.weights[kept].cumsum(dtype=np.float64)
    return int(likely.ids[kept[int(cumulative.searchsorted(chance * cumulative[-1], side="right"))]])


def _from_all(likely: _Likely, chance: float) -> int | None:
    cumulative = likely.weights.cumsum(dtype=np.float64)
    least, most = chance * (cumulative[-1] + likely.least), chance * (cumulative[-1] + likely.most)
    at = int(cumulative.searchsorted(most, side="right"))
    before = float(cumulative[at - 1]) if at else 0.0
    certain = at < len(cumulative) and before + likely.most <= least
    return int(likely.ids[at]) if certain else None
