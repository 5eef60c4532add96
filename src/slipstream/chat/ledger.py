"""The exact token ids of every conversation that was answered, so that none is ever tokenised again."""

from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from slipstream.chat.messages import Digest
from slipstream.types import IntArray


@dataclass(slots=True)
class LedgerEntry:
    """A conversation up to and including an assistant's message that was generated here."""

    parent: Digest | None
    """The nearest earlier such conversation, whose tokens come first."""
    tokens: IntArray
    """The tokens since then: the messages in between as they were rendered, the answer as it was generated."""
    conversation_id: str
    generated: int = 0
    """How many of them the answer is, at the end."""

    @property
    def answer(self) -> IntArray:
        """The tokens of the answer."""
        return self.tokens[len(self.tokens) - self.generated :]


class Ledger:
    """A tree of conversations, keyed by the digests of their messages; bounded by `max_tokens`, oldest use first.

    Not thread-safe: its owner locks.
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._entries: dict[Digest, LedgerEntry] = {}  # least recently used first
        self.total_tokens = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Digest) -> LedgerEntry | None:
        """The entry of a conversation, if it's known."""
        return self._entries.get(key)

    def tokens(self, key: Digest) -> IntArray:
        """All token ids of a known conversation from its start, int32; counts as a use."""
        parts = []
        at: Digest | None = key
        while at is not None:
            entry = self._entries[at] = self._entries.pop(at)  # parents end up more recent than their children
            parts.append(entry.tokens)
            at = entry.parent
        return np.concatenate(parts[::-1])

    def path(self, key: Digest) -> list[tuple[Digest, int]]:
        """The parts of a known conversation, from its start, and how many tokens there are up to the end of each."""
        keys: list[Digest] = []
        at: Digest | None = key
        while at is not None:
            keys.append(at)
            at = self._entries[at].parent
        keys.reverse()
        return list(zip(keys, accumulate(len(self._entries[key].tokens) for key in keys), strict=True))

    def add(self, key: Digest, entry: LedgerEntry) -> None:
        """Add a conversation; what is known already stays as it is, for its continuations rest on it."""
        if key in self._entries or (entry.parent is not None and entry.parent not in self._entries):
            return
        self._entries[key] = entry
        self.total_tokens += len(entry.tokens)
        if entry.parent is not None:
            self.tokens(entry.parent)  # counts as a use
        while self.total_tokens > self._max_tokens and len(self._entries) > 1:
            self._evict()

    def _evict(self) -> None:
        oldest = next(iter(self._entries))
        self.total_tokens -= len(self._entries.pop(oldest).tokens)
