"""Tiny models of `transformers` on our operators, and one step of theirs."""

from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from slipstream.backend.steps import BLOCK_SIZE, PagedChunk, lay_out
from slipstream.backend.torch.hooks import NAME
from slipstream.backend.torch.model import TorchModel
from slipstream.backend.torch.operators import Operators, Step
from slipstream.backend.torch.staging import Staging
from tests.torch_backend.tiny import ARCHITECTURES, OTHERS, SHAPE

VOCABULARY = 320
_OURS = {"attn_implementation": NAME, "experts_implementation": NAME}
_CHUNK = PagedChunk(np.arange(20, dtype=np.int32), 0, np.array([1], np.int32), 20)


def of_folder(folder: Path, operators: Operators, dtype: torch.dtype) -> TorchModel:
    """That of a folder, computed in some precision."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **_OURS)
    return TorchModel(model.eval(), folder, operators)


def of_architecture(name: str, operators: Operators, **shape: int) -> TorchModel:
    """One in bfloat16 that is in no folder, with a small vocabulary, and what else its shape differs in."""
    config = SHAPE | (ARCHITECTURES | OTHERS)[name] | {"vocab_size": VOCABULARY} | shape
    if "num_hidden_layers" in shape:
        config.pop("layer_types", None)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **config), dtype=torch.bfloat16, **_OURS)
    return TorchModel(model.eval(), Path(), operators)


def step() -> Step:
    """A step of 20 tokens, without a past, on a processor."""
    return Step.of(lay_out([_CHUNK], 20, 20), BLOCK_SIZE, Staging(torch.device("cpu")))


def logits_of(model: TorchModel) -> torch.Tensor:
    """What a model computes in it, [20, vocab_size]."""
    model.allocate(2 * (1 + model.window_tables))
    model.start(lay_out([_CHUNK], 20, 20, windows=model.window_tables))
    return torch.from_numpy(model.finish().host().copy())
