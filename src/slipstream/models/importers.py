"""Make a model folder from an artefact: OpenVINO IR, `tokenizer.json`, chat template, manifest.

OpenVINO GenAI reads a GGUF and writes the IR, with the weights as they are. That is done once, here, in a
process of its own: neither its memory nor a crash of it reaches the caller, and no request ever needs it.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from slipstream.errors import ModelError, UnsupportedModelError
from slipstream.models.manifest import Manifest
from slipstream.models.progress import Progress
from slipstream.models.sources import IR_OPTIONAL, IR_REQUIRED, Artefact
from slipstream.tokenizer import Tokenizer, build_tokenizer
from slipstream.tokenizer.from_gguf import tokenizer_kind

IR_FILE = "openvino_model.xml"
TOKENIZER_FILE = "tokenizer.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"


def import_artefact(artefact: Artefact, folder: Path, *, name: str, origin: str, progress: Progress) -> Manifest:
    """Fill the empty `folder` with everything that serving the model needs, the manifest last.

    Raises:
        UnsupportedModelError: the architecture, the tokenizer or a variant of them isn't supported; names it.
        ModelError: the artefact is broken.
    """
    bring = _from_ir if artefact.path.is_dir() else _from_gguf
    facts = bring(artefact.path, folder, progress)
    tokenizer = Tokenizer.from_file(folder / TOKENIZER_FILE)
    stop = {*facts.stop_token_ids, *end_tokens(tokenizer)} - {*inner_ends(tokenizer)}
    manifest = Manifest(
        name=name,
        source=origin,
        sha256=artefact.sha256,
        architecture=facts.architecture,
        context_length=facts.context_length,
        vocab_size=facts.vocab_size,
        tokenizer_kind=facts.tokenizer_kind,
        add_bos=facts.add_bos,
        bos_token_id=facts.bos_token_id,
        eos_token_id=facts.eos_token_id,
        stop_token_ids=tuple(sorted(stop)),
        files={path.name: path.stat().st_size for path in sorted(folder.iterdir())},
    )
    manifest.save(folder)
    return manifest


def end_tokens(tokenizer: Tokenizer) -> list[int]:
    """Special tokens that end an answer in one family or another."""
    known = (tokenizer.token_id(text) for text in _END_OF_TURN)
    return [id for id in known if id is not None and tokenizer.is_special(id)]


def inner_ends(tokenizer: Tokenizer) -> list[int]:
    """Tokens that end a part of an answer alone: a channel, where a vocabulary has channels (gpt-oss)."""
    end = tokenizer.token_id("<|end|>")
    return [end] if end is not None and tokenizer.token_id("<|channel|>") is not None else []


# A model may name one end token and use another: that of its base model, or one for tool calls.
_END_OF_TURN = (
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|end_of_text|>",
    "<|end_of_turn|>",
    "<turn|>",
    "<|tool_response>",
    "<|eot|>",
    "<|eom|>",
    "<|return|>",
    "<|call|>",
)


@dataclass(frozen=True, slots=True)
class _Facts:
    """What the two kinds of artefact say about a model, each in its own way."""

    architecture: str
    context_length: int
    vocab_size: int
    tokenizer_kind: str
    add_bos: bool
    bos_token_id: int | None
    eos_token_id: int | None
    stop_token_ids: Iterable[int]


# --- GGUF ---

_GGUF_ARCHITECTURES = ("llama", "qwen2", "qwen3")
# The weights as they are: compiling the model is a by-product that can't be turned off.
_CONVERT = "import sys, openvino_genai as g; g.LLMPipeline(sys.argv[1], 'CPU', enable_save_ov_model=True)"


def _from_gguf(path: Path, folder: Path, progress: Progress) -> _Facts:
    with progress.stage("Reading the vocabulary"):
        metadata, tensors = _read_gguf(path)
        _check_gguf(metadata, tensors)
        build_tokenizer(metadata).save(str(folder / TOKENIZER_FILE))
        if template := metadata.get("tokenizer.chat_template"):
            (folder / CHAT_TEMPLATE_FILE).write_text(template, encoding="utf-8")
    with progress.stage("Converting to OpenVINO IR"):
        _convert_gguf(path, folder)
    architecture, kind = metadata["general.architecture"], tokenizer_kind(metadata)
    eos = metadata.get("tokenizer.ggml.eos_token_id")
    ends = (eos, metadata.get("tokenizer.ggml.eot_token_id"), metadata.get("tokenizer.ggml.eom_token_id"))
    return _Facts(
        architecture=architecture,
        context_length=metadata[f"{architecture}.context_length"],
        vocab_size=tensors["token_embd.weight"][-1],
        tokenizer_kind=kind,
        # Where the file doesn't say, Llama 3 is the one that wants it.
        add_bos=metadata.get("tokenizer.ggml.add_bos_token", kind == "llama-bpe"),
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=eos,
        stop_token_ids=[id for id in ends if id is not None],
    )


def _read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """Metadata, and the dimensions of each tensor, innermost first."""
    from gguf import GGUFReader  # takes a while, and only an import needs it

    try:
        reader = GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except (OSError, ValueError, LookupError) as error:
        raise ModelError(f"{path} is not a readable GGUF file: {error}; fetch it again") from error
    return metadata, {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}


def _check_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, list[int]]) -> None:
    """Refuse what the conversion would take and get wrong, or would only trip over after minutes."""
    architecture = metadata.get("general.architecture")
    if architecture not in _GGUF_ARCHITECTURES:
        raise UnsupportedModelError(
            f"the GGUF's architecture is {architecture!r}; supported: {', '.join(_GGUF_ARCHITECTURES)}. "
            "Pull an OpenVINO IR export of the model instead"
        )
    if metadata.get("split.count", 1) > 1:
        raise UnsupportedModelError("the GGUF is split into several files; merge them with llama-gguf-split")
    # GenAI's reader ignores both: the model would load, and go astray the more the longer the context.
    scaling = metadata.get(f"{architecture}.rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in tensors:
        raise UnsupportedModelError(
            f"the GGUF has scaled rotary positions ({'llama3' if scaling == 'none' else scaling}), which its "
            "conversion doesn't support. Pull an OpenVINO IR export of the model instead"
        )
    if f"{architecture}.context_length" not in metadata or "token_embd.weight" not in tensors:
        raise ModelError("the GGUF has no context length or no token embeddings: it is not a whole language model")


def _convert_gguf(path: Path, folder: Path) -> None:
    link = folder / "model.gguf"  # the IR is written beside it
    link.symlink_to(path.absolute())
    run = subprocess.run(
        [sys.executable, "-c", _CONVERT, str(link)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    link.unlink()
    if run.returncode or not (folder / IR_FILE).exists():
        why = run.stderr.strip().splitlines()[-1:] or [f"exit status {run.returncode}"]
        if run.returncode < 0:
            why = [f"it was ended by signal {-run.returncode}, perhaps for want of memory"]
        raise ModelError(
            f"OpenVINO GenAI can't convert {path.name}: {why[0]}. Its reader knows the quantisations F16, "
            "Q8_0, Q4_0, Q4_1 and Q4_K_M; pull such a file, or an OpenVINO IR export of the model"
        )


# --- OpenVINO IR ---


def _from_ir(path: Path, folder: Path, progress: Progress) -> _Facts:
    with progress.stage("Taking over the files"):
        for name in (*IR_REQUIRED, *IR_OPTIONAL):
            if (path / name).exists():
                _link_or_copy((path / name).resolve(), folder / name)
    config = _read_json(folder / "config.json")
    generation = _read_json(folder / "generation_config.json")
    named = _read_json(folder / "tokenizer_config.json")
    _write_template(folder, named.get("chat_template"))
    try:
        architecture, context, vocab = (config[key] for key in ("model_type", "max_position_embeddings", "vocab_size"))
    except KeyError as error:
        raise UnsupportedModelError(f"{path}/config.json has no {error}: not a text generation model") from error
    backend = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    ends = generation.get("eos_token_id", config.get("eos_token_id"))
    ends = ends if isinstance(ends, list) else [ends]
    bos = _token_id(backend, named.get("bos_token"), config.get("bos_token_id"))
    eos = _token_id(backend, named.get("eos_token"), ends[0])
    return _Facts(
        architecture=architecture,
        context_length=context,
        vocab_size=vocab,
        tokenizer_kind=TOKENIZER_FILE,
        add_bos=bos is not None and backend.encode("").ids[:1] == [bos],
        bos_token_id=bos,
        eos_token_id=eos,
        stop_token_ids=[id for id in (*ends, eos) if id is not None],
    )


def _link_or_copy(source: Path, target: Path) -> None:
    """Large files need no second copy on the same file system."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ModelError(f"{path.name} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path.name} holds no JSON object")
    return content


def _write_template(folder: Path, template: str | list[dict[str, str]] | None) -> None:
    """Give an older export's template its own file; of several, the one named default."""
    if isinstance(template, list):
        template = {each["name"]: each["template"] for each in template}.get("default")
    if template and not (folder / CHAT_TEMPLATE_FILE).exists():
        (folder / CHAT_TEMPLATE_FILE).write_text(template, encoding="utf-8")


def _token_id(backend: tokenizers.Tokenizer, token: str | dict[str, Any] | None, default: int | None) -> int | None:
    """The id of a token that tokenizer_config.json names as a text or as an object with `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    id = backend.token_to_id(text) if text else None
    return default if id is None else id
