"""GGUF files with random weights in the shape of real models: as slow and as large as those, without their sense.

    python -m slipstream_bench.random_models qwen3-1.7b model.gguf

Weights have 4 bits (Q4_0), embeddings 8 (Q8_0). The vocabulary is the default model's, filled up to the shape's width.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from slipstream.models import DEFAULT_MODEL, ModelStore

_GROUP = 32


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a Qwen3."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head: int = 128
    vocabulary: int = 151_936


SHAPES = {
    "qwen3-0.6b": Shape(1024, 3072, 28, 16, 8),
    "qwen3-1.7b": Shape(2048, 6144, 28, 16, 8),
    "qwen3-4b": Shape(2560, 9728, 36, 32, 8),
}


def write(name: str, path: Path, *, seed: int = 0) -> None:
    """Write a model of one of the `SHAPES`."""
    shape, random = SHAPES[name], np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)  # OpenVINO GenAI reads no file that doesn't say it
    writer.add_context_length(32_768)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.inner)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head)
    writer.add_value_length(shape.head)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    add_vocabulary(writer, shape.vocabulary)
    queries, keys = shape.heads * shape.head, shape.kv_heads * shape.head
    sizes = {
        "attn_q": (queries, shape.hidden),
        "attn_k": (keys, shape.hidden),
        "attn_v": (keys, shape.hidden),
        "attn_output": (shape.hidden, queries),
        "ffn_gate": (shape.inner, shape.hidden),
        "ffn_up": (shape.inner, shape.hidden),
        "ffn_down": (shape.hidden, shape.inner),
    }
    norms = {"attn_norm": shape.hidden, "ffn_norm": shape.hidden, "attn_q_norm": shape.head, "attn_k_norm": shape.head}
    q4, q8 = GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q8_0
    writer.add_tensor("token_embd.weight", _random((shape.vocabulary, shape.hidden), q8, random), raw_dtype=q8)
    writer.add_tensor("output_norm.weight", np.ones(shape.hidden, np.float32))
    for layer in range(shape.layers):
        for part, size in norms.items():
            writer.add_tensor(f"blk.{layer}.{part}.weight", np.ones(size, np.float32))
        for part, rows in sizes.items():
            writer.add_tensor(f"blk.{layer}.{part}.weight", _random(rows, q4, random), raw_dtype=q4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _random(shape: tuple[int, int], kind: GGMLQuantizationType, random: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Blocks of random codes, [rows, bytes], scaled so that a product keeps its size."""
    rows, columns = shape
    _, size = gguf.GGML_QUANT_SIZES[kind]
    spread = 4.6 if kind == GGMLQuantizationType.Q4_0 else 74.0  # of codes drawn evenly
    blocks = random.integers(0, 256, (rows, columns // _GROUP, size), dtype=np.uint8)
    blocks[..., :2] = np.array([columns**-0.5 / spread], np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


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
    options = parser.parse_args()
    write(options.shape, options.path)


if __name__ == "__main__":
    main()
