"""Folders of safetensors become models, or are refused by name; needs no torch."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from slipstream import Engine, EngineConfig
from slipstream.errors import ModelError, UnsupportedModelError
from slipstream.models import Model, ModelStore, safetensors
from slipstream.models.sources import HubSource

CONFIG: dict[str, Any] = {"model_type": "qwen3", "vocab_size": 320, "max_position_embeddings": 512, "eos_token_id": 7}
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def folder(model: Model, tmp_path: Path) -> Path:
    """A model in two files, as a hub has it."""
    folder = tmp_path / "Tiny-Qwen3"
    folder.mkdir()
    for shard in SHARDS:
        save_file({shard[:11]: np.ones(3, np.float16)}, folder / shard)
    (folder / safetensors.INDEX_FILE).write_text(json.dumps({"weight_map": {shard[:11]: shard for shard in SHARDS}}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "model.fp32.bin").write_text("of no use")
    shutil.copy(model.tokenizer_path, folder)
    return folder


@pytest.fixture
def models(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "home")


def test_a_folder_becomes_a_model(models: ModelStore, folder: Path) -> None:
    found = models.ensure(str(folder))
    assert (found.name, found.weights, found.manifest.architecture) == ("tiny-qwen3", "safetensors", "qwen3")
    assert {*found.manifest.files} == {*SHARDS, safetensors.INDEX_FILE, "config.json", "tokenizer.json"}
    assert 7 in found.manifest.stop_token_ids
    assert models.get(str(folder)) == found
    save_file({"other": np.zeros(3, np.float16)}, folder / SHARDS[1])
    assert models.get(str(folder)) is None, "other weights are another model"


def test_a_missing_part_is_named(models: ModelStore, folder: Path) -> None:
    (folder / SHARDS[1]).unlink()
    with pytest.raises(ModelError, match=f"it has no {SHARDS[1]}"):
        models.ensure(str(folder))


def test_a_broken_index_is_named(models: ModelStore, folder: Path) -> None:
    (folder / safetensors.INDEX_FILE).write_text("[]")
    with pytest.raises(ModelError, match="no index of weights"):
        models.ensure(str(folder))


def rotated(*locations: str) -> dict[str, Any]:
    """What a `config.json` says of weights in compressed-tensors that products were rotated for."""
    rotations = {"R1": {"type": "hadamard", "apply": [{"targets": ["Linear"], "location": each} for each in locations]}}
    return {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "sparsity_config": {"format": "dense"},
            "transform_config": {"config_groups": rotations},
        }
    }


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"model_type": "gemma4_text"}, "models of type gemma4_text"),
        ({"model_type": "qwen3_5"}, "models of type qwen3_5"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "qwen3 with layers of linear_attention"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rotary positions of type longrope"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rotary positions of type dynamic"),
        ({"rope_parameters": {"full_attention": {"rope_type": "longrope"}}}, "rotary positions of type longrope"),
        ({"quantization_config": {"quant_method": "awq", "bits": 8}}, r"quantised by awq \(8 bits, gemm\)"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4, "version": "gemv"}}, r"awq \(4 bits, gemv\)"),
        ({"quantization_config": {"quant_method": "fp8", "fmt": "e5m2"}}, r"quantised by fp8 \(e5m2\)"),
        (
            {"quantization_config": {"quant_method": "compressed-tensors", "format": "marlin-24"}},
            r"compressed-tensors \(marlin-24\)",
        ),
        (
            {
                "quantization_config": {
                    "quant_method": "compressed-tensors",
                    "format": "float-quantized",
                    "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "float"}}},
                }
            },
            "quantised by compressed-tensors",
        ),
        (
            {
                "quantization_config": {
                    "quant_method": "compressed-tensors",
                    "format": "float-quantized",
                    "sparsity_config": {"format": "sparse-24-bitmask"},
                }
            },
            r"compressed-tensors \(float-quantized, sparse\)",
        ),
        (rotated("weight_input", "input"), r"compressed-tensors \(pack-quantized, activations rotated\)"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "qwen3 quantised by mxfp4: .* or gptq"),
        (
            {"model_type": "gpt_oss", "quantization_config": {"quant_method": "fp8"}},
            "gpt_oss quantised by fp8: .* or quantised by mxfp4",
        ),
        (
            {"model_type": "qwen3_moe", "quantization_config": {"quant_method": "gptq", "bits": 4, "desc_act": True}},
            r"experts of qwen3_moe quantised by gptq in the order of activations",
        ),
        (
            {
                "model_type": "glm4_moe",
                "quantization_config": {
                    "quant_method": "compressed-tensors",
                    "format": "pack-quantized",
                    "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int", "actorder": "group"}}},
                },
            },
            r"experts of glm4_moe .* in the order of activations",
        ),
    ],
)
def test_what_cannot_be_computed_exactly_is_refused(
    models: ModelStore, folder: Path, config: dict[str, Any], named: str
) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    with pytest.raises(UnsupportedModelError, match=named):
        models.ensure(str(folder))
    assert models.list() == []


def test_rotated_weights_are_taken(models: ModelStore, folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG | rotated("weight_input", "weight_output")))
    assert models.ensure(str(folder)).weights == "safetensors"


def test_other_rotations_are_taken(models: ModelStore, folder: Path) -> None:
    rotations = {"full_attention": {"rope_type": "yarn"}, "sliding_attention": {"rope_type": "default"}}
    (folder / "config.json").write_text(json.dumps(CONFIG | {"rope_parameters": rotations}))
    assert models.ensure(str(folder)).weights == "safetensors"


def test_a_repository_without_other_weights(
    folder: Path, tmp_path: Path, models: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {path.name: path for path in folder.iterdir()}
    listed: list[str] = [*files]
    fetched: list[str] = []

    def snapshot(repo: str, *, allow_patterns: list[str]) -> str:
        fetched.extend(name for name in files if any(Path(name).match(pattern) for pattern in allow_patterns))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda *_: listed)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda _, name: str(files[name]))
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    found = models.ensure("some/Tiny-Qwen3")
    assert (found.name, found.weights) == ("tiny-qwen3", "safetensors")
    assert sorted(fetched) == sorted({*files} - {"model.fp32.bin"})
    assert models.get("some/Tiny-Qwen3") == found
    listed.append("tiny-Q4_K_M.gguf")
    assert HubSource("some/Tiny-Qwen3").resolved().file == "tiny-Q4_K_M.gguf", "a GGUF file goes first"
    listed.pop()
    (folder / "config.json").write_text(json.dumps(CONFIG | {"model_type": "mamba"}))
    with pytest.raises(UnsupportedModelError, match="models of type mamba"):
        HubSource("some/Tiny-Qwen3").resolved()


def test_without_torch_it_is_said_what_to_install(
    models: ModelStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "slipstream.backend.torch.backend", raising=False)
    found = models.ensure(str(folder))
    with pytest.raises(ModelError, match=r"pip install 'slipstream\[gpu\]'"):
        Engine(found, EngineConfig())


def test_a_model_for_processors_takes_no_gpu(model: Model) -> None:
    with pytest.raises(ModelError) as raised:
        Engine(model, EngineConfig(device="cuda"))
    assert raised.value.worded({"device": "--device"}).endswith("leave out --device")
