"""Graphs on disk."""

from pathlib import Path

import openvino as ov

_ROOM = 1 << 20


def serialize(graph: ov.Model, path: Path) -> None:
    """Write a graph; raises `OSError` if there's no room for it, which the runtime's own error doesn't say."""
    try:
        ov.serialize(graph, path)
    except RuntimeError:
        path.with_suffix(".room").write_bytes(bytes(_ROOM))
        raise
