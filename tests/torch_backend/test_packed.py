"""Models whose weights have 4 bits, packed as AutoAWQ and AutoGPTQ do, against the same weights taken apart."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file

from slipstream.backend.torch.kernel_operators import KernelOperators
from slipstream.backend.torch.model import TorchModel
from slipstream.backend.torch.packed import Format, Packed
from slipstream.backend.torch.plain import PlainOperators
from slipstream.errors import ModelError
from slipstream.models import safetensors
from slipstream.models.safetensors import WEIGHTS_FILE
from tests.torch_backend.cuts import logits_over_cuts
from tests.torch_backend.tiny import tiny_folder

pytestmark = pytest.mark.torch
CPU = torch.device("cpu")
GROUP = 32
Ints = npt.NDArray[np.int64]

CONFIGS: dict[str, dict[str, Any]] = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True},
    "gptq in order of activations": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True},
    "gptq 2": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "checkpoint_format": "gptq_v2"},
}


def joined(codes: Ints, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Codes [rows, columns], eight neighbours in an int32; `order` names the code that comes at each place."""
    words = sum(codes[:, code::8] << (4 * place) for place, code in enumerate(order))
    return torch.from_numpy(np.asarray(words).astype(np.uint32).view(np.int32).copy())


def quantised(n: int, k: int, config: dict[str, Any], seed: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors of a weight [n, k] as a checkpoint has them, and what it is when it's taken apart."""
    rng = np.random.default_rng(seed)
    codes, zeros = rng.integers(0, 16, (k, n)), rng.integers(1, 16, (k // GROUP, n))
    scales = rng.uniform(0.005, 0.02, (k // GROUP, n)).astype(np.float32)
    groups = np.arange(k) // GROUP
    if config.get("desc_act"):
        groups = rng.permutation(groups)
    weight = torch.from_numpy(((codes - zeros[groups]).astype(np.float32) * scales[groups]).T.copy())
    if config["quant_method"] == "awq":
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        tensors = {"qweight": joined(codes, order), "qzeros": joined(zeros, order)}
    else:
        stored = zeros if config.get("checkpoint_format") == "gptq_v2" else zeros - 1
        along_k = joined(codes.T).T.contiguous()
        tensors = {"qweight": along_k, "qzeros": joined(stored), "g_idx": torch.from_numpy(groups.astype(np.int32))}
    return tensors | {"scales": torch.from_numpy(scales)}, weight


def two_folders(parent: Path, config: dict[str, Any]) -> tuple[Path, Path]:
    """A tiny model with packed weights, and the same with these weights taken apart."""
    apart = tiny_folder(parent / "apart", "qwen2", vocabulary=320)  # which has biases
    packed = tiny_folder(parent / "packed", "qwen2", vocabulary=320)
    whole, parts = load_file(apart / WEIGHTS_FILE), load_file(packed / WEIGHTS_FILE)
    names = [name for name in whole if name.endswith("_proj.weight")]
    assert len(names) == 2 * 7
    for seed, name in enumerate(names):
        tensors, whole[name] = quantised(*parts.pop(name).shape, config, seed)
        parts |= {f"{name.removesuffix('weight')}{part}": tensor for part, tensor in tensors.items()}
    save_file(whole, apart / WEIGHTS_FILE, {"format": "pt"})
    save_file(parts, packed / WEIGHTS_FILE, {"format": "pt"})
    facts = json.loads((packed / "config.json").read_text()) | {"quantization_config": config}
    (packed / "config.json").write_text(json.dumps(facts))
    safetensors.check(facts)
    return packed, apart


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_model_computes_as_if_its_weights_were_taken_apart(config: dict[str, Any], tmp_path: Path) -> None:
    found = [logits_over_cuts(folder) for folder in two_folders(tmp_path, config)]
    if config.get("desc_act"):  # columns are summed in another order
        np.testing.assert_allclose(found[0], found[1], atol=1e-4)
    else:
        assert np.array_equal(found[0], found[1])


@pytest.mark.parametrize("rows", [1, 17])
@pytest.mark.parametrize("biased", [False, True])
def test_the_kernel_computes_what_plain_operators_do(rows: int, biased: bool) -> None:
    tensors, weight = quantised(96, 160, CONFIGS["gptq"], 3)
    packed = Format.of(CONFIGS["gptq"]).packed(tensors)
    generator = torch.Generator().manual_seed(0)
    x, bias = torch.randn(1, rows, 160, generator=generator), torch.randn(96, generator=generator) if biased else None
    assert torch.equal(packed.unpacked(0, 96, torch.float32), weight)
    expected = PlainOperators().linear(x, weight, bias)
    torch.testing.assert_close(PlainOperators().packed_linear(x, packed, bias), expected)
    torch.testing.assert_close(KernelOperators().packed_linear(x, packed, bias), expected, atol=1e-5, rtol=1e-5)


def test_weights_are_taken_apart_in_the_models_precision() -> None:
    tensors, weight = quantised(16, 64, CONFIGS["awq"], 5)
    packed = Format.of(CONFIGS["awq"]).packed(tensors)
    assert isinstance(packed, Packed)
    assert packed.group == GROUP
    assert torch.equal(packed.unpacked(3, 9, torch.bfloat16), weight[3:9].bfloat16())


@pytest.mark.parametrize("lost", ["q_proj.scales", "input_layernorm.weight"])
def test_a_weight_that_is_not_there_is_named(lost: str, tmp_path: Path) -> None:
    packed, _ = two_folders(tmp_path, CONFIGS["awq"])
    weights = load_file(packed / WEIGHTS_FILE)
    save_file(
        {name: each for name, each in weights.items() if lost not in name},
        packed / WEIGHTS_FILE,
        {"format": "pt"},
    )
    with pytest.raises(ModelError, match=rf"lacks weights .*{lost}"):
        TorchModel.load(packed, CPU, PlainOperators())
