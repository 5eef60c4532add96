"""A small model with recurrent states keeps its bits on this processor, also where it computes in bfloat16."""

from pathlib import Path

import openvino as ov
import pytest

from slipstream.backend import self_test
from slipstream.backend.openvino import OpenVINOBackend
from slipstream.backend.paged_model import PagedModel
from slipstream.backend.steps import StepClass
from slipstream.errors import ModelError
from slipstream_bench.random_models import Shape
from tests.engine.random_graph import random_graph

SMALL = Shape(64, 96, 4, 2, 1, 32, 512, "qwen35", (1, 3))
STEPS = StepClass((8, 16, 64), (8,))


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3.5 of four layers with random weights."""
    return random_graph(SMALL, tmp_path_factory.mktemp("recurrent"))


@pytest.fixture(params=[False, True], ids=["as it is", "lowered"])
def model(graph: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> PagedModel:
    monkeypatch.setattr("slipstream.backend.paged_model.can_be_lowered", lambda _: request.param)
    model = PagedModel(graph)
    assert model.states is not None
    model.states.allocate(self_test.SELF_TEST_SLOTS)
    model.allocate(self_test.SELF_TEST_BLOCKS)
    return model


def test_too_little_memory_for_states_is_an_error_that_names_the_option(graph: Path) -> None:
    states = PagedModel(graph).states
    assert states is not None
    with pytest.raises(ModelError, match="no sequence with its states: raise kv_memory"):
        OpenVINOBackend(PagedModel(graph), kv_memory=6 * states.slot_bytes)


def test_no_bit_depends_on_cuts_neighbours_and_forks(model: PagedModel) -> None:
    assert self_test.holds(model, STEPS)


def test_states_are_kept_in_float32(model: PagedModel) -> None:
    compiled = model.compile_copy(2)
    tables = [port.element_type for port in compiled.inputs if "gated_delta_state" in port.any_name]
    assert tables == [ov.Type.f32] * 2
    notes = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    nets = [each["runtimePrecision"].value for each in notes if each["layerType"].value == "PagedGatedDeltaNet"]
    assert nets == ["f32"] * 2


def test_a_copy_for_small_steps_gives_the_same_bits(model: PagedModel) -> None:
    probe = self_test.Probe(model, first_block=1, step_class=STEPS)
    witness = probe.witness(STEPS)
    assert witness is not None
    for size in (8, 16):
        model.use_copy(size, model.compile_copy(size))
        assert probe.agrees(size, 8, witness)
