"""Models whose weights have 4 bits, packed as each tool does, against the same weights taken apart."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file

from slipstream.backend.torch.checkpoint import Codes
from slipstream.backend.torch.kernel_operators import KernelOperators
from slipstream.backend.torch.model import TorchModel
from slipstream.backend.torch.plain import PlainOperators
from slipstream.errors import ModelError
from slipstream.models.safetensors import WEIGHTS_FILE
from tests.torch_backend.cuts import logits_over_cuts
from tests.torch_backend.tiny import quantised_folders

pytestmark = pytest.mark.torch
CPU = torch.device("cpu")
GROUP = 32
Ints = npt.NDArray[np.int64]


def compressed(**weights: Any) -> dict[str, Any]:
    described = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP, **weights}
    groups = {"group_0": {"targets": ["Linear"], "weights": described}}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}


CONFIGS: dict[str, dict[str, Any]] = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True},
    "gptq in order of activations": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True},
    "gptq 2": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "checkpoint_format": "gptq_v2"},
    "compressed": compressed(symmetric=True),
    "compressed, with zeros": compressed(symmetric=False),
    "compressed in order of activations": compressed(symmetric=True, actorder="group"),
}
ORDERED = ("gptq in order of activations", "compressed in order of activations")


def joined(codes: Ints, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Codes [rows, columns], eight neighbours in an int32; `order` names the code that comes at each place."""
    words = sum(codes[:, code::8] << (4 * place) for place, code in enumerate(order))
    return torch.from_numpy(np.asarray(words).astype(np.uint32).view(np.int32).copy())


