"""Decode tokens to text as they are generated, never showing half a character."""

import codecs
from collections.abc import Iterable

from slipstream.tokenizer.tokenizer import Tokenizer


class IncrementalDecoder:
    """Text of a growing list of tokens, in O(1) per token.

    A character's bytes may lie in several tokens; they are held back until it is whole. The results of all
    `feed`s and of the final `flush` concatenate to what `Tokenizer.decode` gives for all ids at once.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, ids: Iterable[int]) -> str:
        """The text that `ids` complete: empty while a character is unfinished."""
        tokenizer = self._tokenizer
        return self._utf8.decode(
            b"".join(tokenizer.token_bytes(id) for id in ids if not (self._skip_special and tokenizer.is_special(id)))
        )

    def flush(self) -> str:
        """What is held back, as U+FFFD, or nothing; the decoder starts afresh."""
        return self._utf8.decode(b"", final=True)
