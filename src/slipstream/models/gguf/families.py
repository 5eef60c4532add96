"""What a family's layers do, beside what its files say: the part of GGUF that stands in no metadata."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from slipstream.errors import UnsupportedModelError
from slipstream.models.gguf.file import GGUF


@dataclass(frozen=True, slots=True)
class Family:
    """How the layers of an architecture are made."""

    interleaved: bool = False
    """Whether rotary positions turn neighbouring values of a head, not values half a head apart."""
    activation: Literal["silu", "gelu", "clamped-silu"] = "silu"
    post_norms: bool = False
    """Whether what attention and the feed-forward part give is normalised before it's added."""
    feed_forward_norm: str = "ffn_norm"
    """The norm before the feed-forward part, where it has one."""
    output_norm: str = "output_norm.weight"
    """The norm before the projection to the vocabulary."""
    norm_after_rope: bool = False
    """Whether queries and keys are normalised after their rotation."""
    recurrent: Literal["", "short convolution", "delta net", "mamba 2"] = ""
    """What layers without heads for keys have in place of attention."""
    tiled_heads: bool = False
    """Whether a recurrent layer's heads of one group stand a number of groups apart, not side by side."""
    gated_attention: bool = False
    """Whether what attention gives is gated by what comes with the queries."""
    window_every: int = 0
    """With a sliding window: layers have it but each so-manieth; 0 if all have it."""
    window_base: float | None = None
    """Base of the rotations in layers with a window, if it's another than in those without; the file may say one."""
    no_rope_every: int = 0
    """Each so-manieth layer knows no positions; 0 if all do."""
    scaled_embeddings: bool = False
    """Whether embeddings are multiplied by the root of their size."""
    value_norm: bool = False
    """Whether values are normalised, without a weight; keys are values too where a layer has no weight for these."""
    gate: Literal["softmax", "softmax of the chosen", "sigmoid"] = "softmax"
    """How a mixture weighs its experts."""
    normalised_experts: bool = True
    """Whether the weights of the chosen experts add up to one."""
    exact_yarn_bounds: bool = False
    """Whether YaRN's ramp begins and ends between two dimensions."""


FAMILIES = {
    "llama": Family(interleaved=True),
    "mistral3": Family(interleaved=True),
    "granite": Family(interleaved=True),
    "ernie4_5": Family(interleaved=True),
    "smollm3": Family(interleaved=True, no_rope_every=4),
    "glm4": Family(interleaved=True, post_norms=True),
    "glm4moe": Family(feed_forward_norm="post_attention_norm", gate="sigmoid"),
    "qwen2": Family(),
    "qwen2moe": Family(normalised_experts=False),
    "qwen3": Family(),
    "qwen3moe": Family(),
    "phi3": Family(),
    "deepseek2": Family(interleaved=True),
    "seed_oss": Family(feed_forward_norm="post_attention_norm"),
    "olmo2": Family(post_norms=True),
    "hunyuan-dense": Family(norm_after_rope=True),
    "lfm2": Family(recurrent="short convolution", output_norm="token_embd_norm.weight"),
    "qwen35": Family(
        feed_forward_norm="post_attention_norm", gated_attention=True, recurrent="delta net", tiled_heads=True
    ),
    "qwen35moe": Family(
        feed_forward_norm="post_attention_norm", gated_attention=True, recurrent="delta net", tiled_heads=True
    ),
    "qwen3next": Family(feed_forward_norm="post_attention_norm", gated_attention=True, recurrent="delta net"),
    "granitehybrid": Family(interleaved=True, recurrent="mamba 2"),
    "gemma3": Family(activation="gelu", post_norms=True, window_every=6, window_base=10000.0, scaled_embeddings=True),
    "gemma4": Family(activation="gelu", post_norms=True, window_base=10000.0, scaled_embeddings=True, value_norm=True),
    "gpt-oss": Family(
        activation="clamped-silu",
        feed_forward_norm="post_attention_norm",
        window_every=2,
        gate="softmax of the chosen",
        exact_yarn_bounds=True,
    ),
}
"""Architectures by their names in GGUF. Each is judged against two other implementations: see docs/models.md."""