def quantised(n: int, k: int, name: str, seed: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors of a weight [n, k] as a checkpoint has them, and what it is when it's taken apart."""
    config = CONFIGS[name]
    rng = np.random.default_rng(seed)
    codes, zeros = rng.integers(0, 16, (k, n)), rng.integers(1, 16, (k // GROUP, n))
    scales = rng.uniform(0.005, 0.02, (k // GROUP, n)).astype(np.float32)
    groups = np.arange(k) // GROUP
    if name in ORDERED:
        groups = rng.permutation(groups)
    if name == "compressed" or name in ORDERED:
        zeros[:] = 8
    weight = torch.from_numpy(((codes - zeros[groups]).astype(np.float32) * scales[groups]).T.copy())
    if config["quant_method"] == "compressed-tensors":
        tensors = {"weight_packed": joined(codes.T), "weight_scale": torch.from_numpy(scales.T.copy())}
        tensors["weight_shape"] = torch.tensor([n, k])
        if name == "compressed, with zeros":
            padded = np.pad(zeros, ((0, 0), (0, -n % 8)))
            tensors["weight_zero_point"] = joined(padded).T.contiguous()
        if name in ORDERED:
            tensors["weight_g_idx"] = torch.from_numpy(groups.astype(np.int32))
        return tensors, weight
    if config["quant_method"] == "awq":
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        tensors = {"qweight": joined(codes, order), "qzeros": joined(zeros, order)}
    else:
        stored = zeros if config.get("checkpoint_format") == "gptq_v2" else zeros - 1
        along_k = joined(codes.T).T.contiguous()
        tensors = {"qweight": along_k, "qzeros": joined(stored), "g_idx": torch.from_numpy(groups.astype(np.int32))}
    return tensors | {"scales": torch.from_numpy(scales)}, weight


def two_folders(parent: Path, name: str, architecture: str = "qwen2", kept: str = "lm_head") -> tuple[Path, Path]:
    """A tiny model with packed weights, but for those that are kept, and the same with these weights taken apart."""

    def packed_of(weight: str, n: int, k: int, seed: int) -> tuple[dict[str, torch.Tensor], torch.Tensor] | None:
        if not weight.endswith("_proj.weight") or kept in weight:
            return None
        tensors, whole = quantised(n, k, name, seed)
        return {f"{weight.removesuffix('weight')}{part}": tensor for part, tensor in tensors.items()}, whole

    return quantised_folders(parent, architecture, CONFIGS[name], packed_of)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_computes_as_if_its_weights_were_taken_apart(name: str, tmp_path: Path) -> None:
    found = [logits_over_cuts(folder) for folder in two_folders(tmp_path, name)]  # with biases
    if name in ORDERED:  # columns are summed in another order
        np.testing.assert_allclose(found[0], found[1], atol=1e-4)
    else:
        assert np.array_equal(found[0], found[1])


def test_a_quantised_head_has_its_own_weight(tmp_path: Path) -> None:
    """Also if a `config.json` says that embeddings are tied to it."""

    def packed_of(weight: str, n: int, k: int, seed: int) -> tuple[dict[str, torch.Tensor], torch.Tensor] | None:
        if weight != "lm_head.weight":
            return None
        tensors, whole = quantised(n, k, "compressed", seed)
        return {f"lm_head.{part}": tensor for part, tensor in tensors.items()}, whole

    packed, apart = quantised_folders(tmp_path, "qwen2", CONFIGS["compressed"], packed_of)
    facts = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps(facts | {"tie_word_embeddings": True}))
    assert np.array_equal(logits_over_cuts(packed), logits_over_cuts(apart))


@pytest.mark.parametrize(
    ("name", "architecture", "kept"),
    [
        ("awq", "qwen3_moe", "lm_head"),
        ("gptq", "glm4_moe", "layers.0."),  # which has no experts
        ("compressed, with zeros", "qwen3_moe", "layers.1.mlp.experts"),
    ],
)
def test_experts_compute_as_if_their_weights_were_taken_apart(
    name: str, architecture: str, kept: str, tmp_path: Path
) -> None:
    packed, apart = two_folders(tmp_path, name, architecture, kept)
    assert np.array_equal(logits_over_cuts(packed), logits_over_cuts(apart))


def test_experts_in_the_order_of_activations_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which a `config.json` that doesn't say so lets through."""
    monkeypatch.setitem(CONFIGS, "compressed in order of activations", compressed(symmetric=True))
    packed, _ = two_folders(tmp_path, "compressed in order of activations", "qwen3_moe")
    with pytest.raises(ModelError, match="weights of experts have columns in the order of activations"):
        TorchModel.load(packed, CPU, PlainOperators())


def test_experts_stored_in_several_ways_are_named(tmp_path: Path) -> None:
    packed, _ = two_folders(tmp_path, "awq", "qwen3_moe", "experts.3.up_proj")
    with pytest.raises(ModelError, match="experts are stored in several ways"):
        TorchModel.load(packed, CPU, PlainOperators())


@pytest.mark.parametrize("rows", [1, 17])
@pytest.mark.parametrize("biased", [False, True])
def test_the_kernel_computes_what_plain_operators_do(rows: int, biased: bool) -> None:
    tensors, weight = quantised(96, 160, "gptq", 3)
    packed = Codes.of(CONFIGS["gptq"]).weight(tensors)
    generator = torch.Generator().manual_seed(0)
    x, bias = torch.randn(1, rows, 160, generator=generator), torch.randn(96, generator=generator) if biased else None
    assert torch.equal(packed.unpacked(0, 96, torch.float32), weight)
    expected = PlainOperators().linear(x, weight, bias)
    torch.testing.assert_close(PlainOperators().linear(x, packed, bias), expected)
    torch.testing.assert_close(KernelOperators().linear(x, packed, bias), expected, atol=1e-5, rtol=1e-5)


def test_weights_are_taken_apart_in_the_models_precision() -> None:
    tensors, weight = quantised(16, 64, "awq", 5)
    packed = Codes.of(CONFIGS["awq"]).weight(tensors)
    assert packed.columns == GROUP
    assert torch.equal(packed.unpacked(3, 9, torch.bfloat16), weight[3:9].bfloat16())


@pytest.mark.parametrize(("name", "scales"), [("gptq", "scales"), ("compressed", "weight_scale")])
def test_scales_keep_their_own_precision(name: str, scales: str, tmp_path: Path) -> None:
    """Tools store them in float16 beside a bfloat16 model, which has fewer bits of fraction."""
    packed, _ = two_folders(tmp_path, name)
    weights = load_file(packed / WEIGHTS_FILE)
    given = weights[f"model.layers.0.mlp.down_proj.{scales}"].half()
    save_file({each: of.half() if each.endswith(scales) else of for each, of in weights.items()}, packed / WEIGHTS_FILE)
    facts = json.loads((packed / "config.json").read_text()) | {"dtype": "bfloat16"}
    (packed / "config.json").write_text(json.dumps(facts))
    model = TorchModel.load(packed, CPU, PlainOperators())
    assert model.precision == "bfloat16"
    found = model._model.get_submodule("model.layers.0.mlp.down_proj").weight.scales
    assert torch.equal(found, given if name == "compressed" else given.T)


def test_scales_of_an_unknown_shape_are_named(tmp_path: Path) -> None:
    packed, _ = two_folders(tmp_path, "compressed")
    weights = load_file(packed / WEIGHTS_FILE)
    name = "model.layers.0.self_attn.q_proj.weight_scale"
    save_file(weights | {name: torch.ones(64, 3)}, packed / WEIGHTS_FILE)
    with pytest.raises(ModelError, match=r"q_proj has a weight of 64 x 64 in 4 bits, and scales of \(64, 3\)"):
        TorchModel.load(packed, CPU, PlainOperators())


def test_a_file_that_ends_early_is_named(tmp_path: Path) -> None:
    packed, _ = two_folders(tmp_path, "awq")
    path = packed / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ModelError, match="can't be loaded"):
        TorchModel.load(packed, CPU, PlainOperators())


@pytest.mark.parametrize(
    ("name", "lost", "message"),
    [
        ("awq", "input_layernorm.weight", "lacks weights .*input_layernorm.weight"),
        ("awq", "q_proj.qzeros", "lacks weights .*q_proj.qzeros"),
        ("awq", "q_proj.scales", "q_proj has a quantised weight, and no scale"),
        ("compressed", "q_proj.weight_scale", "q_proj has a quantised weight, and no scale"),
    ],
)
def test_a_weight_that_is_not_there_is_named(name: str, lost: str, message: str, tmp_path: Path) -> None:
    packed, _ = two_folders(tmp_path, name)
    weights = load_file(packed / WEIGHTS_FILE)
    save_file(
        {name: each for name, each in weights.items() if lost not in name},
        packed / WEIGHTS_FILE,
        {"format": "pt"},
    )
    with pytest.raises(ModelError, match=message):
        TorchModel.load(packed, CPU, PlainOperators())
