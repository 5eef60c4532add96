"""GGUF import, judged by transformers on the same weights; llama.cpp writes the files, so a misreading isn't shared."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import openvino as ov
import pytest

from slipstream.backend.paged_model import give, names_of, paged
from slipstream.backend.slot_memory import SlotMemory
from slipstream.backend.slots import EMPTY_SLOT, FIRST_SLOT, Slots
from slipstream.backend.steps import PagedChunk, lay_out
from slipstream.models import Model, ModelStore
from slipstream.models.gguf import GGUF, decoder_of
from slipstream.models.gguf.convert import write
from slipstream.models.gguf.families import Decoder, Rotation
from slipstream.models.gguf.graph import build
from slipstream.types import FloatArray
from tests.engine import exactness
from tests.models.judged import FAMILIES, WINDOW, deviation

pytestmark = pytest.mark.models

CLOSE = 0.01
"""In the logarithm of a probability, of the ten likeliest tokens at each position."""
STEP = 64
FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}


@pytest.mark.parametrize("family", FAMILIES)
class TestFamily:
    def test_gives_the_judges_probabilities(self, judged: Path, family: str) -> None:
        assert_as_judged(computed(judged / f"{family}.gguf"), _expected(judged, family))

    def test_is_exact_however_it_is_computed(self, judged: Path, family: str, tmp_path: Path) -> None:
        assert_exact(ModelStore(tmp_path).ensure(str(judged / f"{family}.gguf")))


def assert_as_judged(found: FloatArray, expected: FloatArray) -> None:
    """Log-probabilities are close to the judge's, and the likeliest tokens the same."""
    assert deviation(found, expected) < CLOSE
    assert (found.argmax(axis=-1) == expected.argmax(axis=-1)).all()


def assert_exact(model: Model) -> None:
    """Every token is the same as computed afresh, where the backend says that the model is exact."""
    if not exactness.THIS_PROCESSOR.backend(model, kv_memory=2**24).exact:
        pytest.skip("the self-test found no step sizes that keep this model's bits on this processor, and says so")
    assert exactness.run(12, seed=1, model=model, longest=2 * WINDOW) >= 12


def _without(name: str) -> Any:
    return lambda file: replace(file, tensors={key: value for key, value in file.tensors.items() if key != name})


class _NormsAroundZero(GGUF):
    """A file whose norms were read as if one had yet to be added to them."""

    def array(self, name: str) -> FloatArray | None:
        values = super().array(name)
        return values - 1 if values is not None and "norm" in name else values


def _each_layer(decoder: Decoder, **changes: Any) -> Decoder:
    return replace(decoder, layers=tuple(replace(layer, **changes) for layer in decoder.layers))


MISTAKES: Mapping[str, tuple[str, Any, Any]] = {
    "no window": ("gemma3", None, lambda decoder: _each_layer(decoder, window=0)),
    "no bias": ("qwen2", _without("blk.0.attn_k.bias"), None),
    "no scale of rotations": (
        "qwen2-yarn",
        None,
        lambda decoder: _each_layer(decoder, rotation=Rotation(decoder.layers[0].rotation.frequencies)),
    ),
    "norms around zero": ("gemma3", lambda file: _NormsAroundZero(file.metadata, file.tensors), None),
    "queries and keys in another order": (
        "llama",
        None,
        lambda decoder: replace(decoder, family=replace(decoder.family, interleaved=False)),
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_seen(judged: Path, mistake: str) -> None:
    family, in_file, in_decoder = MISTAKES[mistake]
    found = computed(judged / f"{family}.gguf", in_file, in_decoder)
    assert deviation(found, _expected(judged, family)) > 5 * CLOSE


def _expected(judged: Path, family: str) -> FloatArray:
    logarithms: FloatArray = np.load(judged / f"{family}.npz")["judged"]
    return logarithms


def computed(
    path: Path, in_file: Any = None, in_decoder: Any = None, options: Mapping[str, str] = FLOAT32
) -> FloatArray:
    """What a file's model says of the judge's prompt, computed in float32 unless asked."""
    file = GGUF.read(path)
    decoder = decoder_of(file)
    if in_file:
        file = in_file(file)
    if in_decoder:
        decoder = in_decoder(decoder)
    with TemporaryDirectory() as folder:
        target = Path(folder) / "openvino_model.xml"
        write(build(file, decoder), target)
        core = ov.Core()
        core.get_property("CPU", "FULL_DEVICE_NAME")  # the plugin brings operators that a graph may have
        return computed_by(core.read_model(target), path.with_suffix(".npz"), options)


def computed_by(model: ov.Model, judged: Path, options: Mapping[str, str] = FLOAT32) -> FloatArray:
    """What a graph says of the judge's prompt, computed in steps of 64 tokens."""
    tokens = np.load(judged)["tokens"]
    compiled = ov.Core().compile_model(paged(model), "CPU", options)
    request = compiled.create_infer_request()
    blocks = len(tokens) // 32 + 2
    for port in compiled.inputs:
        if "_cache." in port.any_name:
            shape = [blocks, *(size.get_length() for size in list(port.partial_shape)[1:])]
            request.set_tensor(port.any_name, ov.Tensor(port.element_type, ov.Shape(shape)))
    states, logits = SlotMemory(compiled.inputs), []
    states.allocate(FIRST_SLOT + 1)
    states.attach(request)
    for past in range(0, len(tokens), STEP):
        slots = Slots(FIRST_SLOT if past else EMPTY_SLOT, ((past + STEP, FIRST_SLOT),))
        chunk = PagedChunk(tokens[past : past + STEP], past, np.arange(1, blocks, dtype=np.int32), STEP, slots)
        inputs = lay_out([chunk], STEP, STEP, recurrent=states.slot_bytes > 0)  # tensors share its memory
        give(request, inputs, names_of(compiled))
        request.infer()
        logits.append(request.get_output_tensor(0).data.reshape(STEP, -1).astype(np.float64))
    rows = np.concatenate(logits)
    rows -= rows.max(axis=-1, keepdims=True)
    return rows - np.log(np.exp(rows).sum(axis=-1, keepdims=True))
