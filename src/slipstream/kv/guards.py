"""States that somebody wants a copy of before they are given up."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from slipstream.backend import Blob
from slipstream.types import IntArray

Export = Callable[[str, IntArray, int], Iterator[Blob | None]]


def joined(parts: Iterable[Blob | None]) -> Blob | None:
    """What was exported in parts, whole; None if a part is missing."""
    found = [*parts]
    whole = [part for part in found if part is not None]
    return np.concatenate(whole) if len(whole) == len(found) else None


@dataclass(frozen=True, slots=True)
class _Guarded:
    tenant: str
    tokens: IntArray
    start: int


class Guards:
    """Parts of conversations by key, each from token `start` to the end of its `tokens`.

    When one is about to be evicted, `on_rescue` gets a copy, and the part is guarded no more. It must not block.
    """

    def __init__(self) -> None:
        self._parts: dict[bytes, _Guarded] = {}
        self.on_rescue: Callable[[bytes, Blob], None] = lambda *_: None

    def add(self, key: bytes, tenant: str, tokens: IntArray, start: int) -> None:
        """Guard a part."""
        self._parts[key] = _Guarded(tenant, tokens, start)

    def remove(self, key: bytes) -> None:
        """Guard a part no more; harmless if it's not guarded."""
        self._parts.pop(key, None)

    def rescue(self, tenant: str, tokens: IntArray, export: Export) -> None:
        """Copy what is guarded of a sequence that is about to be evicted."""
        for key, part in list(self._parts.items()):
            size = len(part.tokens)
            if part.tenant != tenant or size > len(tokens) or not np.array_equal(part.tokens, tokens[:size]):
                continue
            if (blob := joined(export(tenant, part.tokens, part.start))) is not None:
                del self._parts[key]
                self.on_rescue(key, blob)
