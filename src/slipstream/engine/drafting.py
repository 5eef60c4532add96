"""Prompt lookup: drafts of what comes next, copied from where the same words stood before (PLD, LLMA arXiv 2304.04487).

A draft follows the grammar where there is one: what the grammar forces is part of it, and only what is left open is
looked up. So one draft can run through several fields of a call.
"""

import contextlib
from collections.abc import Sequence as ListLike
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import numpy as np

from slipstream.backend.base import IntArray
from slipstream.engine.grammar import Constraint, GrammarFailedError
from slipstream.kv import Sequence

MAX_DRAFT = 32
NGRAM_SIZES = (5, 4, 3, 2)
"""Longer matches are asked first: what followed them is likelier to follow again."""

_HASH_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_POOL_TOKENS = 16_384


@dataclass(slots=True)
class Draft:
    """Tokens that may come next. `guessed` marks those that were looked up; the others follow from the grammar."""

    tokens: list[int] = field(default_factory=list)
    guessed: list[bool] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.tokens)

    def cut(self, length: int) -> "Draft":
        """The first `length` tokens."""
        return Draft(self.tokens[:length], self.guessed[:length])

    def append(self, tokens: ListLike[int], *, guessed: bool) -> None:
        """Add tokens of one kind."""
        self.tokens.extend(tokens)
        self.guessed.extend([guessed] * len(tokens))


class NGramIndex:
    """Where each n-gram of a growing list of tokens last stood.

    Costs O(1) for each token added and each lookup, whatever the length. Keys are hashes: a collision, or an entry for
    tokens that were since taken back, gives a bad draft, which is rejected like any other.
    """

    def __init__(self) -> None:
        self._next: dict[int, dict[int, int]] = {size: {} for size in NGRAM_SIZES}
        self._indexed = 0

    def update(self, tokens: IntArray) -> None:
        """Index what was added to `tokens`, int32 [n], since the last call."""
        self._indexed = min(self._indexed, len(tokens))
        for size, table in self._next.items():
            first = max(0, self._indexed - size)  # the first n-gram whose next token is new
            window = tokens[first:].astype(np.uint64)
            count = len(window) - size
            if count > 0:
                keys = _hashes(window, size)[:count]
                table.update(zip(keys.tolist(), range(first + size, first + size + count), strict=True))
        self._indexed = len(tokens)

    def find(self, suffix: IntArray) -> int | None:
        """The position that last followed the longest possible end of `suffix`, int32 [n]."""
        window = suffix[-NGRAM_SIZES[0] :].astype(np.uint64)
        for size, table in self._next.items():
            if len(window) >= size:
                position = table.get(int(_hashes(window[-size:], size)[0]))
                if position is not None:
                    return position
        return None


class RecentCalls:
    """The latest answers of a tenant that followed a grammar, as one more place to look things up."""

    def __init__(self) -> None:
        self.tokens = np.empty(0, np.int32)
        self.index = NGramIndex()

    def add(self, answer: IntArray) -> None:
        """Add an answer; when there are too many tokens, the older half goes."""
        self.tokens = np.concatenate((self.tokens, answer))
        if len(self.tokens) > _POOL_TOKENS:
            self.tokens = self.tokens[-_POOL_TOKENS // 2 :]
            self.index = NGramIndex()
        self.index.update(self.tokens)


class Drafter:
    """Proposes drafts for all generations of an engine."""

    def __init__(self) -> None:
        self._indexes: WeakKeyDictionary[Sequence, NGramIndex] = WeakKeyDictionary()
        self._recent: dict[str, RecentCalls] = {}

    def propose(self, sequence: Sequence, constraint: Constraint | None, tenant: str, *, forced: bool) -> Draft:
        """A draft of what follows the sequence's tokens; `forced` lets the grammar's forced tokens take part."""
        index = self._indexes.setdefault(sequence, NGramIndex())
        index.update(sequence.tokens)
        draft = Draft()
        ahead = constraint.copy() if constraint is not None else None
        with contextlib.suppress(GrammarFailedError):  # a limit met ahead: the draft ends before it
            self._extend(draft, sequence, index, ahead, tenant, forced=forced)
        return draft

    def _extend(
        self,
        draft: Draft,
        sequence: Sequence,
        index: NGramIndex,
        ahead: Constraint | None,
        tenant: str,
        *,
        forced: bool,
    ) -> None:
        """Add what is certain and what is guessed, in turns, until there is enough."""
        while len(draft.tokens) < MAX_DRAFT:
            if ahead is not None and forced and (certain := ahead.forced()):
                ahead.accept(certain)
                draft.append(certain, guessed=False)
                continue
            guess = self._look_up(sequence.tokens, index, draft.tokens, tenant, MAX_DRAFT - len(draft.tokens))
            if ahead is not None:
                guess = guess[: ahead.valid_prefix(guess)]
            if not guess:
                break
            draft.append(guess, guessed=True)
            if ahead is None:
                break
            ahead.accept(guess)

    def remember(self, answer: IntArray, tenant: str) -> None:
        """Keep an answer that followed a grammar, for others to look up."""
        self._recent.setdefault(tenant, RecentCalls()).add(answer)

    def _look_up(self, tokens: IntArray, index: NGramIndex, ahead: list[int], tenant: str, count: int) -> list[int]:
        suffix = np.concatenate((tokens[-NGRAM_SIZES[0] :], np.asarray(ahead[-NGRAM_SIZES[0] :], np.int32)))
        if (position := index.find(suffix)) is not None:
            return list(map(int, tokens[position : position + count]))
        recent = self._recent.get(tenant)
        if recent is not None and (position := recent.index.find(suffix)) is not None:
            return list(map(int, recent.tokens[position : position + count]))
        return []


def _hashes(
    window: np.ndarray[tuple[int], np.dtype[np.uint64]], size: int
) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """A hash of each run of `size` tokens in the window, uint64 [len - size + 1]."""
    count = len(window) - size + 1
    hashed = window[:count].copy()
    for offset in range(1, size):
        hashed = hashed * _HASH_FACTOR + window[offset : offset + count]
    return hashed
