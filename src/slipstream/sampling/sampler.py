"""Choosing the next token from a row of logits, as a pure function of (logits, seed, position, tokens before)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from slipstream.sampling.params import SamplingParams
from slipstream.types import FloatArray, IntArray


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural log-probability of a token under the unmodified logits, and the likeliest alternatives to it."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


NO_TOKEN = -1
"""What is chosen where the highest logit is infinite or no number: the model's sums have overflown."""

Adjustment = tuple[npt.NDArray[np.intp], FloatArray]
"""Tokens, none twice, and a number for the logit of each."""


class Choice(NamedTuple):
    """A chosen token, with its log-probability if the request asked for it."""

    token: int
    logprob: TokenLogprob | None = None


Draw = Callable[[FloatArray], int | None]
"""Draws from adjusted logits the token that `Sampler.draw` does, in a faster way; None where that is too rough."""


class Sampler:
    """Chooses the tokens of one request. `choose` defines the choice; other choosers must agree with it.

    The choice at a position uses one uniform number from a counter-based generator (Philox, SC 2011) keyed by the seed
    with the position as its counter. So it does not matter in which step, or after which rejected draft, it is made.
    """

    def __init__(self, params: SamplingParams, seed: int, prompt: IntArray, vocab_size: int) -> None:
        self.params = params
        self.key = seed % 2**64
        """Of the request's random numbers."""
        bias = params.logit_bias
        self._bias = np.array([*bias], np.intp), np.array([*bias.values()], np.float32)
        self.adjusts = params.penalised or bool(bias)
        """Whether logits are changed, by penalties or a bias, before a token is chosen."""
        self.plainly_greedy = params.greedy and not self.adjusts and params.logprobs is None
        """Whether it takes the likeliest token of the logits as they are, and reports nothing besides."""
        if params.penalised:
            self._generated = np.zeros(vocab_size, np.int32)
            self._seen = np.zeros(vocab_size, np.bool_)
            self._seen[prompt] = True

    def sample(self, logits: FloatArray, position: int, draw: Draw = lambda _: None) -> int:
        """The token for `position` (index in its sequence), from float32 logits [vocab_size], which it leaves alone;
        `NO_TOKEN` if none can be."""
        adjusted = self.adjust(logits)
        if self.params.greedy:
            likeliest = int(adjusted.argmax())  # the first that is no number, if there is one
            return likeliest if math.isfinite(adjusted[likeliest]) else NO_TOKEN
        drawn = draw(adjusted)
        return self.draw(adjusted, position) if drawn is None else drawn

    def uniform(self, position: int) -> float:
        """The random number in [0, 1) that decides at a position."""
        return float(np.random.Generator(np.random.Philox(key=self.key, counter=position)).random())

    def accept(self, token: int) -> None:
        """Note that `token` was generated, for the penalties of those after it."""
        if self.params.penalised:
            self._generated[token] += 1
            self._seen[token] = True

    def logprob(self, logits: FloatArray, token: int) -> TokenLogprob:
        """The log-probability of `token`, with as many alternatives as the request asked for."""
        if token == NO_TOKEN:
            return TokenLogprob(token, -math.inf, ())
        peak = logits.max()
        normaliser = float(peak) + float(np.log(np.exp(logits - peak).sum(dtype=np.float64)))
        count = self.params.logprobs or 0
        top = np.empty(0, np.intp)
        if count:
            top = np.flatnonzero(logits >= np.partition(logits, -count)[-count])
            top = top[np.lexsort((top, -logits[top]))][:count]
        alternatives = tuple((int(i), float(logits[i]) - normaliser) for i in top)
        return TokenLogprob(token, float(logits[token]) - normaliser, alternatives)

    def adjust(self, logits: FloatArray) -> FloatArray:
        """Apply penalties and bias, on a copy if there are any."""
        if not self.adjusts:
            return logits
        adjusted = logits.copy()
        (scaled, factors), *added = self.adjustments()
        values = adjusted[scaled]
        adjusted[scaled] = np.where(values > 0, values / factors, values * factors)
        for ids, numbers in added:
            adjusted[ids] += numbers
        return adjusted

    def adjustments(self) -> list[Adjustment]:
        """What penalties and bias do after the tokens that were accepted so far, if it `adjusts` at all.

        First come factors, by which positive logits are divided and others multiplied; then what is added, in order.
        """
        params = self.params
        scaled = np.flatnonzero(self._seen) if params.repetition_penalty != 1.0 else np.empty(0, np.intp)
        adjustments = [(scaled, np.full(len(scaled), params.repetition_penalty, np.float32))]
        if params.presence_penalty or params.frequency_penalty:
            ids = np.flatnonzero(self._generated)
            penalty = params.presence_penalty + params.frequency_penalty * self._generated[ids]
            adjustments.append((ids, -penalty.astype(np.float32)))
        if params.logit_bias:
            adjustments.append(self._bias)
        return adjustments

    def draw(self, logits: FloatArray, position: int) -> int:
        """The token for `position` by chance, from logits that are adjusted already.

        Tokens stand in a row, likeliest first; `top_k`, `min_p` and `top_p` (arXiv 1904.09751), in this order, each cut
        off its end. The random number says how far along what is left, by weight, the token stands.
        """
        params, peak = self.params, logits.max()
        if not math.isfinite(peak):
            return NO_TOKEN
        weights = weigh(logits, peak, params.temperature)
        ids = ranked(weights)
        weights = weights[ids]
        count = min(params.top_k or len(ids), len(ids))
        count = int((weights[:count] >= params.min_p).sum())
        cumulative = weights[:count].cumsum(dtype=np.float64)
        if params.top_p < 1.0:
            cumulative = cumulative[: int(cumulative.searchsorted(params.top_p * cumulative[-1])) + 1]
        index = int(cumulative.searchsorted(self.uniform(position) * cumulative[-1], side="right"))
        last = min(len(cumulative), int(np.count_nonzero(weights))) - 1
        return int(ids[min(index, last)])  # rounding must not step past the last candidate


