"""Folders of safetensors as model hubs have them: which files are of use, and which models can be computed."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from slipstream.errors import ModelError, UnsupportedModelError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
REQUIRED = ("tokenizer.json", CONFIG_FILE)
OPTIONAL = ("generation_config.json", "tokenizer_config.json", "chat_template.jinja")
PATTERNS = (WEIGHTS_FILE, INDEX_FILE, "model-*-of-*.safetensors", *REQUIRED, *OPTIONAL)
"""What is fetched of a repository."""

ARCHITECTURES = frozenset(
    (
        "cohere2",
        "ernie4_5",
        "gemma2",
        "gemma3_text",
        "glm4",
        "glm4_moe",
        "gpt_oss",
        "granite",
        "llama",
        "ministral3",
        "mistral",
        "olmo3",
        "phi3",
        "qwen2",
        "qwen3",
        "qwen3_moe",
        "seed_oss",
        "smollm3",
    )
)
"""By `model_type`: those compared with `transformers`' own attention and found exact."""

_BY_EXPERT = ("awq", "compressed-tensors", "fp8", "gptq")
_MIXTURES = {"glm4_moe": _BY_EXPERT, "gpt_oss": ("mxfp4",), "qwen3_moe": _BY_EXPERT}
"""How weights of experts may be quantised, by method."""
_PACKED = {"awq": ("gemm",), "gptq": ("gptq", "gptq_v2")}
"""How weights of 4 bits may be packed, by method."""
_COMPRESSED = {"float-quantized": (8, "float"), "pack-quantized": (4, "int")}
"""Bits and type of weights in the formats of compressed-tensors."""
_LAYERS = frozenset(("full_attention", "sliding_attention"))
_ROTATIONS = frozenset(("default", "linear", "llama3", "yarn"))
"""The others turn by how long the longest sequence of a step is, so that a token's bits depend on its neighbours."""


def files_of(folder: Path) -> dict[str, Path]:
    """What is of use in a folder of safetensors, by name; empty if it is none.

    Raises `ModelError` if a file of the weights is missing.
    """
    weights = _weights_of(folder)
    if not weights:
        return {}
    if missing := [name for name in (*REQUIRED, *weights) if not (folder / name).is_file()]:
        raise ModelError(f"{folder} is no whole folder of safetensors: it has no {', '.join(missing)}")
    names = (*REQUIRED, *OPTIONAL, *weights)
    return {name: folder / name for name in names if (folder / name).is_file()}


def are_in(files: Iterable[str]) -> bool:
    """Whether a repository's files are a model in safetensors, and there is no GGUF file beside it."""
    names = {*files}
    return bool(names & {WEIGHTS_FILE, INDEX_FILE}) and not any(name.lower().endswith(".gguf") for name in names)


def check(config: dict[str, Any]) -> None:
    """Refuse a model that can't be computed exactly, by what its `config.json` says; raises `UnsupportedModelError`."""
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"models of type {kind} are not supported as safetensors; supported: {', '.join(sorted(ARCHITECTURES))}. "
            "A GGUF file or an OpenVINO IR of it may be, see docs/models.md"
        )
    if others := sorted({*(config.get("layer_types") or ())} - _LAYERS):
        raise UnsupportedModelError(
            f"{kind} with layers of {', '.join(others)}, whose state is more than keys and values"
        )
    if others := sorted(_rotations(config) - _ROTATIONS):
        raise UnsupportedModelError(
            f"{kind} with rotary positions of type {', '.join(others)}, which depend on the length of other sequences"
        )
    if quantisation := config.get("quantization_config"):
        _check_quantisation(kind, quantisation)


def _check_quantisation(kind: str, quantisation: dict[str, Any]) -> None:
    """Refuse weights that are quantised in a way that isn't known."""
    method = str(quantisation.get("quant_method", "an unknown kind"))
    stored, known = _stored(method, quantisation)
    if not known:
        raise UnsupportedModelError(
            f"weights quantised by {method} ({stored}) are not supported as safetensors: "
            "take the model in bfloat16 or float16, FP8, or 4 bits by AWQ, GPTQ or compressed-tensors"
        )
    methods = _MIXTURES.get(kind, _BY_EXPERT)
    if method not in methods:
        others = " or ".join(methods)
        raise UnsupportedModelError(f"{kind} quantised by {method}: take it in bfloat16, or quantised by {others}")
    ordered = any(weights.get("actorder") in ("group", "dynamic") for weights in _groups(quantisation))
    if kind in _MIXTURES and (ordered or quantisation.get("desc_act")):
        raise UnsupportedModelError(
            f"experts of {kind} quantised by {method} in the order of activations (desc_act, or actorder of groups): "
            "take the model without it"
        )


def _stored(method: str, quantisation: dict[str, Any]) -> tuple[str, bool]:
    """How a method leaves weights, in words, and whether that is known."""
    if method == "fp8":
        number = str(quantisation.get("fmt") or "e4m3")
        return number, number == "e4m3"
    if method == "mxfp4":
        return "4 bits", True
    if method == "compressed-tensors":
        layout = str(quantisation.get("format"))
        kinds = {(each.get("num_bits"), each.get("type")) for each in _groups(quantisation)}
        if more := _beyond_weights(quantisation):
            return f"{layout}, {more}", False
        return layout, layout in _COMPRESSED and kinds <= {_COMPRESSED[layout]}
    layouts, bits = _PACKED.get(method, ("an unknown layout",)), quantisation.get("bits")
    layout = str(quantisation.get("version" if method == "awq" else "checkpoint_format") or layouts[0])
    return f"{bits} bits, {layout}", method in _PACKED and bits == 4 and layout.lower() in layouts


def _groups(quantisation: dict[str, Any]) -> list[dict[str, Any]]:
    """What is said of the weights of each group of layers in compressed-tensors."""
    return [group.get("weights") or {} for group in (quantisation.get("config_groups") or {}).values()]


def _beyond_weights(compressed: dict[str, Any]) -> str:
    """What compressed-tensors did beside quantising weights and needs code of its own, in words; empty if nothing."""
    if (compressed.get("sparsity_config") or {}).get("format", "dense") != "dense":
        return "sparse"
    rotations = ((compressed.get("transform_config") or {}).get("config_groups") or {}).values()
    places = [str(each.get("location")) for rotation in rotations for each in rotation.get("apply") or ()]
    return "" if all(place.startswith("weight_") for place in places) else "activations rotated"


def _weights_of(folder: Path) -> list[str]:
    """The names of the files with weights, their index among them."""
    index = folder / INDEX_FILE
    if not index.is_file():
        return [WEIGHTS_FILE] if (folder / WEIGHTS_FILE).is_file() else []
    try:
        return [INDEX_FILE, *sorted(set(json.loads(index.read_bytes())["weight_map"].values()))]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is no index of weights: {error}") from error


def _rotations(config: dict[str, Any]) -> set[str]:
    """The types of rotary positions, which older files have elsewhere, and which may differ by type of layer."""
    described = config.get("rope_parameters") or config.get("rope_scaling") or {}
    by_layer = [each for each in described.values() if isinstance(each, dict)] or [described]
    return {str(each.get("rope_type") or each.get("type") or "default") for each in by_layer}
