"""What a step costs, by the number of its tokens: measured at start-up, refined while running."""

import bisect

from slipstream.backend import StepMeasurements

_SMOOTHING = 0.1


class StepCost:
    """A piecewise linear curve through measured sizes.

    Each observed step moves the point nearest to its size, so that longer contexts, other load on the machine and
    slower clocks find their way into the curve.
    """

    def __init__(self, measured: StepMeasurements) -> None:
        self._sizes = [size for size, _ in measured.seconds]
        self._seconds = [seconds for _, seconds in measured.seconds]
        self._change = measured.change
        self._floor = [seconds / 16 for seconds in self._seconds]
        """A step that came cheap once must not make the next ones look free."""

    def rounded(self, tokens: int) -> int:
        """The measured size that a step of that many tokens is padded to, or `tokens` beyond the largest."""
        index = bisect.bisect_left(self._sizes, tokens)
        return self._sizes[index] if index < len(self._sizes) else tokens

    def seconds(self, tokens: int) -> float:
        """Predicted duration of a step of that many tokens, padding included."""
        if tokens >= self._sizes[-1]:
            return self._seconds[-1] * tokens / self._sizes[-1]
        right = bisect.bisect_left(self._sizes, tokens)
        if right == 0:
            return self._seconds[0]
        x0, x1 = self._sizes[right - 1], self._sizes[right]
        y0, y1 = self._seconds[right - 1], self._seconds[right]
        return y0 + (y1 - y0) * (tokens - x0) / (x1 - x0)

    def transition(self, last_size: int, tokens: int) -> float:
        """Predicted duration of a step of that many tokens, rounded up, after one of `last_size`."""
        size = self.rounded(tokens)
        return self.seconds(size) + (self._change if size != last_size else 0.0)

    def observe(self, last_size: int, tokens: int, seconds: float) -> None:
        """Learn from a step that was run after one of `last_size`."""
        size = self.rounded(tokens)
        nearest = min(range(len(self._sizes)), key=lambda index: abs(self._sizes[index] - size))
        expected = self.transition(last_size, size)
        moved = self._seconds[nearest] * (1 + _SMOOTHING * (min(seconds / expected, 2.0) - 1))
        self._seconds[nearest] = max(self._floor[nearest], moved)

    def largest_within(self, seconds: float) -> int:
        """The largest measured step size predicted to take no longer, at least the smallest."""
        fitting = [size for size, cost in zip(self._sizes, self._seconds, strict=True) if cost <= seconds]
        return max(fitting, default=self.smallest)

    @property
    def smallest(self) -> int:
        """The smallest measured step size."""
        return self._sizes[0]

    @property
    def largest(self) -> int:
        """The largest measured step size."""
        return self._sizes[-1]
