"""Token ids that only grow, so that a conversation shares the memory of what it continues."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from slipstream.types import IntArray


@dataclass(slots=True)
class _Buffer:
    """Room for token ids, the first `filled` of which are taken."""

    ids: IntArray
    filled: int


class Tokens:
    """Token ids that never change; `ids` is a view of them, int32 [n].

    The first continuation is written behind them in the same buffer, any other copies them. Not thread-safe: whoever
    continues them locks.
    """

    __slots__ = ("_buffer", "ids")

    def __init__(self, ids: npt.ArrayLike) -> None:
        own = np.array(ids, np.int32)
        self._fill(_Buffer(own, len(own)))

    def __len__(self) -> int:
        return len(self.ids)

    def extended(self, more: IntArray | Sequence[int]) -> "Tokens":
        """These and `more`; takes O(len(more)) amortised, and O(n) for a second continuation."""
        start, end = len(self), len(self) + len(more)
        buffer = self._buffer
        if buffer.filled != start or end > len(buffer.ids):
            buffer = _Buffer(np.empty(end + end // 4, np.int32), start)
            buffer.ids[:start] = self.ids
        buffer.ids[start:end] = more
        buffer.filled = end
        longer = Tokens.__new__(Tokens)
        longer._fill(buffer)
        return longer

    def _fill(self, buffer: _Buffer) -> None:
        self._buffer = buffer
        self.ids: IntArray = buffer.ids[: buffer.filled]
        self.ids.flags.writeable = False
