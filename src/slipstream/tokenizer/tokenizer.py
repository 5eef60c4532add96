"""Encode and decode with a model's own `tokenizer.json`, down to the bytes of each token."""

import json
import re
import secrets
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import decoders

from slipstream.errors import InvalidRequestError, ModelError, UnsupportedModelError
from slipstream.fields import PROMPT
from slipstream.tokenizer.provenance import Traced

SPACE = "▁"
"""How SentencePiece spells a space in its vocabulary."""


class Tokenizer:
    """A tokenizer of byte-level BPE, or as SentencePiece has them: BPE or unigram, of pieces that spell spaces `▁`.

    Every token is a byte string and a text's tokens concatenate to its UTF-8, so decoding is joining bytes.
    Incremental decoding and grammars over bytes rest on that; other kinds of tokenizer are refused.

    Some of SentencePiece's put a space before a text. It is of the text then: nothing takes it away again, so that
    what tokens spell doesn't depend on what stands before them.

    *Control tokens* are those that were added to the vocabulary, flagged special or not, unless they are white space
    or words. They are found here, in text that may hold them; all other text is encoded by a backend in which no text
    spells one.

    A vocabulary may lack a few bytes (SmolLM2's has no token for U+0004, for one). `encode` leaves them out,
    as the original tokenizers do.

    Args:
        source: a `tokenizer.json`, its text.

    Raises:
        ModelError: it isn't a tokenizer.
        UnsupportedModelError: it is of another kind.
    """

    def __init__(self, source: str) -> None:
        try:
            described = json.loads(source)
            _check(described)
            self._prefix = _Prefix.of(described)
            added = described["added_tokens"]
            self._special = frozenset(token["id"] for token in added if token["special"])
            no_control = _text_among({token["content"] for token in added}, described["model"])
            control = [token for token in added if token["content"] not in no_control]
            self._control = {token["id"]: token for token in control}
            self._ids = {token["content"]: token["id"] for token in control}
            self._plain = Backend.from_str(_without_control_tokens(described, self._ids))
            if _spells_spaces(described):
                self._plain.decoder = piece_decoder()  # which a grammar's compiler reads off the bytes from
        except UnsupportedModelError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise ModelError(f"not a tokenizer: {error}") from error
        lengths: dict[str, set[int]] = defaultdict(set)
        for text in self._ids:
            lengths[text[0]].add(len(text))
        self._lengths = {first: sorted(found, reverse=True) for first, found in lengths.items()}
        self._first = re.compile(f"[{re.escape(''.join(lengths))}]" if lengths else r"(?!)")
        vocabulary = self._plain.get_vocab(with_added_tokens=True)
        spell = _speller(described)
        self._bytes = [b""] * (max(vocabulary.values(), default=-1) + 1)
        for text, id in vocabulary.items():
            self._bytes[id] = self._control[id]["content"].encode() if id in self._control else spell(text)

    @classmethod
    def from_file(cls, path: Path) -> "Tokenizer":
        """Load a `tokenizer.json`.

        Raises:
            ModelError: the file can't be read or isn't a tokenizer.
            UnsupportedModelError: it is of another kind.
        """
        try:
            return cls(path.read_text(encoding="utf-8"))
        except UnsupportedModelError:
            raise
        except (OSError, ValueError, ModelError) as error:
            raise ModelError(f"can't load the tokenizer {path}: {error}") from error

    def plain_json(self) -> str:
        """The `tokenizer.json` of the same vocabulary, with the same ids, in which no text spells a control token."""
        return self._plain.to_str()

    @property
    def vocab_size(self) -> int:
        """One more than the highest token id; the model's logits may be wider, with ids of no token."""
        return len(self._bytes)

    def encode(self, text: str, *, begins: bool = True) -> list[int]:
        """Token ids of `text`, which `begins` here or goes on from other text (`begins_after` tells); no BOS is added.

        The texts of control tokens become those tokens in a plain string, and in a `Traced` one where all their
        characters are its own.

        Raises:
            InvalidRequestError: `text` holds a lone surrogate, which no UTF-8 can express.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequestError(
                f"the text has a lone surrogate, \\u{ord(text[error.start]):04x}, at position {error.start};"
                " send valid Unicode",
                param=PROMPT,
            ) from error
        ids: list[int] = []
        at = 0
        for start, end, id in self._control_tokens(text):
            ids += self._encode_plain(text, at, start, begins=begins)
            ids.append(id)
            at = end
            begins = self._prefix.each
        return ids + self._encode_plain(text, at, len(text), begins=begins)

    @property
    def longest_token(self) -> int:
        """Bytes of the longest token."""
        return max(map(len, self._bytes), default=0)

    def begins_after(self, id: int) -> bool:
        """Whether a text begins after this token as it does where there is nothing before it."""
        return self._prefix.each and id in self._control

    def decode(self, ids: Iterable[int], *, skip_special: bool = True, shown: Container[int] = ()) -> str:
        """The text of `ids`, without special tokens unless they are to be `shown`.

        Bytes that aren't UTF-8 become U+FFFD, ids of no token become nothing.
        """
        if skip_special:
            ids = [id for id in ids if id not in self._special or id in shown]
        return b"".join(map(self.token_bytes, ids)).decode(errors="replace")

    def token_bytes(self, id: int) -> bytes:
        """The bytes of a token, perhaps part of a character; b"" for an id of no token."""
        return self._bytes[id] if 0 <= id < len(self._bytes) else b""

    def is_special(self, id: int) -> bool:
        """Whether `id` is flagged as special, as `<|im_end|>` is: it isn't part of the text that is shown."""
        return id in self._special

    def is_control(self, id: int) -> bool:
        """Whether `id` is a control token: flagged as special or, like `<tool_call>` in some vocabularies, not."""
        return id in self._control

    def control_token(self, text: str) -> int | None:
        """The id of the control token with this text, if there is one."""
        return self._ids.get(text)

    def token_id(self, text: str) -> int | None:
        """The id of the token that the vocabulary spells `text` (`<|im_end|>`, `Ġthe`), if there is one."""
        known = self._ids.get(text)
        return known if known is not None else self._plain.token_to_id(text)

    def _encode_plain(self, text: str, start: int, end: int, *, begins: bool) -> list[int]:
        if start >= end:
            return []
        plain = str.__getitem__(text, slice(start, end))
        whole = self._prefix.put_before(plain) if begins else plain
        # Of the library's ways to encode, the one that lets go of the interpreter's lock; it leaves out offsets, too.
        (encoded,) = self._plain.encode_batch_fast([whole], add_special_tokens=False)
        ids: list[int] = encoded.ids
        return ids

    def _control_tokens(self, text: str) -> Iterator[tuple[int, int, int]]:
        """Where control tokens begin and end, the leftmost and longest first, and their ids."""
        at = 0
        for start, end in text.own_runs() if isinstance(text, Traced) else ((0, len(text)),):
            for match in self._first.finditer(text, start, end):
                found = match.start()
                if found < at or (id := self._control_at(text, found, end)) is None:
                    continue
                token = self._control[id]
                begin, at_end = found, found + len(token["content"])
                while token["lstrip"] and begin > at and text[begin - 1].isspace():
                    begin -= 1
                while token["rstrip"] and at_end < len(text) and text[at_end].isspace():
                    at_end += 1
                yield begin, at_end, id
                at = at_end

    def _control_at(self, text: str, start: int, end: int) -> int | None:
        """The longest control token that begins here and ends by `end`."""
        for length in self._lengths[str.__getitem__(text, start)]:
            id: int | None = self._ids.get(str.__getitem__(text, slice(start, min(start + length, end))))
            if id is not None and not (self._control[id]["single_word"] and _in_word(text, start, start + length)):
                return id
        return None


