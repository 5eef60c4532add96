"""Choosing the next token from a row of logits, as a pure function of (logits, seed, position, tokens before)."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from slipstream.backend.base import FloatArray, IntArray
from slipstream.engine.params import SamplingParams

_NUCLEUS_FIRST_LOOK = 256
"""Candidates sorted before the whole vocabulary is: nearly always enough for top_p, and twenty times faster."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural log-probability of a token under the unmodified logits, and the likeliest alternatives to it."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Sampler:
    """Samples the tokens of one generation.

    The choice at a position uses one uniform number from a counter-based generator (Philox, SC 2011) keyed by the seed
    with the position as its counter. So it does not matter in which step, or after which rejected draft, it is made.
    """

    def __init__(self, params: SamplingParams, seed: int, prompt: IntArray, vocab_size: int) -> None:
        self._params = params
        self._key = seed % 2**64
        self._bias: tuple[npt.NDArray[np.intp], FloatArray] | None = None
        if params.logit_bias:
            ids = np.fromiter(params.logit_bias.keys(), np.intp, len(params.logit_bias))
            self._bias = ids, np.fromiter(params.logit_bias.values(), np.float32, len(ids))
        if params.penalised:
            self._generated = np.zeros(vocab_size, np.int32)
            self._seen = np.zeros(vocab_size, np.bool_)
            self._seen[prompt] = True

    def sample(self, logits: FloatArray, position: int) -> int:
        """The token for `position` (index in its sequence), from float32 logits [vocab_size], which it leaves alone."""
        adjusted = self._adjust(logits)
        if self._params.greedy:
            return int(adjusted.argmax())
        return self._draw(adjusted, position)

    def accept(self, token: int) -> None:
        """Note that `token` was generated, for the penalties of those after it."""
        if self._params.penalised:
            self._generated[token] += 1
            self._seen[token] = True

    def logprob(self, logits: FloatArray, token: int) -> TokenLogprob:
        """The log-probability of `token`, with as many alternatives as the request asked for."""
        peak = logits.max()
        normaliser = float(peak) + float(np.log(np.exp(logits - peak).sum(dtype=np.float64)))
        count = self._params.logprobs or 0
        top = np.argpartition(logits, -count)[-count:] if count else np.empty(0, np.intp)
        top = top[np.lexsort((top, -logits[top]))]
        alternatives = tuple((int(i), float(logits[i]) - normaliser) for i in top)
        return TokenLogprob(token, float(logits[token]) - normaliser, alternatives)

    def _adjust(self, logits: FloatArray) -> FloatArray:
        """Penalties and bias, on a copy where there are any."""
        params = self._params
        if not params.penalised and self._bias is None:
            return logits
        adjusted = logits.copy()
        if params.repetition_penalty != 1.0:
            seen = np.flatnonzero(self._seen)
            values = adjusted[seen]
            factor = np.float32(params.repetition_penalty)
            adjusted[seen] = np.where(values > 0, values / factor, values * factor)
        if params.presence_penalty or params.frequency_penalty:
            ids = np.flatnonzero(self._generated)
            penalty = params.presence_penalty + params.frequency_penalty * self._generated[ids]
            adjusted[ids] -= penalty.astype(np.float32)
        if self._bias is not None:
            ids, values = self._bias
            adjusted[ids] += values
        return adjusted

    def _draw(self, logits: FloatArray, position: int) -> int:
        params = self._params
        candidates: npt.NDArray[np.intp] | None = None  # None stands for the whole vocabulary
        if 0 < params.top_k < len(logits):
            candidates = _largest(logits, params.top_k)
        chosen = logits if candidates is None else logits[candidates]
        # A lower temperature is as good as greedy, and could overflow.
        weights = np.exp((chosen - chosen.max()) / np.float32(max(params.temperature, 1e-6)))
        if params.min_p > 0.0:
            weights[weights < params.min_p] = 0.0
        if params.top_p < 1.0:
            weights = _nucleus(weights, params.top_p)
        cumulative = weights.cumsum(dtype=np.float64)
        uniform = np.random.Generator(np.random.Philox(key=self._key, counter=position)).random()
        index = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
        index = min(index, int(np.flatnonzero(weights)[-1]))  # rounding must not step past the last candidate
        return index if candidates is None else int(candidates[index])


def _largest(values: npt.NDArray[np.floating], count: int) -> npt.NDArray[np.intp]:
    """Indices of the `count` largest values in index order; among equals at the border, lower indices win."""
    border = np.partition(values, -count)[-count]
    above = np.flatnonzero(values > border)
    equal = np.flatnonzero(values == border)[: count - len(above)]
    return np.sort(np.concatenate((above, equal)))


def _nucleus(weights: FloatArray, top_p: float) -> FloatArray:
    """Zero all but the smallest set of largest weights that holds a `top_p` share (arXiv 1904.09751)."""
    wanted = top_p * weights.sum(dtype=np.float64)
    for count in (min(_NUCLEUS_FIRST_LOOK, len(weights)), len(weights)):
        largest = _largest(weights, count)
        order = largest[np.argsort(-weights[largest], kind="stable")]
        cumulative = weights[order].cumsum(dtype=np.float64)
        if cumulative[-1] >= wanted:
            break
    kept = order[: int(np.searchsorted(cumulative, wanted)) + 1]
    nucleus = np.zeros_like(weights)
    nucleus[kept] = weights[kept]
    return nucleus
