"""Tiny models of every family that GGUF import knows: random weights, transformers' word, files by llama.cpp.

    python -m tests.models.judged FOLDER CONVERTER [FAMILY…]

CONVERTER is llama.cpp's source, whose `convert_hf_to_gguf.py` writes FAMILY.gguf; FAMILY.npz holds a prompt and the
logarithms of transformers' probabilities. Run by tests in a process of its own, since both need torch and much memory.
"""

import runpy
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.models import families as templates

TOKENS = 512
"""In the vocabulary."""
PROMPT = 192
"""Tokens, three times a sliding window."""
WINDOW = 64

_SYLLABLES = [(a, b) for a in "bcdfghklmnprst" for b in "aeiou"]

_SHAPE = {
    "vocab_size": TOKENS,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 96}
_SLIDING, _FULL = "sliding_attention", "full_attention"
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
_LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 64,
    "short_factor": [1.0 + 0.05 * index for index in range(16)],
    "long_factor": [1.0 + 0.5 * index for index in range(16)],
}
_MIXED = ["linear_attention", _FULL] * 2
_DELTA = {
    "layer_types": _MIXED,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 24,
    "linear_value_head_dim": 24,
}
_PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 10000.0,
}

FAMILIES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rope_parameters": _LLAMA3}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "ministral3": ("Ministral3", {}),
    "qwen2": ("Qwen2", {}),
    "qwen2-yarn": ("Qwen2", {"rope_parameters": _YARN}),
    "qwen2-moe": ("Qwen2Moe", {"num_experts": 8, "shared_expert_intermediate_size": 160, **_EXPERTS}),
    "qwen3": ("Qwen3", {}),
    "qwen3-moe": ("Qwen3Moe", {"num_experts": 8, "norm_topk_prob": True, **_EXPERTS}),
    "gemma3": (
        "Gemma3Text",
        {
            "num_hidden_layers": 7,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 32,
            "layer_types": [*[_SLIDING] * 5, _FULL, _SLIDING],
        },
    ),
    "gpt-oss": (
        "GptOss",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": WINDOW,
            "layer_types": [_SLIDING, _FULL] * 2,
        },
    ),
    "phi": ("Phi3", {"sliding_window": WINDOW}),
    "phi-long": (
        "Phi3",
        {"sliding_window": None, "original_max_position_embeddings": 64, "rope_parameters": _LONG_ROPE},
    ),
    "gemma4": (
        "Gemma4Text",
        {
            "num_hidden_layers": 6,
            "sliding_window": WINDOW,
            "global_head_dim": 64,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "hidden_size_per_layer_input": 0,
            "final_logit_softcapping": 30.0,
            "layer_types": [_SLIDING, _SLIDING, _FULL] * 2,
            "tie_word_embeddings": True,
        },
    ),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 1, 1, 0]}),
    "granite": (
        "Granite",
        {"embedding_multiplier": 12.0, "attention_multiplier": 0.1, "residual_multiplier": 0.3, "logits_scaling": 0.7},
    ),
    "glm4": ("Glm4", {"partial_rotary_factor": 0.5, "attention_bias": True}),
    "glm4-moe": (
        "Glm4Moe",
        {
            "partial_rotary_factor": 0.5,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "attention_bias": True,
            "use_qk_norm": True,
            "num_nextn_predict_layers": 0,
            **_EXPERTS,
        },
    ),
    "deepseek": (
        "DeepseekV3",
        {
            "num_key_value_heads": 4,
            "head_dim": 16,
            "q_lora_rank": 48,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 24,
            "qk_rope_head_dim": 16,
            "v_head_dim": 32,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 1.5,
            "norm_topk_prob": True,
            "scoring_func": "sigmoid",  # which transformers takes for granted, and files say
            **_EXPERTS,
        },
    ),
    "hunyuan": ("HunYuanDenseV1", {}),
    "ernie4.5": ("Ernie4_5", {"use_bias": False}),
    "seed-oss": ("SeedOss", {}),
    "olmo2": ("Olmo2", {}),
    "qwen3.5": ("Qwen3_5Text", {**_DELTA, "rope_parameters": {**_PARTIAL, "mrope_section": [2, 1, 1]}}),
    "qwen3.5-moe": (
        "Qwen3_5MoeText",
        {
            **_DELTA,
            **_EXPERTS,
            "num_experts": 8,
            "shared_expert_intermediate_size": 160,
            "rope_parameters": {**_PARTIAL, "mrope_section": [2, 1, 1]},
        },
    ),
    "qwen3-next": (
        "Qwen3Next",
        {
            **_DELTA,
            **_EXPERTS,
            "num_experts": 8,
            "shared_expert_intermediate_size": 160,
            "decoder_sparse_step": 1,
            "rope_parameters": _PARTIAL,
        },
    ),
    "granite-hybrid": (
        "GraniteMoeHybrid",
        {
            "layer_types": ["mamba", "attention"] * 2,
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "shared_intermediate_size": 192,
            "mamba_n_heads": 8,
            "mamba_d_head": 32,
            "mamba_d_state": 24,
            "mamba_n_groups": 1,
            "position_embedding_type": "nope",
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.1,
            "residual_multiplier": 0.3,
            "logits_scaling": 0.7,
        },
    ),
    "lfm2": (
        "Lfm2",
        {"layer_types": ["conv", _FULL, "conv", _FULL], "block_auto_adjust_ff_dim": False, "tie_word_embeddings": True},
    ),
}
"""transformers' class and what its configuration has beside the shape."""


