"""Encode and decode with a model's own `tokenizer.json`, down to the bytes of each token."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from slipstream.errors import InvalidRequestError, ModelError, UnsupportedModelError


class Tokenizer:
    """A byte-level BPE tokenizer.

    Every token is a byte string and a text's tokens concatenate to its UTF-8, so decoding is joining bytes.
    Incremental decoding and grammars over bytes rest on that; other kinds of tokenizer are refused.

    A vocabulary may lack a few bytes (SmolLM2's has no token for U+0004, for one). `encode` leaves them out,
    as the original tokenizers do.

    Raises:
        UnsupportedModelError: the backend isn't byte-level BPE.
    """

    def __init__(self, backend: Backend) -> None:
        if not isinstance(backend.model, models.BPE):
            raise UnsupportedModelError(
                f"the tokenizer's model is {type(backend.model).__name__}; only byte-level BPE is supported"
            )
        if not isinstance(backend.decoder, decoders.ByteLevel):
            kind = "none" if backend.decoder is None else type(backend.decoder).__name__
            raise UnsupportedModelError(f"the tokenizer's decoder is {kind}; only ByteLevel is supported")
        # A tokenizer.json may carry the padding and truncation of somebody's training run.
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self._special = frozenset(id for id, token in added.items() if token.special)
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self._bytes = [b""] * (max(vocabulary.values(), default=-1) + 1)
        for text, id in vocabulary.items():
            self._bytes[id] = text.encode() if id in added else _unmap(text)

    @classmethod
    def from_file(cls, path: Path) -> "Tokenizer":
        """Load a `tokenizer.json`.

        Raises:
            ModelError: the file can't be read or isn't a tokenizer.
            UnsupportedModelError: it isn't byte-level BPE.
        """
        try:
            backend = Backend.from_file(str(path))
        except Exception as error:  # the library raises bare Exception, for a missing file too
            raise ModelError(f"can't load the tokenizer {path}: {error}") from error
        return cls(backend)

    @property
    def vocab_size(self) -> int:
        """One more than the highest token id; the model's logits may be wider, with ids of no token."""
        return len(self._bytes)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`. The texts of special tokens in it become those tokens; no BOS is added.

        Raises:
            InvalidRequestError: `text` holds a lone surrogate, which no UTF-8 can express.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequestError(
                f"the text has a lone surrogate, \\u{ord(text[error.start]):04x}, at position {error.start};"
                " send valid Unicode"
            ) from error
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of `ids`; bytes that aren't UTF-8 become U+FFFD, ids of no token become nothing."""
        skipped = self._special if skip_special else frozenset[int]()
        return b"".join(self.token_bytes(id) for id in ids if id not in skipped).decode(errors="replace")

    def token_bytes(self, id: int) -> bytes:
        """The bytes of a token, perhaps part of a character; b"" for an id of no token."""
        return self._bytes[id] if 0 <= id < len(self._bytes) else b""

    def is_special(self, id: int) -> bool:
        """Whether `id` is a control token such as `<|im_end|>`, which isn't part of the text."""
        return id in self._special

    def token_id(self, text: str) -> int | None:
        """The id of the token that the vocabulary spells `text` (`<|im_end|>`, `Ġthe`), if there is one."""
        return self._backend.token_to_id(text)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 is itself, the rest U+0100 and up, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _unmap(text: str) -> bytes:
    """The bytes that a vocabulary entry spells; one outside the alphabet (unused filler) is taken as text."""
    try:
        return bytes([_BYTE_OF[char] for char in text])
    except KeyError:
        return text.encode()
