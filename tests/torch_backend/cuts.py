"""What a model computes, whole and in pieces."""

from pathlib import Path

import numpy as np
import torch

from slipstream.backend.steps import PagedChunk, StepClass
from slipstream.backend.torch.model import TorchModel
from slipstream.backend.torch.plain import PlainOperators
from slipstream.types import FloatArray


def logits_over_cuts(folder: Path) -> FloatArray:
    """The logits of 40 tokens on plain operators; raises `AssertionError` unless they are the same in three chunks."""
    tokens, table = np.arange(40, dtype=np.int32), np.array([1, 2], np.int32)
    step_class = StepClass((2, 16, 48), (1, 48))
    model = TorchModel.load(folder, torch.device("cpu"), PlainOperators())
    model.allocate(3 * (1 + model.window_tables))
    found = step_class.run(model, [PagedChunk(tokens, 0, table, 40)])
    model.allocate(3 * (1 + model.window_tables))
    parts = [
        step_class.run(model, [PagedChunk(tokens[begin:end], begin, table, end - begin)])
        for begin, end in ((0, 1), (1, 15), (15, 40))
    ]
    assert np.array_equal(np.concatenate(parts), found)
    return found
