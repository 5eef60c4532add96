"""A model's weights in other servers' formats: its GGUF, and the same numbers as a Hugging Face folder in bf16."""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, dequantize
from gguf.quants import quantize
from numpy.typing import NDArray

from slipstream.errors import ModelError
from slipstream.models import CATALOG, Model, Progress
from slipstream.models.sources import HubSource, LocalSource, WheelSource
from slipstream.tokenizer import Tokenizer
from slipstream_bench.peers.base import PeerError, bench_home

Array = NDArray[np.float32]


def weights_folder(model: Model) -> Path:
    """Where a model's weights in other formats are kept, for all servers that read them."""
    return bench_home() / "weights" / f"{model.name}-{model.manifest.sha256[:8]}"


def gguf_path(model: Model) -> Path:
    """Where `fetch_gguf` puts a model's GGUF."""
    return weights_folder(model) / "model.gguf"


def fetch_gguf(model: Model, progress: Progress) -> Path:
    """The GGUF that a model of the store was made from, from where that came from.

    Raises:
        PeerError: it wasn't made from one, or that is gone.
    """
    target = gguf_path(model)
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as workdir:
        try:
            artefact = _source(model).fetch(Path(workdir), progress)
        except ModelError as error:
            raise PeerError(str(error)) from error
        if artefact.sha256 != model.manifest.sha256:
            raise PeerError(f"{artefact.path} is not what {model.name} was made from any more; pull it again")
        target.unlink(missing_ok=True)  # a link to what was moved away
        if artefact.path.is_relative_to(workdir):
            artefact.path.rename(target)
        else:
            target.symlink_to(artefact.path)
    return target


def safetensors_folder(model: Model) -> Path:
    """Where `fetch_safetensors` puts a model's folder."""
    return weights_folder(model) / "bf16"


def fetch_safetensors(model: Model, progress: Progress) -> Path:
    """A Hugging Face folder with the weights, tokenizer and chat template of a model; raises `PeerError`."""
    target = safetensors_folder(model)
    if target.exists():
        return target
    gguf = fetch_gguf(model, progress)
    with tempfile.TemporaryDirectory(dir=target.parent) as workdir, progress.stage("Writing the weights in bf16"):
        folder = Path(workdir) / "bf16"
        folder.mkdir()
        export_weights(gguf, folder)
        export_tokenizer(model, folder)
        folder.rename(target)
    return target


def export_weights(gguf: Path, folder: Path) -> None:
    """Write `config.json` and `model.safetensors` of a GGUF's weights, dequantised and rounded to bf16.

    Raises:
        PeerError: its architecture is another than Llama's.
    """
    reader = GGUFReader(gguf)
    fields = reader.fields.items()
    metadata = {name: field.contents() for name, field in fields if name.startswith(("general.", "llama."))}
    if (architecture := metadata.get("general.architecture")) != "llama":
        raise PeerError(f"only Llama's weights can be written as safetensors, and {gguf.name} is of {architecture!r}")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    vocabulary = int(tensors["token_embd.weight"].shape[-1])
    config = _llama_config(metadata, vocabulary=vocabulary, tied="output.weight" not in tensors)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}

    def load(name: str) -> Array:
        tensor = tensors[name]
        weights = dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
        part = name.removesuffix(".weight").rpartition(".")[2]
        return unpermuted(weights, heads[part]) if part in heads else weights

    lazy = [
        _Tensor(_hugging_face_name(name), tuple(reversed(tensor.shape.tolist())), partial(load, name))
        for name, tensor in tensors.items()
    ]
    _write_safetensors(folder / "model.safetensors", lazy)


def unpermuted(weights: Array, heads: int) -> Array:
    """The rows of a q or k projection in Hugging Face's order.

    Rotary positions turn pairs of rows of a head. llama.cpp has the two of a pair beside each other, Hugging Face has
    them half a head apart.
    """
    rows, columns = weights.shape
    pairs = weights.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _source(model: Model) -> WheelSource | HubSource | LocalSource:
    for entry in CATALOG.values():
        if entry.sha256 == model.manifest.sha256:
            return entry.source
    path = Path(model.manifest.source)
    if path.suffix.lower() == ".gguf" and path.is_file():
        return LocalSource(path)
    raise PeerError(
        f"the bench needs the GGUF that {model.name} was made from, and {model.manifest.source} is none on this disk. "
        "Pull a GGUF file: slipstream pull ./model.gguf"
    )


def _llama_config(metadata: Mapping[str, Any], *, vocabulary: int, tied: bool) -> dict[str, Any]:
    """What `LlamaConfig` needs."""
    heads = metadata["llama.attention.head_count"]
    theta = metadata["llama.rope.freq_base"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",  # what `dtype` was called before
        "hidden_act": "silu",
        "hidden_size": metadata["llama.embedding_length"],
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.get("llama.attention.head_count_kv", heads),
        "max_position_embeddings": metadata["llama.context_length"],
        "rms_norm_eps": metadata["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},  # the same for newer readers
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
    }


def export_tokenizer(model: Model, folder: Path) -> None:
    """The tokenizer and template that Slipstream uses, so that all servers see the same tokens."""
    manifest = model.manifest
    shutil.copyfile(model.tokenizer_path, folder / "tokenizer.json")
    tokenizer = Tokenizer.from_file(model.tokenizer_path)
    ends = {"bos_token": manifest.bos_token_id, "eos_token": manifest.eos_token_id}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": manifest.context_length,
        "clean_up_tokenization_spaces": False,
        **{name: tokenizer.token_bytes(id).decode() for name, id in ends.items() if id is not None},
    }
    if (template := model.chat_template) is not None:
        settings["chat_template"] = template
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    generation = {"bos_token_id": manifest.bos_token_id, "eos_token_id": list(manifest.stop_token_ids)}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2))


_OUTER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _hugging_face_name(name: str) -> str:
    if name in _OUTER_NAMES:
        return _OUTER_NAMES[name]
    _, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{_LAYER_NAMES[part]}.{kind}"


@dataclass(frozen=True, slots=True)
class _Tensor:
    """One that is loaded when it is written."""

    name: str
    shape: tuple[int, ...]
    load: Callable[[], Array]


def _write_safetensors(path: Path, tensors: list[_Tensor]) -> None:
    """The file format of https://github.com/huggingface/safetensors#format, in bf16, which numpy has no name for."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for tensor, (begin, end) in zip(tensors, _offsets(tensors), strict=True):
        header[tensor.name] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            file.write(quantize(tensor.load(), GGMLQuantizationType.BF16).tobytes())


def _offsets(tensors: list[_Tensor]) -> Iterator[tuple[int, int]]:
    end = 0
    for tensor in tensors:
        begin, end = end, end + 2 * int(np.prod(tensor.shape))
        yield begin, end
