"""GGUF files with random weights in the shape of real models: as slow and as large as those, without their sense.

    python -m slipstream_bench.random_models qwen3-1.7b model.gguf

Weights have 4 bits (Q4_0), embeddings 8 (Q8_0). The vocabulary is the default model's, filled up to the shape's width.
`--layers 4` writes the first few layers alone, of models that are larger than the machine.
"""

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from slipstream.models import DEFAULT_MODEL, ModelStore

_GROUP = 32


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a Qwen3, or of a model of another architecture, of whose layers some have recurrent states."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head: int = 128
    vocabulary: int = 151_936
    architecture: str = "qwen3"
    attention: tuple[int, ...] = ()
    """Layers with attention, where others have recurrent states."""
    experts: int = 0
    """Of a mixture, each with `inner`."""
    window: int = 0
    """Tokens that layers see: in Gemma 3 all but each sixth, else all."""

    @property
    def recurrent(self) -> tuple[int, ...]:
        """Layers with recurrent states."""
        return tuple(layer for layer in range(self.layers) if self.attention and layer not in self.attention)


_DELTA_HEADS, _DELTA_SIZE, _DELTA_WIDTH = 16, 128, 4
"""Of Qwen3.5's recurrent layers: heads, the size of each, and tokens that the convolution spans."""
_SHORT_WIDTH = 3
"""Of LFM2's convolution."""
_EXPERTS_USED = 8

SHAPES = {
    "qwen3-0.6b": Shape(1024, 3072, 28, 16, 8),
    "qwen3-1.7b": Shape(2048, 6144, 28, 16, 8),
    "qwen3-4b": Shape(2560, 9728, 36, 32, 8),
    "lfm2-350m": Shape(1024, 4608, 16, 16, 8, 64, 65_536, "lfm2", (2, 5, 8, 10, 12, 14)),
    "qwen3-30b-a3b": Shape(2048, 768, 48, 32, 4, architecture="qwen3moe", experts=128),
    # As many layers of each kind, heads and sizes as the real one, with a smaller vocabulary.
    "gemma3-1b": Shape(1152, 6912, 26, 4, 1, 256, 49_152, "gemma3", window=512),
    # Version 0.1, whose layers all have windows; its own vocabulary is smaller.
    "mistral-7b": Shape(4096, 14_336, 32, 32, 8, 128, 49_152, "llama", window=4096),
    # Its vocabulary is a fifth of the real one, so that a step's time is that of its layers.
    "qwen3.5-0.8b": Shape(1024, 3584, 24, 8, 2, 256, 49_152, "qwen35", tuple(range(3, 24, 4))),
}


