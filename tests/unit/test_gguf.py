"""Weights and files of GGUF: each kind of block against the `gguf` package's own reading, and files in parts."""

from pathlib import Path

import gguf
import numpy as np
import openvino as ov
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

from slipstream.errors import ModelError, UnsupportedModelError
from slipstream.models.gguf import GGUF, decoder_of
from slipstream.models.gguf.quantised import groups_of, is_exact
from slipstream.models.gguf.weights import compressed
from tests.unit.test_models import write_gguf

Kind = GGMLQuantizationType
HALVES = {
    Kind.Q8_0: [0],
    Kind.Q4_0: [0],
    Kind.Q4_1: [0, 2],
    Kind.Q5_0: [0],
    Kind.Q5_1: [0, 2],
    Kind.Q2_K: [80, 82],
    Kind.Q3_K: [108],
    Kind.Q4_K: [0, 2],
    Kind.Q5_K: [0, 2],
    Kind.Q6_K: [208],
    Kind.IQ4_NL: [0],
    Kind.IQ4_XS: [0],
    Kind.MXFP4: [],
    Kind.IQ3_XXS: [0],
    Kind.TQ1_0: [52],
}
"""Where a block has its scales; any other byte may be anything."""


def random_tensor(kind: Kind, rows: int = 24) -> tuple[np.ndarray, tuple[int, int]]:
    block, size = GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(0)
    blocks = random.integers(0, 256, (2 * rows, size), dtype=np.uint8)
    for at in HALVES[kind]:
        scales = random.normal(size=(2 * rows, 1)) * 0.01
        scales[5] = 0  # a block of nothing, or of its minimum alone
        blocks[:, at : at + 2] = scales.astype(np.float16).view(np.uint8)
    if kind == Kind.MXFP4:
        blocks[:, 0] = random.integers(115, 130, 2 * rows)
    return blocks.reshape(rows, -1), (rows, 2 * block)


@pytest.mark.parametrize("kind", HALVES, ids=lambda kind: kind.name)
def test_weights_keep_their_values(kind: Kind) -> None:
    data, shape = random_tensor(kind)
    expected = dequantize(data, kind).reshape(shape)
    groups = groups_of(kind, data, shape)
    model = ov.Model([compressed(groups)], [])
    (found,) = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})().values()
    error = np.sqrt(((found - expected) ** 2).mean() / (expected**2).mean())
    assert error < (5e-4 if is_exact(kind) else 1e-2)


def test_four_bits_stay_four_bits() -> None:
    data, shape = random_tensor(Kind.Q4_K)
    assert groups_of(Kind.Q4_K, data, shape).bits == 4


def split(path: Path, count: int) -> list[Path]:
    """A file's tensors in several, the metadata in the first."""
    whole = gguf.GGUFReader(path)
    names = [path.with_name(f"m-{index + 1:05}-of-{count:05}.gguf") for index in range(count)]
    for index, name in enumerate(names):
        writer = gguf.GGUFWriter(name, "llama")
        if index == 0:
            for key, field in whole.fields.items():
                if not key.startswith("GGUF.") and key != "general.architecture":
                    kind = field.types[0]
                    inner = field.types[1] if len(field.types) > 1 else None
                    writer.add_key_value(key, field.contents(), kind, inner)
        writer.add_uint16("split.count", count)
        for tensor in whole.tensors[index::count]:
            writer.add_tensor(tensor.name, tensor.data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return names


def test_a_file_in_parts_is_one_model(tmp_path: Path) -> None:
    whole = GGUF.read(write_gguf(tmp_path / "whole.gguf"))
    parts = split(tmp_path / "whole.gguf", 3)
    file = GGUF.read(parts[0])
    assert file.paths == tuple(parts)
    assert set(file.tensors) == set(whole.tensors)
    with pytest.raises(ModelError, match="one of 3 files of a model; name the first"):
        GGUF.read(parts[1])
    parts[2].unlink()
    parts[0].touch()
    with pytest.raises(ModelError, match="beside it lacks m-00003-of-00003"):
        GGUF.read(parts[0])


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("llama.attn_logit_softcapping", "50", "caps what attention scores"),
        ("llama.attention.shared_kv_layers", "2", "layers that share keys and values"),
        ("llama.embedding_length_per_layer_input", "8", "embeddings for each layer"),
        ("llama.rope.scaling.type", "curled", "scales rotary positions by 'curled'"),
    ],
)
def test_what_the_graph_would_leave_out_is_refused(tmp_path: Path, key: str, value: str, named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        decoder_of(GGUF.read(write_gguf(tmp_path / "m.gguf", **{key: value})))
