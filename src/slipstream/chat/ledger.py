"""The exact token ids of every conversation that was answered, so that none is ever tokenised again."""

import heapq
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np

from slipstream.chat.messages import Digest
from slipstream.recent import Recent
from slipstream.tokens import Tokens
from slipstream.types import IntArray

_WHOLE = 64
"""How many conversations, those used last, have all of their token ids in one piece."""


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
    children: int = field(default=0, init=False)
    """How many entries have it for a parent."""
    used: int = field(default=0, init=False)
    """When it was last used, in the ledger's own time."""

    @property
    def answer(self) -> IntArray:
        """The tokens of the answer."""
        return self.tokens[len(self.tokens) - self.generated :]


class Ledger:
    """A tree of conversations, keyed by the digests of their messages; bounded by `max_tokens`, oldest use first.

    To use a conversation is to use those that it goes on from. Not thread-safe: its owner locks.
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._entries: dict[Digest, LedgerEntry] = {}
        self._leaves: list[tuple[int, Digest]] = []
        """A heap of all entries without children and when they were used, perhaps too early or long ago."""
        self._whole: Recent[Digest, Tokens] = Recent(_WHOLE)
        self._time = 0
        self.total_tokens = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Digest) -> LedgerEntry | None:
        """The entry of a conversation, if it's known."""
        return self._entries.get(key)

    def tokens(self, key: Digest) -> Tokens:
        """All token ids of a known conversation from its start; counts as a use."""
        self._use(key)
        whole = self._whole.get(key)
        if whole is None:
            whole = Tokens(np.concatenate([self._entries[each].tokens for each in self._lineage(key)]))
        self._whole[key] = whole
        return whole

    def path(self, key: Digest) -> list[tuple[Digest, int]]:
        """The parts of a known conversation, from its start, and how many tokens there are up to the end of each."""
        keys = self._lineage(key)
        return list(zip(keys, accumulate(len(self._entries[key].tokens) for key in keys), strict=True))

    def add(self, key: Digest, entry: LedgerEntry, whole: Tokens | None = None) -> None:
        """Add a conversation, with all of its token ids if they are at hand.

        What is known already stays as it is, for its continuations rest on it.
        """
        if key in self._entries or (entry.parent is not None and entry.parent not in self._entries):
            return
        self._entries[key] = entry
        self.total_tokens += len(entry.tokens)
        self._use(key)
        heapq.heappush(self._leaves, (entry.used, key))
        if entry.parent is not None:
            self._entries[entry.parent].children += 1
            self._whole.pop(entry.parent, None)
        if whole is not None:
            self._whole[key] = whole
        while self.total_tokens > self._max_tokens and len(self._entries) > 1:
            self._evict()

    def _use(self, key: Digest) -> None:
        self._time += 1
        self._entries[key].used = self._time

    def _lineage(self, key: Digest) -> list[Digest]:
        """The conversations that one goes on from, the first one first, and itself."""
        keys = [key]
        while (parent := self._entries[keys[-1]].parent) is not None:
            keys.append(parent)
        return keys[::-1]

    def _evict(self) -> None:
        """Forget the least recently used of the conversations that no other goes on from."""
        while True:
            noted, key = heapq.heappop(self._leaves)
            entry = self._entries.get(key)
            if entry is None or entry.children:  # it comes back with the last child's end
                continue
            if entry.used == noted:
                break
            heapq.heappush(self._leaves, (entry.used, key))
        del self._entries[key]
        self._whole.pop(key, None)
        self.total_tokens -= len(entry.tokens)
        if entry.parent is not None:
            parent = self._entries[entry.parent]
            parent.children -= 1
            parent.used = max(parent.used, entry.used)
            if not parent.children:
                heapq.heappush(self._leaves, (parent.used, entry.parent))
