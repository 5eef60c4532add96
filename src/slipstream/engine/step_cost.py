"""What a step costs, by its tokens and the contexts they look back on: measured at start-up, refined while running."""

import bisect
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from slipstream.backend import StepMeasurements

_SMOOTHING = 0.1
_CHEAPEST = 1 / 16
"""Of what was measured at start-up: a step that came cheap once must not make the next ones look free."""


@dataclass(frozen=True, slots=True)
class Load:
    """What a step has to compute. A lone token counts for two: that is how it is computed (see `Backend`)."""

    tokens: int = 0
    context: int = 0
    """Tokens computed earlier whose KV the step reads: the sum over its sequences."""
    pairs: int = 0
    """Pairs of a token of the step and one computed earlier that it looks back on."""

    @classmethod
    def of(cls, pieces: Iterable[tuple[int, int]]) -> "Load":
        """The load of a step of these pieces: how many tokens each has, and how many before them have their KV."""
        load = cls()
        for count, past in pieces:
            load = load.with_piece(count, past)
        return load

    def with_piece(self, count: int, past: int) -> "Load":
        """And `count` tokens of a sequence of which `past` have their KV already."""
        return Load(self.tokens, self.context + past, self.pairs).with_tokens(max(2, count), past)

    def with_tokens(self, count: int, past: int) -> "Load":
        """And `count` more tokens of a sequence that takes part already."""
        return Load(self.tokens + count, self.context, self.pairs + count * past)


class StepCost:
    """A curve through measured sizes, and what contexts add to it.

    Each observed step moves what made up its predicted cost, in proportion to its share: so other load on the machine
    and slower clocks find their way in.
    """

    def __init__(self, measured: StepMeasurements) -> None:
        self._sizes = [size for size, _ in measured.seconds]
        self._seconds = [seconds for _, seconds in measured.seconds]
        self._per_context = measured.per_context
        self._per_pair = measured.per_pair
        self._measured = measured
        self.largest_draft = measured.largest_draft
        """Tokens of a draft that one step can verify; None if there's no limit."""

    def rounded(self, tokens: int) -> int:
        """The measured size that a step of that many tokens is padded to, or `tokens` beyond the largest."""
        index = bisect.bisect_left(self._sizes, tokens)
        return self._sizes[index] if index < len(self._sizes) else tokens

    def seconds(self, load: Load, prepared: Collection[int] = ()) -> float:
        """Predicted duration of a step, its padding included; one of a size that isn't `prepared` takes longer."""
        return sum(self._parts(load)) + self._change(load, prepared)

    def token(self, past: int) -> float:
        """What one more token adds to a large step, if it looks back on `past` computed ones."""
        slope = (self._seconds[-1] - self._seconds[0]) / (self._sizes[-1] - self._sizes[0])
        return slope + self._per_pair * past

    def observe(self, load: Load, prepared: Collection[int], seconds: float) -> None:
        """Learn from a step that was run when those sizes were prepared."""
        parts = self._parts(load)
        expected = sum(parts) + self._change(load, prepared)
        excess = _SMOOTHING * (min(seconds / expected, 2.0) - 1)
        by_size, by_context, by_pair = (1 + excess * part / expected for part in parts)
        index = min(self._index(load.tokens), len(self._sizes) - 1)
        self._seconds[index] = max(self._seconds[index] * by_size, self._measured.seconds[index][1] * _CHEAPEST)
        self._per_context = max(self._per_context * by_context, self._measured.per_context * _CHEAPEST)
        self._per_pair = max(self._per_pair * by_pair, self._measured.per_pair * _CHEAPEST)

    def largest_within(self, seconds: float, past: int) -> int:
        """The largest measured size predicted to take no longer in a context of `past`, at least the smallest."""
        fitting = [size for size in self._sizes if self.seconds(Load().with_piece(size, past)) <= seconds]
        return max(fitting, default=self.smallest)

    @property
    def smallest(self) -> int:
        """The smallest measured step size."""
        return self._sizes[0]

    @property
    def largest(self) -> int:
        """The largest measured step size."""
        return self._sizes[-1]

    def _parts(self, load: Load) -> tuple[float, float, float]:
        """The seconds that a step's size, its contexts, and its tokens' looks at them take."""
        index = self._index(load.tokens)
        beyond = max(1.0, load.tokens / self._sizes[-1])
        by_size = self._seconds[min(index, len(self._sizes) - 1)] * beyond
        return by_size, self._per_context * load.context, self._per_pair * load.pairs

    def _change(self, load: Load, prepared: Collection[int]) -> float:
        return 0.0 if not prepared or self.rounded(load.tokens) in prepared else self._measured.change

    def _index(self, tokens: int) -> int:
        return bisect.bisect_left(self._sizes, tokens)
