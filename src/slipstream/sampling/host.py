"""The choice of tokens on the host, for backends that give logits: that of `Sampler`, several times faster.

`Sampler` orders and sums the whole vocabulary in float64. Here float32 sums, with a bound on what they may be off by,
tell which token comes out, unless the random number falls so near the border of two tokens, or the border of the
nucleus between two so likely, that the bound leaves it open. Then the definition decides.
"""

from collections.abc import Sequence

import numpy as np

from slipstream.sampling.sampler import Choice, Row, Sampler, masked
from slipstream.types import FloatArray

_BLOCK = 128
_ERROR = 1e-5
"""Bound on the relative error of a float32 sum over a vocabulary, pairwise or in blocks."""
_TAIL = 1 / 64
"""A token with less than this share of what `top_p` leaves out is rarely part of the nucleus, so it isn't sorted."""


def choose_on_host(logits: FloatArray, rows: Sequence[Row]) -> list[Choice]:
    """The choices for some rows of a step's float32 logits [step rows, vocab_size], equal to those of `Row.choose`."""
    scratch = np.empty(logits.shape[-1] if len(logits) else 0, np.float32)
    return [_choose(logits[row.index], row, scratch) for row in rows]


def _choose(logits: FloatArray, row: Row, scratch: FloatArray) -> Choice:
    sampler = row.sampler
    params = sampler.params
    if params.logprobs is not None or row.token is not None or params.top_k:
        return row.choose(logits)
    if row.mask is not None:
        logits = masked(logits, row.mask)
    if sampler.adjusts:
        logits = sampler.adjust(logits)
    if params.greedy:
        return Choice(int(logits.argmax()))
    token = _draw(logits, sampler, row.position, scratch)
    return Choice(sampler.draw(logits, row.position) if token is None else token)


def _draw(logits: FloatArray, sampler: Sampler, position: int, weights: FloatArray) -> int | None:
    """The token that `Sampler.draw` chooses, or None if float32 sums can't tell."""
    params = sampler.params
    np.subtract(logits, logits.max(), out=weights)
    np.divide(weights, np.float32(max(params.temperature, 1e-6)), out=weights)
    np.exp(weights, out=weights)
    if params.min_p > 0.0:
        weights[weights < params.min_p] = 0.0
    uniform = sampler.uniform(position)
    return _from_nucleus(weights, params.top_p, uniform) if params.top_p < 1.0 else _from_all(weights, uniform)


def _from_nucleus(weights: FloatArray, top_p: float, uniform: float) -> int | None:
    total = float(weights.sum())
    wanted, error = top_p * total, _ERROR * total
    for share in (_TAIL, 1 / len(weights)):  # the second can't leave out any of the nucleus
        likely = np.flatnonzero(weights > np.float32((1 - top_p) * total * share))
        values = weights[likely]
        order = np.argsort(-values, kind="stable")
        cumulative = values[order].cumsum(dtype=np.float64)
        size = int(cumulative.searchsorted(wanted - error))
        if size < len(order) and cumulative[size] > wanted + error:
            kept = np.sort(order[: size + 1])
            cumulative = values[kept].cumsum(dtype=np.float64)
            return int(likely[kept[int(cumulative.searchsorted(uniform * cumulative[-1], side="right"))]])
        if size < len(order):
            break
    return None


def _from_all(weights: FloatArray, uniform: float) -> int | None:
    whole = len(weights) - len(weights) % _BLOCK
    sums = weights[:whole].reshape(-1, _BLOCK).sum(axis=1)
    cumulative = np.append(sums, weights[whole:].sum()).cumsum(dtype=np.float64)
    wanted, error = uniform * cumulative[-1], _ERROR * cumulative[-1]
    block = int(cumulative.searchsorted(wanted, side="right"))
    before = float(cumulative[block - 1]) if block else 0.0
    inside = before + weights[block * _BLOCK : (block + 1) * _BLOCK].cumsum(dtype=np.float64)
    at = int(inside.searchsorted(wanted, side="right"))
    lower = float(inside[at - 1]) if at else before
    if at == len(inside) or wanted - lower <= error or inside[at] - wanted <= error:
        return None
    return block * _BLOCK + at