@dataclass(frozen=True, slots=True)
class Rotation:
    """Rotary positions: the angle of each pair of values at position 1, and what their sines are multiplied by."""

    frequencies: npt.NDArray[np.float32]
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Layer:
    """What one layer mixes tokens by: attention, or a recurrent state."""

    heads: int
    kv_heads: int
    head_size: int
    rotation: Rotation | None
    window: int = 0
    """Tokens that are seen, the own one included; 0 for all."""

    @property
    def is_recurrent(self) -> bool:
        """Whether it keeps a recurrent state in place of keys and values."""
        return not self.kv_heads


@dataclass(frozen=True, slots=True)
class Recurrent:
    """The sizes of recurrent layers: `heads` of `head` values each keep `state` values for each of them.

    Heads of one of the `groups` share what is written to their states and read from them.
    """

    heads: int
    head: int
    groups: int
    state: int


@dataclass(frozen=True, slots=True)
class Latent:
    """Sizes of latent attention: one vector for each token, from which all heads' keys and values are made.

    It's kept in place of them: a key is that vector and the turned part that heads share, a value is the vector alone.
    Source: DeepSeek-V2 (arXiv 2405.04434); what each head makes of it is absorbed into queries and outputs.
    """

    rank: int
    """Of the vector."""
    plain: int
    """Values of a head's query that know no position."""
    turned: int
    """Those that do."""
    value: int
    """Values of a head's output."""


@dataclass(frozen=True, slots=True)
class Decoder:
    """All that a graph is built from, besides tensors."""

    family: Family
    layers: tuple[Layer, ...]
    head_size: int
    epsilon: float
    attention_scale: float
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_cap: float = 0.0
    """Logits are bent so that they stay within it, if it isn't 0."""
    experts_used: int = 0
    expert_scale: float = 1.0
    latent: Latent | None = None
    recurrent: Recurrent = Recurrent(0, 0, 0, 0)
    temperature: tuple[float, int] | None = None
    """Queries are multiplied by `1 + a log(1 + position // b)`."""


_NOT_YET = {
    "falcon-h1": "its layers have attention and Mamba-2 side by side",
    "nemotron_h": "its layers have one part alone: attention, Mamba-2 or the feed-forward part",
    "nemotron_h_moe": "its layers have one part alone: attention, Mamba-2 or the feed-forward part",
    "mamba": "it has no attention",
    "mamba2": "it has no attention",
    "lfm2moe": "its mixture of experts was not judged",
}
"""Architectures that are refused, and why."""


