"""The logits of a step, wherever they lie: chosen from there, and copied to the host only for those who ask."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Protocol

import numpy as np

from slipstream.sampling import Choice, Row, choose_on_host
from slipstream.types import FloatArray


class Logits(Protocol):
    """Rows of logits, valid until the runner's next step is started."""

    def host(self) -> FloatArray:
        """All of them, float32 [rows, vocab_size]."""
        ...

    def choose(self, rows: Sequence[Row]) -> list[Choice]:
        """Choose the tokens that follow some rows; see `Row.choose`."""
        ...

    def kept(self, count: int) -> "Logits":
        """A copy of the first `count` rows, which stays valid."""
        ...


class HostLogits:
    """Logits that the runner has left on the host, float32 [rows, vocab_size]."""

    def __init__(self, array: FloatArray) -> None:
        self._array = array

    def host(self) -> FloatArray:
        """See `Logits.host`; no copy."""
        return self._array

    def choose(self, rows: Sequence[Row]) -> list[Choice]:
        """See `Logits.choose`."""
        return choose_on_host(self._array, rows)

    def kept(self, count: int) -> "HostLogits":
        """See `Logits.kept`."""
        return HostLogits(self._array[:count].copy())


class JoinedLogits:
    """Those of several steps as if of one: `counts` rows of each are wanted, its first."""

    def __init__(self, parts: Sequence[Logits], counts: Sequence[int]) -> None:
        self._parts = parts
        self._counts = counts
        self._ends = [*accumulate(counts)]

    def host(self) -> FloatArray:
        """See `Logits.host`."""
        return np.concatenate([part.host()[:count] for part, count in zip(self._parts, self._counts, strict=True)])

    def choose(self, rows: Sequence[Row]) -> list[Choice]:
        """See `Logits.choose`."""
        found: dict[int, Choice] = {}
        begin = 0
        for part, end in zip(self._parts, self._ends, strict=True):
            places = [place for place, row in enumerate(rows) if begin <= row.index < end]
            here = [replace(rows[place], index=rows[place].index - begin) for place in places]
            found.update(zip(places, part.choose(here), strict=True) if here else ())
            begin = end
        return [found[place] for place in range(len(rows))]

    def kept(self, count: int) -> Logits:
        """See `Logits.kept`."""
        return HostLogits(self.host()[:count])