def deviation(found: Any, expected: Any) -> float:
    """The largest, among the ten likeliest tokens of each position."""
    import numpy as np

    likeliest = np.argsort(-expected, axis=-1)[:, :10]
    return float(np.abs(np.take_along_axis(found - expected, likeliest, axis=-1)).max())


def main() -> None:
    """Make the families that are named, or all."""
    folder, converter = map(Path, sys.argv[1:3])
    for name in sys.argv[3:] or FAMILIES:
        model = model_of(*FAMILIES[name])
        save(model, folder / name, folder / f"{name}.npz")
        _convert(folder / name, folder / f"{name}.gguf", converter)


def model_of(kind: str, more: Mapping[str, Any]) -> Any:
    """A tiny model of a family; see `FAMILIES`."""
    import torch
    import transformers

    config = getattr(transformers, f"{kind}Config")(**{**_SHAPE, **more})
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    _draw(model, norms_around=0.0 if kind.startswith(("Gemma3", "Qwen3_5", "Qwen3Next")) else 1.0)
    return model


def _draw(model: Any, norms_around: float) -> None:
    """Weights that can tell: probabilities over several nats, no bias and no sink near zero, norms that differ."""
    import torch

    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        drawn_too = ("correction_bias", "layer_scalar")
        buffers = ((name, buffer) for name, buffer in model.named_buffers() if name.endswith(drawn_too))
        for name, weight in (*model.named_parameters(), *buffers):
            drawn = torch.randn(weight.shape, generator=generator)
            if weight.dim() == 1:
                around_one = "norm" in name or "scalar" in name
                weight.copy_(norms_around + 0.3 * drawn if around_one else 0.5 * drawn)
            elif "embed" in name:
                weight.copy_(drawn)
            else:
                weight.copy_(drawn * (2 if "lm_head" in name else 1) / weight.shape[-1] ** 0.5)


def save(model: Any, folder: Path, judged: Path) -> None:
    """Write a model as model hubs have it, and what it says of a prompt."""
    import numpy as np
    import torch

    folder.mkdir()
    model.save_pretrained(folder)
    if model.config.model_type == "granitemoehybrid":  # whose converter knows the names of before
        config = (folder / "config.json").read_text()
        (folder / "config.json").write_text(config.replace('"full_attention"', '"attention"'))
    _tokenizer().save_pretrained(folder)
    tokens = torch.randint(0, TOKENS, (1, PROMPT), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        logits = model(tokens).logits[0].double()
    np.savez(judged, tokens=tokens[0].numpy().astype(np.int32), judged=logits.log_softmax(-1).numpy())


def _tokenizer() -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: id for id, text in enumerate([*alphabet, *map("".join, _SYLLABLES)])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=_SYLLABLES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    special += [f"<|extra_{index}|>" for index in range(TOKENS - len(vocabulary) - len(special))]
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    template = next(family.template for family in templates.FAMILIES if family.name.startswith("qwen"))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=special[0], eos_token=special[2], chat_template=template
    )


def _more(folder: Path) -> list[str]:
    """What the converter has to be told besides: that there are no layers that draft."""
    return ["--no-nextn"] if folder.name.startswith(("qwen3.5", "qwen3-next")) else []


def _convert(folder: Path, target: Path, converter: Path) -> None:
    """Write the GGUF, in float32; the vocabulary as byte-level BPE, whatever the family's own is."""
    sys.path[:0] = [str(converter), str(converter / "gguf-py")]
    import conversion  # type: ignore[import-not-found]
    from conversion.base import TextModel  # type: ignore[import-not-found]

    TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    real: Callable[..., Any] = conversion.get_model_class

    def with_this_vocabulary(name: str, mmproj: bool = False) -> Any:
        kind = real(name, mmproj)
        kind.set_vocab = lambda self: self._set_vocab_gpt2()
        return kind

    conversion.get_model_class = with_this_vocabulary
    arguments = sys.argv
    sys.argv = ["convert_hf_to_gguf.py", str(folder), "--outfile", str(target), "--outtype", "f32", *_more(folder)]
    try:
        runpy.run_path(str(converter / "convert_hf_to_gguf.py"), run_name="__main__")
    finally:
        sys.argv = arguments
        conversion.get_model_class = real
        del sys.path[:2]


if __name__ == "__main__":
    main()
