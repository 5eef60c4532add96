"""States that somebody wants a copy of before they are given up."""

from collections.abc import Callable

import numpy as np

from slipstream.backend import Exported
from slipstream.types import IntArray

Export = Callable[[str, IntArray, int], Exported | None]


class Guards:
    """Parts of conversations by key, each from token `start` to the end of its `tokens`.

    When one is about to be evicted, `on_rescue` gets a copy, and the part is guarded no more. It must not block.
    """

    def __init__(self) -> None:
        self._parts: dict[bytes, tuple[str, IntArray, int]] = {}
        self.on_rescue: Callable[[bytes, Exported], None] = lambda *_: None

    def add(self, key: bytes, tenant: str, tokens: IntArray, start: int) -> None:
        """Guard a part."""
        self._parts[key] = tenant, tokens, start

    def remove(self, key: bytes) -> None:
        """Guard a part no more; harmless if it's not guarded."""
        self._parts.pop(key, None)

    def rescue(self, tenant: str, tokens: IntArray, export: Export) -> None:
        """Copy what is guarded of a sequence that is about to be evicted."""
        for key, (owner, part, start) in list(self._parts.items()):
            if owner != tenant or not np.array_equal(part, tokens[: len(part)]):
                continue
            if (exported := export(tenant, part, start)) is not None:
                del self._parts[key]
                self.on_rescue(key, exported)
