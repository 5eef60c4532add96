"""Make a model folder from an artefact: OpenVINO IR or safetensors, `tokenizer.json`, chat template, manifest.

A GGUF is converted once, here; its weights keep their codes. No request ever needs the file again.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import iterparse

import tokenizers

from slipstream.errors import ModelError, UnsupportedModelError
from slipstream.models import safetensors
from slipstream.models.manifest import Facts, Manifest
from slipstream.models.progress import Progress
from slipstream.models.sources import Artefact, ir_files, read_json
from slipstream.tokenizer import Tokenizer, build_tokenizer
from slipstream.tokenizer.from_gguf import adds_bos, tokenizer_kind

IR_FILE = "openvino_model.xml"
TOKENIZER_FILE = "tokenizer.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"


def import_artefact(artefact: Artefact, folder: Path, *, name: str, origin: str, progress: Progress) -> Manifest:
    """Fill the empty `folder` with everything that serving the model needs, the manifest last.

    Raises:
        UnsupportedModelError: the architecture, the tokenizer or a variant of them isn't supported; names it.
        ModelError: the artefact is broken.
    """
    bring = _from_folder if artefact.path.is_dir() else _from_gguf
    facts = bring(artefact.path, folder, progress)
    tokenizer = Tokenizer.from_file(folder / TOKENIZER_FILE)
    manifest = Manifest(
        name=name,
        source=origin,
        source_state=artefact.state,
        sha256=artefact.sha256,
        files={path.name: path.stat().st_size for path in sorted(folder.iterdir())},
        **facts.model_dump() | {"stop_token_ids": stop_tokens(tokenizer, facts.stop_token_ids)},
    )
    manifest.save(folder)
    return manifest


def stop_tokens(tokenizer: Tokenizer, named: Iterable[int] = ()) -> list[int]:
    """Tokens that end an answer: those that the model names, and special ones that do in one family or another."""
    known = (tokenizer.token_id(text) for text in _END_OF_TURN)
    stop = {*named, *(id for id in known if id is not None and tokenizer.is_special(id))}
    if tokenizer.token_id("<|channel|>") is not None:  # gpt-oss, where `<|end|>` ends a channel alone
        stop.discard(tokenizer.token_id("<|end|>"))
    return sorted(stop)


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


# --- GGUF ---

_CONVERT = "from slipstream.models.gguf.convert import main; main()"


def _from_gguf(path: Path, folder: Path, progress: Progress) -> Facts:
    from slipstream.models.gguf import GGUF, remarks  # what they import takes a while, and only an import needs it

    with progress.stage("Making the tokenizer"):
        file = GGUF.read(path)
        metadata = file.metadata
        build_tokenizer(metadata).save(str(folder / TOKENIZER_FILE))
        _write_template(folder, metadata.get("tokenizer.chat_template"))
    for remark in remarks(tensor.kind for tensor in file.tensors.values()):
        progress.say(remark)
    with progress.stage("Converting to OpenVINO IR"):
        _convert_gguf(path, folder)
    kind, eos = tokenizer_kind(metadata), metadata.get("tokenizer.ggml.eos_token_id")
    ends = (eos, metadata.get("tokenizer.ggml.eot_token_id"), metadata.get("tokenizer.ggml.eom_token_id"))
    return Facts(
        architecture=file.architecture,
        context_length=file.get("context_length"),
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        tokenizer_kind=kind,
        add_bos=adds_bos(metadata),
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=eos,
        stop_token_ids=tuple(id for id in ends if id is not None),
    )


def _convert_gguf(path: Path, folder: Path) -> None:
    """Write the IR in a process of its own: its memory is given back, and it can't take the caller with it."""
    run = subprocess.run(
        [sys.executable, "-c", _CONVERT, str(path), str(folder / IR_FILE)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode or not (folder / IR_FILE).exists():
        why = run.stderr.strip().splitlines()[-1:] or [f"exit status {run.returncode}"]
        if run.returncode < 0:
            why = [f"it was ended by signal {-run.returncode}, perhaps for want of memory"]
        raise ModelError(f"can't convert {path.name}: {why[0]}")


# --- Folders: OpenVINO IR, safetensors ---


def _from_folder(path: Path, folder: Path, progress: Progress) -> Facts:
    with progress.stage("Taking over the files"):
        files = ir_files(path)
        if IR_FILE not in files:
            files = safetensors.files_of(path)
        for name, source in files.items():
            _link_or_copy(source.resolve(), folder / name)
    if IR_FILE in files and files[IR_FILE].name != IR_FILE:
        _check_takes_tokens(files[IR_FILE])
    config = read_json(folder / "config.json")
    config |= config.get("text_config", {})  # a vision-language model says there what its text part is
    generation = read_json(folder / "generation_config.json")
    named = read_json(folder / "tokenizer_config.json")
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
    return Facts(
        architecture=architecture,
        context_length=context,
        vocab_size=vocab,
        tokenizer_kind=TOKENIZER_FILE,
        add_bos=bos is not None and backend.encode("").ids[:1] == [bos],
        bos_token_id=bos,
        eos_token_id=eos,
        stop_token_ids=tuple(id for id in (*ends, eos) if id is not None),
    )


def _check_takes_tokens(graph: Path) -> None:
    """Refuse the text part of a vision-language model that takes embeddings, which another part looks up."""
    layers = (element for _, element in iterparse(graph) if element.tag == "layer")
    inputs = {layer.get("name", "") for layer in layers if layer.get("type") == "Parameter"}
    if "input_ids" not in inputs:
        raise UnsupportedModelError(
            f"{graph.name} takes {', '.join(sorted(inputs)) or 'nothing'}, but no input_ids: its embeddings are in a "
            "graph of their own. Export the text model alone (`optimum-cli export openvino --task "
            "text-generation-with-past`), or take a GGUF file of it"
        )


def _link_or_copy(source: Path, target: Path) -> None:
    """Large files need no second copy on the same file system."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


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
