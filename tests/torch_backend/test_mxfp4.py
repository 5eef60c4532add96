"""Experts whose weights are MXFP4, as gpt-oss has them, against the same weights taken apart."""

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
EXPERTS = 8
NUMBERS = np.array([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
CONFIG: dict[str, Any] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}


def quantised(weight: str, k: int, n: int, seed: int) -> tuple[dict[str, torch.Tensor], torch.Tensor] | None:
    """Of experts' weights, which have k before n if they are as they are, and after it in blocks."""
    if ".experts." not in weight or weight.endswith("bias"):
        return None
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 16, (EXPERTS, n, k // 32, 32)).astype(np.uint8)
    exponents = rng.integers(118, 122, (EXPERTS, n, k // 32)).astype(np.uint8)
    whole = NUMBERS[codes] * np.exp2(exponents.astype(np.float32) - 127)[..., None]
    blocks = codes[..., ::2] | codes[..., 1::2] << 4
    tensors = {f"{weight}_blocks": torch.from_numpy(blocks), f"{weight}_scales": torch.from_numpy(exponents)}
    return tensors, torch.from_numpy(whole.reshape(EXPERTS, n, k)).mT.contiguous()


def test_a_model_computes_as_if_its_weights_were_taken_apart(tmp_path: Path) -> None:
    packed, apart = quantised_folders(tmp_path, "gpt_oss", CONFIG, quantised)
    found, expected = logits_over_cuts(packed), logits_over_cuts(apart)
    np.testing.assert_allclose(found, expected, atol=1e-5)  # products of weights that lie the other way round


def test_blocks_that_are_not_there_are_named(tmp_path: Path) -> None:
    packed, _ = quantised_folders(tmp_path, "gpt_oss", CONFIG, quantised)
    weights = load_file(packed / WEIGHTS_FILE)
    lost = "model.layers.1.mlp.experts.gate_up_proj_blocks"
    del weights[lost]
    save_file(weights, packed / WEIGHTS_FILE, {"format": "pt"})
    with pytest.raises(ModelError, match=f"lacks weights .*{lost}"):
        TorchModel.load(packed, torch.device("cpu"), PlainOperators())


def test_the_kernel_reads_every_number() -> None:
    codes = torch.arange(16, dtype=torch.int32).repeat(2, 2)
    held = (codes.view(2, 4, 8) << torch.arange(0, 32, 4, dtype=torch.int32)).sum(-1, dtype=torch.int32)
    scales = torch.tensor([[0.5], [4.0]], dtype=torch.bfloat16)
    weight = Quantised.of_codes("e2m1", held, scales, 32)
    expected = torch.from_numpy(NUMBERS)[codes] * scales.float()
    assert torch.equal(weight.unpacked(0, 2, torch.float32), expected)
    for operators in (PlainOperators(), KernelOperators()):
        assert torch.equal(operators.linear(torch.eye(32), weight), expected.T)
