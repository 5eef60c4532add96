"""Decode tokens to text as they are generated, never showing half a character."""

import codecs
from collections.abc import Container, Iterable

from slipstream.tokenizer.provenance import Traced, content, joined, own
from slipstream.tokenizer.tokenizer import Tokenizer


class IncrementalDecoder:
    """Text of a growing list of tokens, in O(1) per token.

    Special tokens are left out unless they are to be `shown`, or `skip_special` is off. The text of control tokens is
    their own, all other is content. A character's bytes may lie in several tokens; they are held back until it is
    whole. The results of all `feed`s and of the final `flush` concatenate to what `Tokenizer.decode` gives for all ids
    at once.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True, shown: Container[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._shown = shown
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, ids: Iterable[int]) -> Traced:
        """The text that `ids` complete: empty while a character is unfinished."""
        pieces: list[Traced] = []
        plain: list[bytes] = []
        tokenizer = self._tokenizer
        for id in ids:
            if self._skip_special and tokenizer.is_special(id) and id not in self._shown:
                continue
            if not tokenizer.is_control(id):
                plain.append(tokenizer.token_bytes(id))
                continue
            pieces += self._content(plain), self._whole(self._utf8.decode(tokenizer.token_bytes(id)), id)
            plain = []
        rest = self._content(plain)
        return joined("", (*pieces, rest)) if pieces else rest

    def flush(self) -> Traced:
        """What is held back, as U+FFFD, or nothing; the decoder starts afresh."""
        return content(self._utf8.decode(b"", final=True))

    def _content(self, tokens: Iterable[bytes]) -> Traced:
        return content(self._utf8.decode(b"".join(tokens)))

    def _whole(self, decoded: str, id: int) -> Traced:
        """The text of a control token, after what the tokens before left unfinished."""
        length = len(self._tokenizer.token_bytes(id).decode(errors="replace"))
        return content(decoded[: len(decoded) - length]) + own(decoded[len(decoded) - length :])