def write(name: str, path: Path, *, layers: int | None = None, seed: int = 0) -> None:
    """Write a model of one of the `SHAPES`, or its first few `layers`."""
    shape, random = SHAPES[name], np.random.default_rng(seed)
    shape = replace(shape, layers=layers or shape.layers)
    writer = gguf.GGUFWriter(path, shape.architecture)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)  # OpenVINO GenAI reads no file that doesn't say it
    writer.add_context_length(32_768)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.inner)
    writer.add_head_count(shape.heads)
    writer.add_key_length(shape.head)
    writer.add_value_length(shape.head)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    _add_sizes(writer, shape)
    add_vocabulary(writer, shape.vocabulary)
    q4, q8 = GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q8_0
    writer.add_tensor("token_embd.weight", _random((shape.vocabulary, shape.hidden), q8, random), raw_dtype=q8)
    last_norm = "token_embd_norm" if shape.architecture == "lfm2" else "output_norm"
    writer.add_tensor(f"{last_norm}.weight", np.ones(shape.hidden, np.float32))
    for layer in range(shape.layers):
        plain, products = _layer(shape, layer, recurrent=layer in shape.recurrent)
        for part, values in plain.items():
            ending = "" if part in _NAMED_AS_THEY_ARE else ".weight"
            writer.add_tensor(f"blk.{layer}.{part}{ending}", values.astype(np.float32))
        for part, rows in products.items():
            writer.add_tensor(f"blk.{layer}.{part}.weight", _random(rows, q4, random), raw_dtype=q4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


_NAMED_AS_THEY_ARE = ("ssm_a", "ssm_dt.bias")
_Plain = dict[str, npt.NDArray[np.float64]]
_Products = dict[str, tuple[int, ...]]


def _layer(shape: Shape, layer: int, *, recurrent: bool) -> tuple[_Plain, _Products]:
    """A layer's tensors: those that stay as they are, and the sizes of the matrices."""
    second_norm = "post_attention_norm" if shape.architecture == "qwen35" else "ffn_norm"
    plain: _Plain = {"attn_norm": np.ones(shape.hidden), second_norm: np.ones(shape.hidden)}
    kind, each = ("_exps", (shape.experts,)) if shape.experts else ("", ())
    products: _Products = {
        f"ffn_gate{kind}": (*each, shape.inner, shape.hidden),
        f"ffn_up{kind}": (*each, shape.inner, shape.hidden),
        f"ffn_down{kind}": (*each, shape.hidden, shape.inner),
    }
    if shape.architecture == "gemma3":
        plain |= {"post_attention_norm": np.ones(shape.hidden), "post_ffw_norm": np.ones(shape.hidden)}
    if shape.experts:
        plain["ffn_gate_inp"] = np.random.default_rng(layer).normal(
            scale=shape.hidden**-0.5, size=(shape.experts, shape.hidden)
        )
    if not recurrent:
        queries, keys = shape.heads * shape.head, shape.kv_heads * shape.head
        gated = 2 if shape.architecture == "qwen35" else 1
        products |= {"attn_q": (gated * queries, shape.hidden), "attn_k": (keys, shape.hidden)}
        products |= {"attn_v": (keys, shape.hidden), "attn_output": (shape.hidden, queries)}
        plain |= {"attn_q_norm": np.ones(shape.head), "attn_k_norm": np.ones(shape.head)}
    elif shape.architecture == "lfm2":
        products |= {"shortconv.in_proj": (3 * shape.hidden, shape.hidden)}
        products |= {"shortconv.out_proj": (shape.hidden, shape.hidden)}
        plain["shortconv.conv"] = np.full((shape.hidden, _SHORT_WIDTH), _SHORT_WIDTH**-0.5)
    else:
        inner = _DELTA_HEADS * _DELTA_SIZE
        products |= {"attn_qkv": (3 * inner, shape.hidden), "attn_gate": (inner, shape.hidden)}
        products |= {"ssm_alpha": (_DELTA_HEADS, shape.hidden), "ssm_beta": (_DELTA_HEADS, shape.hidden)}
        products |= {"ssm_out": (shape.hidden, inner)}
        plain |= {"ssm_a": np.full(_DELTA_HEADS, -0.1), "ssm_dt.bias": np.zeros(_DELTA_HEADS)}
        plain |= {"ssm_norm": np.ones(_DELTA_SIZE), "ssm_conv1d": np.full((3 * inner, _DELTA_WIDTH), 0.5)}
    return plain, products


def _add_sizes(writer: gguf.GGUFWriter, shape: Shape) -> None:
    """What the architecture has beside a Qwen3's sizes."""
    if shape.architecture == "lfm2":
        writer.add_head_count_kv([0 if layer in shape.recurrent else shape.kv_heads for layer in range(shape.layers)])
        writer.add_shortconv_l_cache(_SHORT_WIDTH)
        writer.add_vocab_size(shape.vocabulary)
        return
    writer.add_head_count_kv(shape.kv_heads)
    if shape.window:
        writer.add_sliding_window(shape.window)
    if shape.experts:
        writer.add_expert_count(shape.experts)
        writer.add_expert_used_count(_EXPERTS_USED)
        writer.add_expert_feed_forward_length(shape.inner)
    if shape.architecture == "qwen35":
        writer.add_ssm_conv_kernel(_DELTA_WIDTH)
        writer.add_ssm_state_size(_DELTA_SIZE)
        writer.add_ssm_group_count(_DELTA_HEADS)
        writer.add_ssm_time_step_rank(_DELTA_HEADS)
        writer.add_ssm_inner_size(_DELTA_HEADS * _DELTA_SIZE)
        writer.add_uint32(f"{shape.architecture}.full_attention_interval", shape.attention[1] - shape.attention[0])
        writer.add_rope_dimension_count(shape.head // 4)
        writer.add_rope_dimension_sections([11, 11, 10, 0])


def _random(shape: tuple[int, ...], kind: GGMLQuantizationType, random: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Blocks of random codes, [..., rows, bytes], scaled so that a product keeps its size."""
    *rows, columns = shape
    _, size = gguf.GGML_QUANT_SIZES[kind]
    spread = 4.6 if kind == GGMLQuantizationType.Q4_0 else 74.0  # of codes drawn evenly
    blocks = random.integers(0, 256, (*rows, columns // _GROUP, size), dtype=np.uint8)
    blocks[..., :2] = np.array([columns**-0.5 / spread], np.float16).view(np.uint8)
    return blocks.reshape(*rows, -1)


def add_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    """Give a file the default model's vocabulary, filled up to a size, with its chat template."""
    model = ModelStore().ensure(DEFAULT_MODEL)
    content = json.loads(model.tokenizer_path.read_bytes())
    vocabulary: dict[str, int] = content["model"]["vocab"]
    special = {each["id"] for each in content["added_tokens"]}
    tokens = [*sorted(vocabulary, key=vocabulary.__getitem__)]
    control, normal, unused = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL, gguf.TokenType.UNUSED
    types = [control if id in special else normal for id in range(len(tokens))] + [unused] * (size - len(tokens))
    tokens += [f"<|unused_{id}|>" for id in range(len(tokens), size)]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(model.manifest.bos_token_id or 0)
    writer.add_eos_token_id(model.manifest.eos_token_id or 0)
    writer.add_chat_template(model.chat_template or "")


def main() -> None:
    """Write one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("path", type=Path)
    parser.add_argument("--layers", type=int, help="how many to write (default: all)")
    options = parser.parse_args()
    write(options.shape, options.path, layers=options.layers)


if __name__ == "__main__":
    main()
