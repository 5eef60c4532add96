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

    The first continuation is written behind them in the same buffer. One that differs from it copies them. Not
    thread-safe: whoever continues them locks.
    """

    __slots__ = ("_buffer", "ids")

    def __init__(self, ids: npt.ArrayLike) -> None:
        own = np.array(ids, np.int32)
        self._fill(_Buffer(own, len(own)), len(own))

    def __len__(self) -> int:
        return len(self.ids)

    def extended(self, more: IntArray | Sequence[int]) -> "Tokens":
        """These and `more`; takes O(len(more)) amortised, and O(n) for what differs from the first continuation."""
        more = np.asarray(more, np.int32)
        start, end = len(self), len(self) + len(more)
        buffer = self._buffer
        there = buffer.ids[start : min(end, buffer.filled)]
        if end > len(buffer.ids) or not np.array_equal(there, more[: len(there)]):
            buffer = _Buffer(np.empty(end + end // 4, np.int32), start)
            buffer.ids[:start] = self.ids
        buffer.ids[start:end] = more
        buffer.filled = max(buffer.filled, end)
        longer = Tokens.__new__(Tokens)
        longer._fill(buffer, end)
        return longer

    def _fill(self, buffer: _Buffer, length: int) -> None:
        self._buffer = buffer
        self.ids: IntArray = buffer.ids[:length]
        self.ids.flags.writeable = False
