"""Build a tokenizer from the vocabulary, merges or scores, and token types that a GGUF file carries."""

from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from slipstream.errors import ModelError, UnsupportedModelError
from slipstream.tokenizer.pre_tokenizers import ALIASES, RULES, rule_of
from slipstream.tokenizer.tokenizer import SPACE, piece_decoder


def build_tokenizer(metadata: Mapping[str, Any]) -> Backend:
    """The tokenizer that GGUF metadata describes; its token ids are the file's.

    Control tokens become special tokens, user-defined ones become added tokens that are part of the text.

    Args:
        metadata: the file's keys (`tokenizer.ggml.…`) with plain Python values.

    Raises:
        UnsupportedModelError: `tokenizer.ggml.model` or `tokenizer.ggml.pre` is of another kind; names it.
        ModelError: the vocabulary, the merges or the scores are missing.
    """
    kind = tokenizer_kind(metadata)
    tokens = list(_wanted(metadata, "tokens"))
    types = list(metadata.get("tokenizer.ggml.token_type", ()))
    types += [TokenType.NORMAL] * (len(tokens) - len(types))
    backend = _BUILDERS.get(kind, _byte_level)(metadata, tokens, types)
    backend.add_tokens(_added_tokens(metadata, tokens, types, kind))
    return backend


def tokenizer_kind(metadata: Mapping[str, Any]) -> str:
    """The pre-tokenizer of a byte-level vocabulary, aliases resolved, or else the model that the metadata names.

    Raises `UnsupportedModelError` for other kinds.
    """
    model, pre = metadata.get("tokenizer.ggml.model"), str(metadata.get("tokenizer.ggml.pre"))
    if model in _BUILDERS:
        return str(model)
    if model != "gpt2":
        raise UnsupportedModelError(
            f"the GGUF tokenizer model is {model!r}; supported: 'gpt2' (byte-level BPE), "
            f"{', '.join(map(repr, _BUILDERS))} (SentencePiece). "
            "An OpenVINO IR export of the model brings its own tokenizer.json"
        )
    if pre in _OF_WHOLE_TEXTS:
        return "gemma4"
    if rule_of(pre) is None:
        named = metadata.get("tokenizer.ggml.pre")
        raise UnsupportedModelError(
            f"the GGUF pre-tokenizer is {named!r}; supported: {', '.join([*RULES, *ALIASES, *_OF_WHOLE_TEXTS])}. "
            "An OpenVINO IR export of the model brings its own tokenizer.json"
        )
    return ALIASES.get(pre, pre)


def adds_bos(metadata: Mapping[str, Any]) -> bool:
    """Whether a prompt begins with the beginning-of-text token; raises as `tokenizer_kind` does."""
    kind = tokenizer_kind(metadata)
    rule = rule_of(kind)
    by_default = rule.takes_bos if rule is not None else kind in ("llama", "gemma4")
    return bool(metadata.get("tokenizer.ggml.add_bos_token", by_default))


