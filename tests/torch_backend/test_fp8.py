"""Models whose weights have 8 bits and scales, as FP8 checkpoints do, against the same weights multiplied out."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from slipstream.backend.torch.kernel_operators import KernelOperators
from slipstream.backend.torch.model import TorchModel
from slipstream.backend.torch.plain import PlainOperators
from slipstream.backend.torch.quantised import Quantised
from slipstream.errors import ModelError
from slipstream.models.safetensors import WEIGHTS_FILE
from tests.torch_backend.cuts import logits_over_cuts
from tests.torch_backend.tiny import quantised_folders

pytestmark = pytest.mark.torch
CPU = torch.device("cpu")
BLOCK = (64, 40)
"""Of rows and columns that share a scale; neither divides all of the tiny model's sizes."""


def compressed(strategy: str, **weights: Any) -> dict[str, Any]:
    described = {"num_bits": 8, "type": "float", "strategy": strategy, "dynamic": False, **weights}
    groups = {"group_0": {"targets": ["Linear"], "weights": described, "input_activations": {"dynamic": True}}}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": groups,
        "ignore": ["lm_head", "re:.*down_proj$"],
    }


CONFIGS: dict[str, tuple[dict[str, Any], str, str]] = {
    "blocks": ({"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [*BLOCK]}, "weight_scale_inv", "block"),
    "one": ({"quant_method": "fp8", "activation_scheme": "static"}, "weight_scale", "one"),
    "compressed, tensor": (compressed("tensor"), "weight_scale", "tensor"),
    "compressed, channel": (compressed("channel"), "weight_scale", "channel"),
    "compressed, block": (compressed("block", block_structure=[*BLOCK]), "weight_scale", "block"),
}
"""What a `config.json` says, the name of the scales, and what they are for."""


def random_numbers(n: int, k: int, seed: int) -> torch.Tensor:
    """Float8 [n, k] of all kinds: large, small, and smaller than the least with a full fraction."""
    bits = np.random.default_rng(seed).integers(0, 256, (n, k)).astype(np.uint8)
    bits[(bits & 127) == 127] = 1  # not numbers
    return torch.from_numpy(bits).view(torch.float8_e4m3fn)


def scaled(n: int, k: int, kind: str, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight [n, k] in 8 bits, its scales as a checkpoint has them, and what it is when they're multiplied."""
    rows, columns = {"block": BLOCK, "channel": (1, k)}.get(kind, (n, k))
    numbers = random_numbers(n, k, seed)
    generator = torch.Generator().manual_seed(seed)
    scales = (torch.rand(-(-n // rows), -(-k // columns), generator=generator) + 0.5) / 4000
    whole = scales.repeat_interleave(rows, 0)[:n].repeat_interleave(columns, 1)[:, :k]
    stored = scales.reshape({"one": (), "tensor": (1,)}.get(kind, scales.shape))
    return numbers, stored, numbers.float() * whole


def two_folders(
    parent: Path, config: dict[str, Any], name: str, kind: str, architecture: str = "qwen2"
) -> tuple[Path, Path]:
    """A tiny model with weights in 8 bits, and the same with these multiplied out."""

    def scaled_of(weight: str, n: int, k: int, seed: int) -> tuple[dict[str, torch.Tensor], torch.Tensor] | None:
        if not weight.endswith("_proj.weight") or ("ignore" in config and "down_proj" in weight):
            return None
        numbers, scales, whole = scaled(n, k, kind, seed)
        layer = weight.removesuffix("weight")
        return {weight: numbers, f"{layer}{name}": scales, f"{layer}input_scale": torch.ones(1)}, whole

    return quantised_folders(parent, architecture, config, scaled_of)


@pytest.mark.parametrize(("config", "name", "kind"), CONFIGS.values(), ids=CONFIGS)
def test_a_model_computes_as_if_its_weights_were_multiplied_out(
    config: dict[str, Any], name: str, kind: str, tmp_path: Path
) -> None:
    found = [logits_over_cuts(folder) for folder in two_folders(tmp_path, config, name, kind)]  # with biases
    assert np.array_equal(found[0], found[1])
    assert np.isfinite(found[0]).all()


@pytest.mark.parametrize("kind", ["blocks", "one"])
def test_experts_compute_as_if_their_weights_were_multiplied_out(kind: str, tmp_path: Path) -> None:
    """A block of rows ends beyond a gate's: what follows it has scales of its own."""
    packed, apart = two_folders(tmp_path, *CONFIGS[kind], architecture="qwen3_moe")
    assert np.array_equal(logits_over_cuts(packed), logits_over_cuts(apart))


@pytest.mark.parametrize("rows", [1, 17])
@pytest.mark.parametrize("kind", ["block", "channel", "tensor"])
def test_the_kernel_computes_what_plain_operators_do(rows: int, kind: str) -> None:
    numbers, scales, whole = scaled(96, 160, kind, 3)
    of_block = {"block": BLOCK, "channel": (1, 160), "tensor": (96, 160)}[kind]
    weight = Quantised("e4m3", numbers.view(torch.uint8), scales.reshape(-(-96 // of_block[0]), -1), *of_block)
    generator = torch.Generator().manual_seed(0)
    x, bias = torch.randn(1, rows, 160, generator=generator), torch.randn(96, generator=generator)
    assert torch.equal(weight.unpacked(0, 96, torch.float32), whole)
    assert torch.equal(weight.unpacked(3, 9, torch.bfloat16), whole[3:9].bfloat16())
    expected = PlainOperators().linear(x, whole, bias)
    torch.testing.assert_close(PlainOperators().linear(x, weight, bias), expected)
    torch.testing.assert_close(KernelOperators().linear(x, weight, bias), expected, atol=1e-5, rtol=1e-5)


def test_the_kernel_reads_every_number() -> None:
    numbers = torch.arange(256, dtype=torch.uint8)
    numbers[(numbers & 127) == 127] = 0
    weight = Quantised("e4m3", numbers.view(128, 2), torch.ones(1, 1), 128, 2)
    expected = numbers.view(torch.float8_e4m3fn).float().view(128, 2)
    assert torch.equal(KernelOperators().linear(torch.eye(2), weight), expected.T)


def test_a_weight_without_a_scale_is_named(tmp_path: Path) -> None:
    packed, _ = two_folders(tmp_path, *CONFIGS["blocks"])
    weights = load_file(packed / WEIGHTS_FILE)
    lost = "model.layers.1.mlp.up_proj.weight_scale_inv"
    del weights[lost]
    save_file(weights, packed / WEIGHTS_FILE, {"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj has a quantised weight, and no scale"):
        TorchModel.load(packed, CPU, PlainOperators())


def test_scales_of_an_unknown_shape_are_named(tmp_path: Path) -> None:
    config, name, kind = CONFIGS["blocks"]
    packed, _ = two_folders(tmp_path, config | {"weight_block_size": [32, 32]}, name, kind)
    with pytest.raises(ModelError, match=r"weight of 64 x 64 in 8 bits, and scales of \(1, 2\)"):
        TorchModel.load(packed, CPU, PlainOperators())


def test_scales_of_a_weight_that_is_not_in_8_bits_are_named(tmp_path: Path) -> None:
    packed, _ = two_folders(tmp_path, *CONFIGS["blocks"])
    weights = load_file(packed / WEIGHTS_FILE)
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file(weights | {name: weights[name].float()}, packed / WEIGHTS_FILE, {"format": "pt"})
    with pytest.raises(ModelError, match="scales of weights that have none"):
        TorchModel.load(packed, CPU, PlainOperators())
