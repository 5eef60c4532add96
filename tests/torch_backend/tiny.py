"""Tiny models of several architectures: two layers of random weights, the default model's vocabulary and template."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from slipstream.models import Model, ModelStore, safetensors
from slipstream.models.safetensors import WEIGHTS_FILE

SHAPE: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 8192,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
WINDOW = 40
"""Shorter than any test's longest sequence, and no multiple of a block."""

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "mistral": {"sliding_window": WINDOW},  # in every layer
    "gpt_oss": {  # windows in every other layer, sinks, biases, experts
        "sliding_window": WINDOW,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "qwen3_moe": {"moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2},
}
"""The five that all suites run over, and what of their shape differs."""
OTHERS: dict[str, dict[str, Any]] = {
    "cohere2": {"sliding_window": WINDOW},
    "ernie4_5": {},
    "gemma2": {"sliding_window": WINDOW, "query_pre_attn_scalar": 16},  # capped scores
    "gemma3_text": {  # two layers of three with windows, which have a table each
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 16,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "glm4": {},
    "glm4_moe": {
        "moe_intermediate_size": 32,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "granite": {},
    "ministral3": {},
    "olmo3": {"sliding_window": WINDOW},
    "phi3": {},
    "qwen2": {},
    "seed_oss": {},
    "smollm3": {},
}
"""What is compared with `transformers`, and with itself over cuts."""


def tiny_folder(parent: Path, name: str, vocabulary: int = SHAPE["vocab_size"]) -> Path:
    """A folder of safetensors as model hubs have them, without a tokenizer."""
    torch.manual_seed(0)
    shape = SHAPE | (ARCHITECTURES | OTHERS)[name] | {"vocab_size": vocabulary}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **shape), dtype=torch.float32).eval()
    with torch.no_grad():
        for each, parameter in model.named_parameters():
            if parameter.dim() == 1 or each.endswith("bias"):  # norms, sinks, biases all alike would hide mistakes
                parameter.add_(torch.randn_like(parameter) * 0.1)
    folder = parent / f"tiny-{name.replace('_', '-')}"
    model.save_pretrained(folder)
    return folder


Quantise: TypeAlias = Callable[[str, int, int, int], tuple[dict[str, torch.Tensor], torch.Tensor] | None]
"""Of a weight's name, n, k and a seed: the tensors that a checkpoint has of it, and the weight; None if it's kept."""


def quantised_folders(parent: Path, architecture: str, config: dict[str, Any], quantise: Quantise) -> tuple[Path, Path]:
    """A tiny model with quantised weights, and the same with these weights as they are."""
    packed, apart = (tiny_folder(parent / name, architecture, vocabulary=320) for name in ("packed", "apart"))
    whole, parts = load_file(apart / WEIGHTS_FILE), load_file(packed / WEIGHTS_FILE)
    for seed, (name, weight) in enumerate(sorted(whole.items())):
        if weight.dim() > 1 and (found := quantise(name, *weight.shape[-2:], seed)) is not None:
            del parts[name]
            tensors, whole[name] = found
            parts |= tensors
    save_file(whole, apart / WEIGHTS_FILE, {"format": "pt"})
    save_file(parts, packed / WEIGHTS_FILE, {"format": "pt"})
    facts = json.loads((packed / "config.json").read_text()) | {"quantization_config": config}
    (packed / "config.json").write_text(json.dumps(facts))
    safetensors.check(facts)
    return packed, apart


def add_tiny_model(home: Path, name: str, default: Model) -> Model:
    """Import one into the store at `home`, as `slipstream pull FOLDER` does."""
    folder = tiny_folder(home / "made", name)
    shutil.copy(default.tokenizer_path, folder)
    assert default.chat_template is not None
    (folder / "chat_template.jinja").write_text(default.chat_template)
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}))
    return ModelStore(home).ensure(str(folder))