class TokenType(IntEnum):
    """Values of `tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def _wanted(metadata: Mapping[str, Any], name: str) -> Sequence[Any]:
    found: Sequence[Any] | None = metadata.get(f"tokenizer.ggml.{name}")
    if not found:
        raise ModelError(f"the GGUF metadata has no tokenizer.ggml.{name}")
    return found


def _added_tokens(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], kind: str
) -> list[AddedToken]:
    special = {TokenType.CONTROL} if kind in RULES else {TokenType.CONTROL, TokenType.UNKNOWN}
    # The file doesn't say so, but white space after one of Phi-3's control tokens is part of it.
    strips = kind == "llama" and metadata.get("general.architecture") == "phi3"
    # Its text in a normalized form isn't the token's: match added tokens before normalization.
    return [
        AddedToken(
            token,
            special=type in special,
            normalized=False,
            rstrip=strips and type == TokenType.CONTROL and token not in _PHI3_NOT_STRIPPING,
        )
        for token, type in zip(tokens, types, strict=True)
        if type in special or type == TokenType.USER_DEFINED
    ]


_PHI3_NOT_STRIPPING = ("<s>", "<|endoftext|>")


# --- byte-level BPE ---


def _byte_level(metadata: Mapping[str, Any], tokens: list[str], types: list[int]) -> Backend:
    del types
    rule = RULES[tokenizer_kind(metadata)]
    merges = metadata.get("tokenizer.ggml.merges")
    if merges is None:
        raise ModelError("the GGUF metadata has no tokenizer.ggml.merges")
    backend = Backend(
        models.BPE(vocab=_ids(tokens), merges=_pairs(merges), ignore_merges=rule.takes_entries_whole),
    )
    if rule.composes:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = rule.pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    return backend


def _ids(tokens: Sequence[str]) -> dict[str, int]:
    return {token: id for id, token in enumerate(tokens)}


def _pairs(merges: Sequence[str]) -> list[tuple[str, str]]:
    """The two parts of each merge, of which the first is at least a character long."""
    cuts = ((merge, merge.index(" ", 1)) for merge in merges)
    return [(merge[:at], merge[at + 1 :]) for merge, at in cuts]


# --- SentencePiece ---


def _byte_fallback(metadata: Mapping[str, Any], tokens: list[str], types: list[int]) -> Backend:
    """BPE over the characters of whole texts, in which spaces are `▁` and what has no token is bytes."""
    # Runs of spaces are added tokens of Gemma's, which the file spells as spaces, unlike the vocabulary.
    for id, (token, type) in enumerate(zip(tokens, types, strict=True)):
        if type == TokenType.USER_DEFINED and not token.strip(" "):
            tokens[id] = SPACE * len(token)
    merges = metadata.get("tokenizer.ggml.merges")
    pairs = _pairs(merges) if merges else _merges(tokens, types, _wanted(metadata, "scores"))
    backend = Backend(
        models.BPE(
            vocab=_ids(tokens),
            merges=pairs,
            unk_token=_unknown(metadata, tokens, types),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    to_spelled = normalizers.Replace(" ", SPACE)
    prefixed = metadata.get("tokenizer.ggml.add_space_prefix", metadata["tokenizer.ggml.model"] == "llama")
    if prefixed and ("[INST]", TokenType.CONTROL) in zip(tokens, types, strict=True):
        # Of Mistral since v2 it is a control token, and the text after it has no space put before it.
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    elif prefixed:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), to_spelled])
    else:
        backend.normalizer = to_spelled
    backend.decoder = piece_decoder(prefixed=prefixed)
    return backend


def _merges(tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """The merges that scores stand for: any two tokens that make a third, the best third first.

    Tokens of equal scores come in the order of their ids. What is user-defined comes first of all, the longest first,
    for it is found in a text before anything is merged.
    """
    mergeable = (TokenType.NORMAL, TokenType.USER_DEFINED)
    ids = {token: id for id, (token, type) in enumerate(zip(tokens, types, strict=True)) if type in mergeable}

    def rank(token: str) -> tuple[bool, float, int]:
        id = ids[token]
        return (False, -len(token), id) if types[id] == TokenType.USER_DEFINED else (True, -scores[id], id)

    pairs: list[tuple[str, str]] = []
    for token in sorted(ids, key=rank):
        halves = ((token[:at], token[at:]) for at in range(1, len(token)))
        known = [(left, right) for left, right in halves if left in ids and right in ids]
        pairs += sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return pairs


def _unigram(metadata: Mapping[str, Any], tokens: list[str], types: list[int]) -> Backend:
    """The most likely of all ways to cut a text, by the tokens' scores."""
    scores = _wanted(metadata, "scores")
    unknown = _unknown(metadata, tokens, types)
    backend = Backend(
        models.Unigram(
            list(zip(tokens, map(float, scores), strict=True)),
            unk_id=tokens.index(unknown) if unknown is not None else None,
            byte_fallback=TokenType.BYTE in types,
        )
    )
    steps: list[normalizers.Normalizer] = []
    if characters := metadata.get("tokenizer.ggml.precompiled_charsmap"):
        steps.append(normalizers.Precompiled(bytes(value & 0xFF for value in characters)))
    prefixed = metadata.get("tokenizer.ggml.add_space_prefix", True)
    if metadata.get("tokenizer.ggml.remove_extra_whitespaces", False):
        # As T5 has it: of white space one space is left between words, and one before the first.
        steps += [normalizers.Strip(left=False, right=True), normalizers.Replace(Regex(" {2,}"), SPACE)]
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always" if prefixed else "never")
    else:
        steps += [*([normalizers.Prepend(SPACE)] if prefixed else []), normalizers.Replace(" ", SPACE)]
    backend.normalizer = normalizers.Sequence(steps)
    backend.decoder = piece_decoder(prefixed=prefixed)
    return backend


def _unknown(metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]) -> str | None:
    """The token that stands for what has none."""
    id = metadata.get("tokenizer.ggml.unknown_token_id")
    if id is None and TokenType.UNKNOWN in types:
        id = types.index(TokenType.UNKNOWN)
    return tokens[id] if id is not None else None


_Builder = Callable[[Mapping[str, Any], list[str], list[int]], Backend]

_BUILDERS: Mapping[str, _Builder] = {"llama": _byte_fallback, "gemma4": _byte_fallback, "t5": _unigram}
"""By `tokenizer.ggml.model`, but for byte-level BPE."""

_OF_WHOLE_TEXTS = ("gemma4", "sarvam-moe")
"""Pre-tokenizers of models that are named `gpt2` but are as Gemma's."""