@dataclass(slots=True)
class Row:
    """One row of a step's logits, and how the token that follows it is chosen."""

    index: int
    """Of the row in its step."""
    sampler: Sampler
    """Of the request, after all tokens before `position`."""
    position: int
    """Of the token in its sequence."""
    mask: IntArray | None = None
    """Bits of the tokens that are allowed, int32 [vocab_size / 32, rounded up], lowest first; None for all."""
    token: int | None = None
    """The token, if it is chosen already and only its log-probability is wanted."""

    def choose(self, logits: FloatArray, draw: Draw = lambda _: None) -> Choice:
        """The choice from float32 logits [vocab_size]."""
        token = self.token
        if token is None:
            allowed = logits if self.mask is None else masked(logits, self.mask)
            token = self.sampler.sample(allowed, self.position, draw)
        wanted = self.sampler.params.logprobs is not None
        return Choice(token, self.sampler.logprob(logits, token) if wanted else None)


def masked(logits: FloatArray, mask: IntArray) -> FloatArray:
    """A copy of float32 logits [vocab_size] with minus infinity for every token whose bit is not set."""
    allowed = np.unpackbits(mask.view(np.uint8), count=len(logits), bitorder="little")
    return np.where(allowed.view(np.bool_), logits, np.float32(-np.inf))


def weigh(logits: FloatArray, peak: np.float32, temperature: float, out: FloatArray | None = None) -> FloatArray:
    """The weights of tokens, float32 [n], of which the likeliest one, whose logit is `peak`, has 1."""
    weights = np.subtract(logits, peak, out=out)
    # A lower temperature is as good as greedy, and could overflow.
    np.divide(weights, np.float32(max(temperature, 1e-6)), out=weights)
    return np.exp(weights, out=weights)


def ranked(weights: FloatArray) -> npt.NDArray[np.int64]:
    """The order of weights, float32 [n], 0 or more: falling, and the first one of equals first."""
    # Bits of such floats are ordered as the floats; sorting keys is several times faster than a stable `argsort`.
    keys: npt.NDArray[np.int64] = (~weights.view(np.int32)).astype(np.int64) << 32 | np.arange(len(weights))
    keys.sort()
    return keys & 0xFFFFFFFF
