"""Numbered pieces of memory that several holders may share."""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from slipstream.types import IntArray


class Pool:
    """Pieces numbered from `first` on, each with a count of those that hold it and of those of them that may go.

    The pieces named in one call are distinct. All operations cost O(pieces named).
    """

    def __init__(self, size: int, first: int) -> None:
        self.size = size
        self._references = np.zeros(first + size, np.int32)
        self._evictable = np.zeros(first + size, np.int32)
        self._free = np.arange(first + size - 1, first - 1, -1, dtype=np.int32)  # a stack: few pages are touched
        self.free = size
        """How many pieces nobody holds."""
        self.evictable = 0
        """How many are held only by holders that may go."""

    def take(self, count: int, evictable: bool = False) -> IntArray:
        """Give out free pieces, of which there must be as many."""
        assert count <= self.free
        rest = self.free - count
        taken = self._free[rest : self.free][::-1].copy()
        self.free = rest
        self._count(taken, references=1, evictable=int(evictable))
        return taken

    def share(self, pieces: IntArray) -> None:
        """Let one more hold the pieces."""
        self._count(pieces, references=1)

    def give_back(self, pieces: IntArray, evictable: bool) -> None:
        """Let one fewer hold the pieces; what nobody holds is free."""
        self._count(pieces, references=-1, evictable=-int(evictable))
        freed = pieces[self._references[pieces] == 0]
        self._free[self.free : self.free + len(freed)] = freed[::-1]
        self.free += len(freed)

    def set_evictable(self, pieces: IntArray, evictable: bool) -> None:
        """Declare whether a holder of the pieces may go."""
        self._count(pieces, evictable=1 if evictable else -1)

    def shared(self, pieces: IntArray) -> npt.NDArray[np.bool_]:
        """Which of the pieces several hold."""
        return self._references[pieces] > 1

    def unshared(self, pieces: IntArray) -> int:
        """How many of the pieces only one holds."""
        return int((self._references[pieces] == 1).sum())

    def check(self, holdings: Iterable[tuple[IntArray, bool]]) -> None:
        """Assert that each piece is either free, once, or held as often as it counts (for tests)."""
        counted, evictable = np.zeros_like(self._references), np.zeros_like(self._references)
        for pieces, may_go in holdings:
            counted[pieces] += 1
            evictable[pieces] += may_go
        assert np.array_equal(counted, self._references), "reference counts differ from what is held"
        assert np.array_equal(evictable, self._evictable), "evictable counts differ from what is held"
        assert self.evictable == int(((counted > 0) & (counted == evictable)).sum())
        free = self._free[: self.free]
        assert len(np.unique(free)) == self.free, "a piece is free twice"
        assert not counted[free].any(), "a free piece is held"
        assert (counted > 0).sum() == self.size - self.free, "a piece is lost"

    def _count(self, pieces: IntArray, *, references: int = 0, evictable: int = 0) -> None:
        if len(pieces):
            self.evictable -= self._evictable_among(pieces)
            self._references[pieces] += references
            self._evictable[pieces] += evictable
            self.evictable += self._evictable_among(pieces)

    def _evictable_among(self, pieces: IntArray) -> int:
        held = self._references[pieces]
        return int(((held > 0) & (held == self._evictable[pieces])).sum())
