"""A graph of random weights, as an import makes it of a GGUF file."""

from pathlib import Path

import pytest

from slipstream.models.gguf import convert
from slipstream_bench import random_models
from slipstream_bench.random_models import Shape


def random_graph(shape: Shape, folder: Path) -> Path:
    """Write a model's file, without a vocabulary, and its graph into a folder; the graph."""
    file = folder / "small.gguf"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(random_models.SHAPES, "small", shape)
        patch.setattr(random_models, "add_vocabulary", lambda *_: None)
        random_models.write("small", file)
        patch.setattr("sys.argv", ["convert", str(file), str(file.with_suffix(".xml"))])
        convert.main()
    return file.with_suffix(".xml")
