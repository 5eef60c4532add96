"""Build a tokenizer from the vocabulary, merges and token types that a GGUF file carries.

GGUF names the pre-tokenizer and leaves its rules to the reader. The rules here are those in the original
models' `tokenizer.json` files, not llama.cpp's rewriting of them.
"""

from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers
from tokenizers import Tokenizer as Backend
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split

from slipstream.errors import ModelError, UnsupportedModelError


def build_tokenizer(metadata: Mapping[str, Any]) -> Backend:
    """The tokenizer that GGUF metadata describes; its token ids are the file's.

    Control tokens become special tokens, user-defined ones become added tokens that are part of the text.

    Args:
        metadata: the file's keys (`tokenizer.ggml.…`) with plain Python values.

    Raises:
        UnsupportedModelError: `tokenizer.ggml.model` or `tokenizer.ggml.pre` is of another kind; names it.
        ModelError: the vocabulary or the merges are missing.
    """
    kind = tokenizer_kind(metadata)
    tokens, merges = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.merges")
    if not tokens or merges is None:
        raise ModelError("the GGUF metadata has no tokenizer.ggml.tokens or no tokenizer.ggml.merges")
    backend = Backend(
        models.BPE(
            vocab={token: id for id, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ")) for merge in merges],
            # Llama 3 takes a pre-token that is a vocabulary entry whole, even where no merges lead to it.
            ignore_merges=kind == "llama-bpe",
        )
    )
    if kind == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _PRE_TOKENIZERS[kind]()
    backend.decoder = decoders.ByteLevel()
    types = metadata.get("tokenizer.ggml.token_type", ())
    added = [(token, type) for token, type in zip(tokens, types, strict=False) if type in _ADDED]
    # Its text in a normalized form isn't the token's: match added tokens before normalization.
    backend.add_tokens(
        [AddedToken(token, special=type == TokenType.CONTROL, normalized=False) for token, type in added]
    )
    return backend


def tokenizer_kind(metadata: Mapping[str, Any]) -> str:
    """The pre-tokenizer that the metadata names, aliases resolved; UnsupportedModelError for other kinds."""
    model, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if model != "gpt2":
        raise UnsupportedModelError(
            f"the GGUF tokenizer model is {model!r}; supported: 'gpt2' (byte-level BPE). "
            "An OpenVINO IR export of the model may do, if its tokenizer.json is byte-level"
        )
    kind = _ALIASES.get(str(pre), str(pre))
    if kind not in _PRE_TOKENIZERS:
        raise UnsupportedModelError(
            f"the GGUF pre-tokenizer is {pre!r}; supported: {', '.join([*_PRE_TOKENIZERS, *_ALIASES])}. "
            "An OpenVINO IR export of the model brings its own tokenizer.json"
        )
    return kind


class TokenType(IntEnum):
    """Values of `tokenizer.ggml.token_type` that matter here."""

    CONTROL = 3
    USER_DEFINED = 4


_ADDED = frozenset(TokenType)
_ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe"}


def _smollm() -> PreTokenizer:
    return Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])


def _gpt2() -> PreTokenizer:
    return ByteLevel(add_prefix_space=False)


def _llama3() -> PreTokenizer:
    return _split_by(r"\p{N}{1,3}")


def _qwen2() -> PreTokenizer:
    return _split_by(r"\p{N}")


def _split_by(number: str) -> PreTokenizer:
    """The pattern that Llama 3 and Qwen 2 share but for how digits are grouped."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + number
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = Split(Regex(pattern), behavior="isolated")
    return Sequence([split, ByteLevel(add_prefix_space=False, use_regex=False)])


_PRE_TOKENIZERS: dict[str, Callable[[], PreTokenizer]] = {
    "smollm": _smollm,
    "gpt-2": _gpt2,
    "llama-bpe": _llama3,
    "qwen2": _qwen2,
}