def decoder_of(file: GGUF) -> Decoder:
    """The decoder that a file describes.

    Raises:
        UnsupportedModelError: it's of another architecture, or has something that its graph would leave out.
    """
    family = FAMILIES.get(file.architecture)
    if family is None:
        reason = f", which isn't supported yet: {_NOT_YET[file.architecture]}" if file.architecture in _NOT_YET else ""
        raise UnsupportedModelError(
            f"the GGUF's architecture is {file.architecture!r}{reason}; supported: {', '.join(FAMILIES)}. "
            "Pull an OpenVINO IR export of the model instead"
        )
    count, hidden = file.get("block_count"), file.get("embedding_length")
    count -= file.get("nextn_predict_layers", 0)  # layers that draft tokens stand behind the others
    heads = _by_layer(file.get("attention.head_count"), count)
    kv_heads = _by_layer(file.get("attention.head_count_kv", heads), count)
    if family.recurrent == "delta net":
        recurrent = file.get("attention.recurrent_layers")
        every = file.get("full_attention_interval", 4)
        recurrent = recurrent or [(index + 1) % every != 0 for index in range(count)]
        kv_heads = [0 if recurrent[index] else kv_heads[index] for index in range(count)]
    head_size = file.get("attention.key_length", hidden // heads[0])
    latent = _latent(file)
    if latent is None and file.get("attention.value_length", head_size) != head_size:
        raise UnsupportedModelError("the GGUF's keys and values differ in size, which isn't supported")
    for key, what in _UNSUPPORTED.items():
        if file.get(key):
            raise UnsupportedModelError(f"the GGUF {what} ({key}), which isn't supported")
    if family.value_norm and file.get("expert_count"):
        raise UnsupportedModelError(
            "the GGUF has experts beside a feed-forward part (expert_count), which isn't supported"
        )
    window = file.get("attention.sliding_window", 0) or 0
    if window >= file.get("context_length", 0):
        window = 0
    if latent is not None:
        family = replace(family, **_routes(file))
        head_size = latent.plain + latent.turned
    rotation = _rotation(file, family, head_size, file.get("rope.freq_base", 10000.0), scaled=True)
    inner = rotation
    if family.window_base is not None:
        inner = _rotation(file, family, head_size, file.get("rope.freq_base_swa", family.window_base), scaled=False)
    inner_size = file.get("attention.key_length_swa", head_size)
    layers = []
    windows = file.get("attention.sliding_window_pattern")
    for index in range(count):
        has_window = not family.window_every or (index + 1) % family.window_every != 0
        if isinstance(windows, list) and family.value_norm:
            has_window = bool(windows[index])
        size = inner_size if has_window else head_size
        has_window = has_window and bool(window)
        turns = not family.no_rope_every or (index + 1) % family.no_rope_every != 0
        turns = turns and file.get("rope.scaling.finetuned", True)
        turn = (inner if has_window or size != head_size else rotation) if turns else None
        layers.append(Layer(heads[index], kv_heads[index], size, turn, window if has_window else 0))
    temperature = file.get("attention.temperature_scale")
    return Decoder(
        family=family,
        layers=tuple(layers),
        head_size=head_size,
        epsilon=file.get("attention.layer_norm_rms_epsilon", 1e-6),
        attention_scale=file.get("attention.scale") or _attention_scale(file, head_size, hidden, heads[0], count),
        embedding_scale=hidden**0.5 if family.scaled_embeddings else file.get("embedding_scale", 1.0),
        residual_scale=file.get("residual_scale", 1.0),
        logit_scale=1 / file.get("logit_scale", 1.0),
        logit_cap=file.get("final_logit_softcapping", 0.0) or 0.0,
        experts_used=file.get("expert_used_count", 0),
        expert_scale=file.get("expert_weights_scale", 1.0) or 1.0,
        latent=latent,
        recurrent=_recurrent(file),
        temperature=(temperature, file.get("rope.scaling.original_context_length")) if temperature else None,
    )


_UNSUPPORTED = {
    "attn_logit_softcapping": "caps what attention scores",
    "attention.shared_kv_layers": "has layers that share keys and values",
    "embedding_length_per_layer_input": "has embeddings for each layer",
}
"""What metadata may say that graphs would leave out."""


def _latent(file: GGUF) -> Latent | None:
    """The sizes of latent attention, if the architecture has it."""
    if file.architecture != "deepseek2":
        return None
    if (key := file.get("attention.key_length_mla")) is None:
        raise UnsupportedModelError("the GGUF keeps all heads in one tensor (attn_kv_b): take a newer file")
    turned = file.get("rope.dimension_count")
    return Latent(file.get("attention.kv_lora_rank"), key - turned, turned, file.get("attention.value_length_mla"))


def _routes(file: GGUF) -> dict[str, Any]:
    """How a model with latent attention weighs its experts, which differs between those of the architecture."""
    if file.get("expert_group_count", 1) > 1:
        raise UnsupportedModelError("the GGUF chooses experts by groups (expert_group_count), which isn't supported")
    has_bias = any(name.endswith("exp_probs_b.bias") for name in file.tensors)
    sigmoid = file.get("expert_gating_func", _SIGMOID if has_bias else 0) == _SIGMOID
    return {
        "gate": "sigmoid" if sigmoid else "softmax",
        "normalised_experts": bool(file.get("expert_weights_norm", False)),
    }


_SIGMOID = 2
"""As GGUF numbers the ways to weigh experts."""


def _recurrent(file: GGUF) -> Recurrent:
    """The sizes of recurrent layers; all 0 if the file says none."""
    inner, heads = file.get("ssm.inner_size", 0), file.get("ssm.time_step_rank", 0)
    return Recurrent(heads, inner // max(1, heads), file.get("ssm.group_count", 0), file.get("ssm.state_size", 0))


def _attention_scale(file: GGUF, head_size: int, hidden: int, heads: int, layers: int) -> float:
    if file.architecture == "deepseek2" and file.get("rope.scaling.type") == "yarn":
        stretched = 1 + _log_multiplier(file) * 0.1 * np.log(file.get("rope.scaling.factor"))
        return float(stretched**2 * head_size**-0.5)
    if file.architecture == "gemma4":
        return 1.0
    if file.architecture == "gemma3" and layers == 62:  # the 27B model alone: its heads are smaller than they'd be
        return float((hidden / heads) ** -0.5)
    return float(head_size**-0.5)


def _log_multiplier(file: GGUF) -> float:
    """What YaRN's scale of angles is divided by: the weight of the scale's logarithm; 0 for nothing."""
    multiplier = file.get("rope.scaling.yarn_log_multiplier") or 0.0
    return float(multiplier / 0.1 if file.architecture == "deepseek2" else multiplier)  # whose files have a tenth of it


def _by_layer(value: int | list[int], count: int) -> list[int]:
    return value if isinstance(value, list) else [value] * count


def _rotation(file: GGUF, family: Family, head_size: int, base: float, *, scaled: bool) -> Rotation:
    """The rotation by a base, scaled as the metadata says.

    Sources: YaRN (arXiv 2309.00071); LongRoPE (arXiv 2402.13753); Llama 3's factors stand in a tensor.
    """
    size = file.get("rope.dimension_count", head_size)
    if not scaled:
        size = file.get("rope.dimension_count_swa", size)
    dimensions = np.arange(0, size, 2, dtype=np.float32)
    frequencies = 1.0 / base ** (dimensions / size)
    if not scaled:
        return Rotation(frequencies.astype(np.float32))
    kind, factor = file.get("rope.scaling.type", "none"), file.get("rope.scaling.factor")
    factor = factor or file.get("rope.scale_linear")
    before = file.get("rope.scaling.original_context_length", 0)
    scale = file.get("rope.scaling.attn_factor", 1.0)
    if (long := file.array("rope_factors_long.weight")) is not None and file.get("context_length") > before:
        frequencies /= long
        ratio = file.get("context_length") / before
        scale = file.get("rope.scaling.attn_factor") or (1 + np.log(ratio) / np.log(before)) ** 0.5
    elif (short := file.array("rope_factors_short.weight")) is not None:
        frequencies /= short
    elif (factors := file.array("rope_freqs.weight")) is not None:
        frequencies /= factors
    elif kind == "yarn":
        fast, slow = file.get("rope.scaling.yarn_beta_fast", 32.0), file.get("rope.scaling.yarn_beta_slow", 1.0)
        low, high = (size * np.log(before / (turns * 2 * np.pi)) / (2 * np.log(base)) for turns in (fast, slow))
        if not family.exact_yarn_bounds:
            low, high = np.floor(low), np.ceil(high)
        low, high = max(low, 0), min(high, size - 1)
        ramp = np.clip((dimensions / 2 - low) / max(high - low, 0.001), 0, 1)
        frequencies = frequencies * (1 - ramp) + frequencies / factor * ramp
        scale *= 1 + 0.1 * np.log(factor)
        scale /= 1 + 0.1 * _log_multiplier(file) * np.log(factor)
    elif factor and kind in ("linear", "none"):
        frequencies /= factor
    elif kind not in ("linear", "none", "longrope"):
        raise UnsupportedModelError(f"the GGUF scales rotary positions by {kind!r}, which isn't supported")
    return Rotation(frequencies.astype(np.float32), float(scale))