def piece_decoder(*, prefixed: bool = False) -> decoders.Decoder:
    """Joins SentencePiece's pieces; the space that was put before a text goes if it is `prefixed`."""
    strip = [decoders.Strip(" ", 1, 0)] if prefixed else []
    return decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])


@dataclass(frozen=True, slots=True)
class _Prefix:
    """The space that is put before texts."""

    exists: bool
    each: bool
    """Whether it is put before each text between control tokens, not at the beginning alone."""
    once: bool
    """Whether a text that begins with a space has it already."""

    @classmethod
    def of(cls, source: dict[str, Any]) -> "_Prefix":
        """That of a `tokenizer.json`."""
        if any(step["type"] == "Prepend" for step in _steps(source, "normalizer")):
            return cls(exists=True, each=True, once=False)
        steps = (step for step in _steps(source, "pre_tokenizer") if step["type"] == "Metaspace")
        metaspace = next(steps, {"prepend_scheme": "never"})
        # Files of before 2024 say whether it puts a space before a text, and not when.
        by_default = "always" if metaspace.get("add_prefix_space", True) else "never"
        scheme = metaspace.get("prepend_scheme", by_default)
        return cls(exists=scheme != "never", each=scheme == "always", once=True)

    def put_before(self, text: str) -> str:
        """The text with the space."""
        return f" {text}" if self.exists and not (self.once and text.startswith((" ", SPACE))) else text


_NESTED = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}


def _steps(source: dict[str, Any], part: str) -> list[dict[str, Any]]:
    """The steps of a part of the pipeline, of which there may be one or none."""
    described = source.get(part)
    if described is None:
        return []
    return list(described[_NESTED[part]]) if described["type"] == "Sequence" else [described]


