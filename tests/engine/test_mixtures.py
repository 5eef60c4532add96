"""A small mixture of experts keeps its bits on this processor, also where it computes in bfloat16."""

from pathlib import Path

import numpy as np
import pytest

from slipstream.backend.openvino import OpenVINOBackend
from slipstream.backend.paged_model import PagedModel
from slipstream.backend.self_test import ROW_COUNTS
from slipstream.backend.steps import BLOCK_SIZE, PagedChunk, StepClass, lay_out, run
from slipstream.types import FloatArray
from slipstream_bench.random_models import Shape
from tests.engine.random_graph import random_graph

SMALL = Shape(64, 96, 2, 2, 1, 32, 512, "qwen3moe", experts=8)
"""All experts are used, so each gets all tokens."""
TOKENS = np.random.default_rng(0).integers(0, SMALL.vocabulary, 512).astype(np.int32)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 of two layers with eight experts, of random weights."""
    return random_graph(SMALL, tmp_path_factory.mktemp("mixture"))


def step(model: PagedModel) -> FloatArray:
    """Logits of a step of 8 tokens with as many rows as there ever are."""
    chunk = PagedChunk(TOKENS[:8], 0, np.array([1], np.int32), 8)
    return run(model, lay_out([chunk], 8, ROW_COUNTS[-1])).copy()


def test_a_models_first_step_gives_what_later_ones_do(graph: Path) -> None:
    model = PagedModel(graph)
    model.allocate(2)
    first = step(model)
    assert np.array_equal(step(model), first)
    model.use_copy(8, model.compile_copy(8))
    first = step(model)
    assert np.array_equal(step(model), first)


def test_an_expert_gives_the_same_bits_for_many_tokens_as_for_few(graph: Path) -> None:
    model = PagedModel(graph)
    backend = OpenVINOBackend(model, kv_memory=2**22)
    if not backend.exact:
        pytest.skip("the self-test found no step sizes that keep this model's bits on this processor, and says so")
    count = backend.step_class.sizes[-1] - 7  # the last of which fills eight rows alone
    few = StepClass(tuple(size for size in backend.step_class.sizes if size <= 64), backend.step_class.row_counts)
    table = np.arange(1, 2 + count // BLOCK_SIZE, dtype=np.int32)
    found = []
    for step_class in (backend.step_class, few):
        logits = step_class.run(model, [PagedChunk(TOKENS[:count], 0, table, 8)]).copy()
        found.append((logits.tobytes(), model.read_blocks(table[:-1]).wait().tobytes()))
    assert found[0] == found[1]
