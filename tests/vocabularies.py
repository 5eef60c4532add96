"""Vocabularies with control tokens of every kind, made from the default model's."""

import json
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
