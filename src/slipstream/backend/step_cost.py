"""What a step costs, by its tokens, contexts and recurrent states: measured at start-up, refined while running."""

import bisect
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import NamedTuple

_SMOOTHING = 0.1
_CHEAPEST = 1 / 16
"""Of what was measured at start-up: a step that came cheap once must not make the next ones look free."""


@dataclass(frozen=True, slots=True)
class StepMeasurements:
    """What steps cost on a machine: a base by size, and what contexts and recurrent states add to it."""

    seconds: tuple[tuple[int, float], ...]
    """Step sizes in tokens, rising, and the duration of a step without context; other counts are padded to the next."""
    change: float = 0.0
    """Seconds that a step takes longer if its size isn't prepared."""
    per_context: float = 0.0
    """Seconds for each token of context that a step's sequences have together."""
    per_pair: float = 0.0
    """Seconds for each pair of a token in the step and a token of its context."""
    per_state: float = 0.0
    """Seconds for each recurrent state that a step writes besides the first; 0 for a model without."""

    @property
    def turn(self) -> float:
        """Seconds of a typical turn: some hundred tokens of prompt in the largest steps, and eight of the smallest."""
        (_, small), (tokens, large) = self.seconds[0], self.seconds[-1]
        return 8 * small + 256 * large / tokens


class Load(NamedTuple):
    """What a step has to compute, padding of short chunks included; `StepCost.load` makes it."""

    tokens: int = 0
    context: int = 0
    """Tokens computed earlier that the step reads: the sum over its sequences."""
    pairs: int = 0
    """Pairs of a token of the step and one computed earlier that it looks back on."""
    states: int = 0
    """Recurrent states that it writes, if the model has such: one at the end of each chunk, one after each token of a
    draft that may be taken back, and those after padding of short chunks."""

    def __add__(self, other: "Load") -> "Load":  # type: ignore[override]
        """The load of a step of both."""
        return Load(
            self.tokens + other.tokens,
            self.context + other.context,
            self.pairs + other.pairs,
            self.states + other.states,
        )


class StepCost:
    """A curve through measured sizes, and what contexts and recurrent states add to it.

    Each observed step moves what made up its predicted cost, in proportion to its share: so other load on the machine
    and slower clocks find their way in. A chunk of fewer than `smallest_chunk` tokens is computed as one of so many.
    Steps of the sizes that are `prepared` take less time.
    """

    def __init__(
        self,
        measured: StepMeasurements,
        *,
        smallest_chunk: int = 1,
        prepared: Callable[[], Collection[int]] = tuple,
    ) -> None:
        self._sizes = [size for size, _ in measured.seconds]
        self._seconds = [seconds for _, seconds in measured.seconds]
        self.smallest, self.largest = self._sizes[0], self._sizes[-1]
        """The smallest and the largest measured step size."""
        self._per_context = measured.per_context
        self._per_pair = measured.per_pair
        self._per_state = measured.per_state
        self.measured = measured
        self._smallest_chunk = smallest_chunk
        self._prepared = prepared

    def chunk(self, count: int) -> int:
        """The tokens of a step that a chunk of `count` takes."""
        return max(self._smallest_chunk, count)

    def load(self, chunks: Iterable[tuple[int, int]]) -> Load:
        """The load of a step of these chunks: how many tokens each has, and how many come before them."""
        tokens = context = pairs = states = 0
        for count, past in chunks:
            size = self.chunk(count)
            tokens, context, pairs = tokens + size, context + past, pairs + size * past
            states += size - count + 1
        return Load(tokens, context, pairs, states)

    def longer(self, load: Load, count: int, past: int, *, kept: bool = True) -> Load:
        """The load if a chunk of `count` tokens gets one more, with the state before that `kept`."""
        added = int(count >= self._smallest_chunk)
        return Load(load.tokens + added, load.context, load.pairs + added * past, load.states + added - (not kept))

    def rounded(self, tokens: int) -> int:
        """The measured size that a step of that many tokens is padded to, or `tokens` beyond the largest."""
        index = bisect.bisect_left(self._sizes, tokens)
        return self._sizes[index] if index < len(self._sizes) else tokens

    def seconds(self, load: Load, *, again: bool = False) -> float:
        """Predicted duration of a step, its padding included; `again` if it comes after one of its size."""
        return sum(self._parts(load)) + (0.0 if again else self._change(load, self._prepared()))

    def token(self, past: int) -> float:
        """What one more token adds to a large step, if it looks back on `past` computed ones."""
        steps, seconds = self._sizes[-1] - self._sizes[0], self._seconds[-1] - self._seconds[0]
        if not steps:
            steps, seconds = self._sizes[0], self._seconds[0]
        return seconds / steps + self._per_pair * past

    def observe(self, load: Load, prepared: Collection[int], seconds: float) -> None:
        """Learn from a step that was run when those sizes were prepared."""
        parts = self._parts(load)
        expected = sum(parts) + self._change(load, prepared)
        excess = _SMOOTHING * (min(seconds / expected, 2.0) - 1)
        by_size, by_context, by_pair, by_state = (1 + excess * part / expected for part in parts)
        index = min(bisect.bisect_left(self._sizes, load.tokens), len(self._sizes) - 1)
        self._seconds[index] = max(self._seconds[index] * by_size, self.measured.seconds[index][1] * _CHEAPEST)
        self._per_context = max(self._per_context * by_context, self.measured.per_context * _CHEAPEST)
        self._per_pair = max(self._per_pair * by_pair, self.measured.per_pair * _CHEAPEST)
        self._per_state = max(self._per_state * by_state, self.measured.per_state * _CHEAPEST)

    def largest_within(self, seconds: float, past: int) -> int:
        """The largest measured size predicted to take no longer in a context of `past`, at least the smallest."""
        return max(self.room_beside(Load(), seconds, past), self.smallest)

    def room_beside(self, load: Load, seconds: float, past: int) -> int:
        """The longest chunk in a context of `past` that a step of a load takes along in so many seconds; 0 for none."""
        fitting = [
            size - load.tokens
            for size in self._sizes
            if size > load.tokens and self.seconds(load + self.load([(size - load.tokens, past)])) <= seconds
        ]
        return max(fitting, default=0)

    def _parts(self, load: Load) -> tuple[float, float, float, float]:
        """The seconds that a step's size, its contexts, its tokens' looks at them, and its states take."""
        index = bisect.bisect_left(self._sizes, load.tokens)
        beyond = max(1.0, load.tokens / self._sizes[-1])
        by_size = self._seconds[min(index, len(self._sizes) - 1)] * beyond
        by_state = self._per_state * max(0, load.states - 1)
        return by_size, self._per_context * load.context, self._per_pair * load.pairs, by_state

    def _change(self, load: Load, prepared: Collection[int]) -> float:
        return 0.0 if not prepared or self.rounded(load.tokens) in prepared else self.measured.change
