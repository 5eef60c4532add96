"""Vocabularies with control tokens of every kind, and what a GGUF file says of one."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer as Backend

Flag = Literal["special", "added", "absent"]
"""How a vocabulary holds a tag: flagged as special, added but not flagged, or not at all."""

FLAGS: tuple[Flag, ...] = ("special", "added", "absent")


def with_tags(source: Path, tags: Iterable[str], flag: Flag) -> str:
    """The `tokenizer.json` at `source` with tags added to its vocabulary."""
    vocabulary: dict[str, Any] = json.loads(source.read_text())
    if flag != "absent":
        known = {token["content"] for token in vocabulary["added_tokens"]}
        first = len(vocabulary["model"]["vocab"])
        first += sum(token["id"] >= first for token in vocabulary["added_tokens"])
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        vocabulary["added_tokens"] += [
            {"id": first + place, "content": tag, "special": flag == "special", **plain}
            for place, tag in enumerate(tag for tag in dict.fromkeys(tags) if tag not in known)
        ]
    return json.dumps(vocabulary)


def byte_fallback(words: Iterable[str], control: Mapping[str, bool]) -> str:
    """A small vocabulary as Gemma has it: `▁` for spaces, bytes for what it can't spell, runs of white space added.

    `control` are the tags and whether they are special.
    """
    pieces = [*(f"<0x{byte:02X}>" for byte in range(256)), *map(chr, range(0x21, 0x7F)), "▁", "\n", "\t"]
    merges: list[tuple[str, str]] = []
    for word in ("\n\n", "\n\n\n", "▁▁", "▁▁▁", "▁▁▁▁", *words):
        for end in range(2, len(word) + 1):
            if word[:end] not in pieces:
                pieces += [piece for piece in word[:end] if piece not in pieces]
                pieces.append(word[:end])
                merges.append((word[: end - 1], word[end - 1]))
    added = [("\n\n", False), ("\n\n\n", False), ("▁▁", False), ("▁▁▁", False), *control.items()]
    pieces += control
    vocab = {piece: id for id, piece in enumerate(pieces)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    described = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": vocab[text], "content": text, "special": special, **flags} for text, special in added],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [list(merge) for merge in merges],
        },
    }
    return Backend.from_str(json.dumps(described)).to_str()


def as_gguf(source: Mapping[str, Any], *, model: str, pre: str = "default") -> dict[str, Any]:
    """GGUF metadata of the vocabulary of a `tokenizer.json`, as llama.cpp's converter writes it.

    Models `llama` and `t5` have scores, `gpt2` and `gemma4` merges. The scores of `llama` are what its merges were
    derived from, so that the better one comes first; an added token has none of its own.
    """
    vocab = source["model"]["vocab"]
    scored = dict(vocab) if isinstance(vocab, list) else {}
    ids = {text: id for id, (text, _) in enumerate(vocab)} if isinstance(vocab, list) else dict(vocab)
    added = {token["id"]: token for token in source["added_tokens"]}
    ids |= {token["content"]: id for id, token in added.items()}
    texts = {id: text for text, id in ids.items()}
    merges = [tuple(each.split(" ")) if isinstance(each, str) else each for each in source["model"].get("merges", ())]
    for rank, merge in enumerate(merges):
        scored.setdefault("".join(merge), -float(rank))
    tokens, types, scores = [], [], []
    for id in range(max(texts) + 1):
        text, type, score = texts.get(id, f"[PAD{id}]"), 1, scored.get(texts.get(id, ""), 0.0)
        if id not in texts:
            type = 5
        elif text == source["model"].get("unk_token") or (model == "t5" and id == source["model"].get("unk_id")):
            type = 2
        elif id in added:
            special = added[id]["special"] or any(
                text.startswith(begin) and text.endswith(end) for begin, end in (("<|", "|>"), ("<｜", "｜>"))
            )
            text, type = (text, 3) if special else (text.replace("▁", " "), 4)
            score = score if model == "t5" else -1000.0
        elif source["model"].get("byte_fallback") and re.fullmatch("<0x[0-9A-F]{2}>", text):
            type = 6
        tokens.append(text)
        types.append(type)
        scores.append(score)
    said = {"model": model, "pre": pre, "tokens": tokens, "token_type": types}
    if model in ("llama", "t5"):
        said["scores"] = scores
    else:
        said["merges"] = list(map(" ".join, merges))
    return {f"tokenizer.ggml.{key}": value for key, value in said.items()}
