"""Tiny models of several architectures: two layers of random weights, the default model's vocabulary and template."""

import json
import shutil
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from slipstream.models import Model, ModelStore

_SHAPE = {
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
_WINDOW = 40
"""Shorter than any test's longest sequence, and no multiple of a block."""

ARCHITECTURES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_SHAPE),
    "qwen3": Qwen3Config(**_SHAPE),
    "mistral": MistralConfig(**_SHAPE, sliding_window=_WINDOW),  # a window in every layer
    "gpt_oss": GptOssConfig(  # windows in every other layer, sinks, biases, experts
        **_SHAPE, sliding_window=_WINDOW, num_local_experts=8, num_experts_per_tok=2
    ),
    "qwen3_moe": Qwen3MoeConfig(**_SHAPE, moe_intermediate_size=32, num_experts=8, num_experts_per_tok=2),
}
"""The five that all suites run over."""
OTHERS: dict[str, PreTrainedConfig] = {
    "gemma3_text": Gemma3TextConfig(**_SHAPE, sliding_window=_WINDOW, query_pre_attn_scalar=16),
}
"""What is compared with `transformers` alone."""


def tiny_folder(parent: Path, name: str, *, dtype: torch.dtype = torch.float32) -> Path:
    """A folder of safetensors as model hubs have them, without a tokenizer."""
    torch.manual_seed(0)
    config = (ARCHITECTURES | OTHERS)[name]
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and sinks all alike would hide mistakes
                parameter.add_(torch.randn_like(parameter) * 0.1)
    folder = parent / f"tiny-{name.replace('_', '-')}"
    model.save_pretrained(folder)
    return folder


def add_tiny_model(home: Path, name: str, default: Model) -> Model:
    """Import one into the store at `home`, as `slipstream pull FOLDER` does."""
    folder = tiny_folder(home / "made", name)
    shutil.copy(default.tokenizer_path, folder)
    assert default.chat_template is not None
    (folder / "chat_template.jinja").write_text(default.chat_template)
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}))
    return ModelStore(home).ensure(str(folder))
