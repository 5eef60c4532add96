"""KV on its way out of the engine's memory and back, between steps, in parts that hold nobody up."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from slipstream.backend.base import BlockContents, IntArray
from slipstream.engine.core import EngineCore

_PART_BLOCKS = 16
"""KV blocks that are copied between two steps: a few milliseconds' worth."""


def export_kv(core: EngineCore, tenant: str, tokens: IntArray, start: int) -> BlockContents | None:
    """A copy of the KV of `tokens` from token `start` on; None unless all of it is in memory."""
    parts = []
    for begin, end in _spans(start, len(tokens), core.block_size):
        part = core.call(lambda kv, begin=begin, end=end: kv.export(tenant, tokens[:end], begin))  # type: ignore[misc]
        if part is None:
            return None
        parts.append(part)
    return np.concatenate(parts)


def import_kv(core: EngineCore, tenant: str, tokens: IntArray, start: int, contents: BlockContents) -> bool:
    """Take in the KV that `export_kv` gave for the same arguments; False if memory has no room for it.

    What comes before token `start` must be there already.
    """
    done = 0
    for begin, end in _spans(start, len(tokens), core.block_size):
        size = -(-end // core.block_size) - begin // core.block_size
        part = contents[done : done + size]
        if not core.call(lambda kv, end=end, part=part: kv.install(tenant, tokens[:end], part)):  # type: ignore[misc]
            return False
        done += size
    return True


def _spans(start: int, end: int, block_size: int) -> Iterator[tuple[int, int]]:
    """Spans of tokens that together are those from `start` to `end`; all but the last end with a block."""
    size = _PART_BLOCKS * block_size
    return pairwise([start, *range((start // size + 1) * size, end, size), end])