def _spells_spaces(source: dict[str, Any]) -> bool:
    """Whether the vocabulary is as SentencePiece has it, with `▁` for spaces."""
    replaced = (step.get("content") == SPACE for step in _steps(source, "normalizer") if step["type"] == "Replace")
    return any(replaced) or any(step["type"] == "Metaspace" for step in _steps(source, "pre_tokenizer"))


def _check(source: dict[str, Any]) -> None:
    """Refuse what is of another kind."""
    model = source["model"]
    # Files of before 2021 don't say the kind; a unigram model's vocabulary is a list.
    kind = model.get("type", "BPE" if isinstance(model["vocab"], dict) else "Unigram")
    if kind not in ("BPE", "Unigram"):
        raise UnsupportedModelError(f"the tokenizer's model is {kind}; BPE and Unigram are supported")
    kinds = [step["type"] for step in _steps(source, "decoder")]
    if kind == "BPE" and kinds == ["ByteLevel"]:
        return
    strips = {"Strip"} if _Prefix.of(source).exists else set()
    known = {*kinds} <= {"Replace", "ByteFallback", "Fuse", "Metaspace"} | strips
    if not known or not kinds or not _spells_spaces(source) or not {"Replace", "Metaspace"} & {*kinds}:
        raise UnsupportedModelError(
            f"the tokenizer's decoder is {', '.join(kinds) or 'none'}; supported: ByteLevel, or as SentencePiece has "
            "it: Replace or Metaspace, ByteFallback, Fuse, and Strip of the space that is put before texts"
        )


def _text_among(added: set[str], model: dict[str, Any]) -> set[str]:
    """Added tokens that are white space, or words that merges lead to anyway: nothing that controls anything."""
    space = {token for token in added if not token.replace(SPACE, "").strip()}
    words = {token for token in added - space if token in model["vocab"]} if "merges" in model else set()
    if words:
        words.intersection_update("".join(merge).replace(" ", "") for merge in model["merges"])
    return space | words


def _without_control_tokens(source: dict[str, Any], ids: dict[str, int]) -> str:
    """A `tokenizer.json` in which control tokens have names that nobody can guess, so that no text spells them."""
    secret = secrets.token_hex(16)
    names = {text: f"<{secret}:{id}>" for text, id in ids.items()}
    # They are special, since a grammar's compiler lets no text match a token that is.
    added = [
        token | {"content": names[token["content"]], "special": True} if token["content"] in names else token
        for token in source["added_tokens"]
    ]
    model, vocab = source["model"], source["model"]["vocab"]
    renamed = (
        {names.get(text, text): id for text, id in vocab.items()}
        if isinstance(vocab, dict)
        else [(names.get(text, text), score) for text, score in vocab]
    )
    # A post-processor adds tokens that are not asked for here; padding and truncation are of somebody's training run.
    others: dict[str, Any] = {"post_processor": None, "padding": None, "truncation": None}
    if _Prefix.of(source).exists:
        others |= {part: _without_prefix(source, part) for part in ("normalizer", "pre_tokenizer")}
    return json.dumps(
        source | others | {"added_tokens": added, "model": model | {"vocab": renamed}}, ensure_ascii=False
    )


def _without_prefix(source: dict[str, Any], part: str) -> dict[str, Any] | None:
    """A part of the pipeline that puts no space before texts: this is done here, where it is known what begins."""
    steps = [
        step | {"prepend_scheme": "never", "add_prefix_space": False} if step["type"] == "Metaspace" else step
        for step in _steps(source, part)
        if step["type"] != "Prepend"
    ]
    return {"type": "Sequence", _NESTED[part]: steps} if steps else None


def _in_word(text: str, start: int, end: int) -> bool:
    """Whether a letter or digit stands right before or after."""
    beside = (text[start - 1 : start] if start else "", text[end : end + 1])
    return any(char == "_" or char.isalnum() for char in beside)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 is itself, the rest U+0100 and up, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _speller(source: dict[str, Any]) -> Callable[[str], bytes]:
    """What gives the bytes of a vocabulary's entries."""
    if not _spells_spaces(source):
        return _unmap
    byte = re.compile("<0x([0-9A-F]{2})>" if source["model"].get("byte_fallback") else "(?!)")

    def spell(text: str) -> bytes:
        match = byte.fullmatch(text)
        return bytes.fromhex(match[1]) if match else text.replace(SPACE, " ").encode()

    return spell


def _unmap(text: str) -> bytes:
    """The bytes that a vocabulary entry spells; one outside the alphabet (unused filler) is taken as text."""
    try:
        return bytes([_BYTE_OF[char] for char in text])
    except KeyError:
        return text.encode()
