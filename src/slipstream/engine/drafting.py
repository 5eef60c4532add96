"""Prompt lookup: drafts of what comes next, copied from where the same words stood before (PLD, LLMA arXiv 2304.04487).

A draft follows the grammar where there is one: what the grammar forces is part of it, and only what is left open is
looked up. So one draft can run through several fields of a call.
"""

import contextlib
from collections import defaultdict
from collections.abc import Sequence as ListLike
from dataclasses import dataclass, field
from itertools import product
from weakref import WeakKeyDictionary

import numpy as np

from slipstream.backend.base import IntArray
from slipstream.engine.grammar import Constraint, GrammarFailedError
from slipstream.kv import Sequence

MAX_DRAFT = 32
NGRAM_SIZES = (5, 4, 3, 2, 1)
"""Longer matches are asked first: what followed them is likelier to follow again."""
_SMALLEST_IN_PROSE = 2
"""A single token says something where a grammar says the rest."""

_PRIOR = 0.75
"""How often a guess comes true, as long as nothing is known."""
_SMOOTHING = 0.15
"""How fast rates follow what happens."""

_HASH_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_POOL_TOKENS = 16_384


@dataclass(slots=True)
class Draft:
    """Tokens that may come next. `guessed` marks those that were looked up; the others follow from the grammar."""

    after: int = -1
    """The token before the draft."""
    tokens: list[int] = field(default_factory=list)
    guessed: list[bool] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.tokens)

    def cut(self, length: int) -> "Draft":
        """The first `length` tokens."""
        return Draft(self.after, self.tokens[:length], self.guessed[:length])

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

    def find(self, suffix: IntArray, size: int) -> int | None:
        """The position that last followed the n-gram of that size at the end of `suffix`, int32 [n]."""
        if len(suffix) < size:
            return None
        return self._next[size].get(int(_hashes(suffix[-size:].astype(np.uint64), size)[0]))


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


class Experience:
    """How often guesses came true, by the token before them.

    After the quote that opens a value the model is free to go anywhere, while in the middle of a path or a number it
    mostly goes on as it did before.
    """

    def __init__(self) -> None:
        self._rates: dict[int, float] = {}

    def rate(self, after: int) -> float:
        """The share of guesses after this token that were right, each given that those before it were."""
        return self._rates.get(after, _PRIOR)

    def learn(self, after: int, came_true: bool) -> None:
        """Note what came of a guess."""
        rate = self.rate(after)
        self._rates[after] = rate + _SMOOTHING * (came_true - rate)


class Drafter:
    """Proposes drafts for all generations of an engine."""

    def __init__(self) -> None:
        self._experience: dict[str, Experience] = defaultdict(Experience)
        self._indexes: WeakKeyDictionary[Sequence, NGramIndex] = WeakKeyDictionary()
        self._recent: dict[str, RecentCalls] = {}

    def propose(self, sequence: Sequence, constraint: Constraint | None, tenant: str, *, forced: bool) -> Draft:
        """A draft of what follows the sequence's tokens; `forced` lets the grammar's forced tokens take part."""
        index = self._indexes.setdefault(sequence, NGramIndex())
        index.update(sequence.tokens)
        draft = Draft(after=int(sequence.tokens[-1]))
        ahead = constraint.copy() if constraint is not None else None
        with contextlib.suppress(GrammarFailedError):  # a limit met ahead: the draft ends before it
            self._extend(draft, sequence, index, ahead, tenant, forced=forced)
        return draft

    def chances(self, draft: Draft, tenant: str) -> list[float]:
        """The chance of each token of a draft to come true; a forced one is as likely as the one before."""
        experience = self._experience[tenant]
        chance, result = 1.0, []
        for after, guessed in zip((draft.after, *draft.tokens), draft.guessed, strict=False):
            chance *= experience.rate(after) if guessed else 1.0
            result.append(chance)
        return result

    def learn(self, draft: Draft, confirmed: int, tenant: str, *, refuted: bool) -> None:
        """Note that the first `confirmed` tokens of a draft came true, and whether the next one was wrong."""
        experience = self._experience[tenant]
        known = zip((draft.after, *draft.tokens), draft.guessed[: confirmed + refuted], strict=False)
        for index, (after, guessed) in enumerate(known):
            if guessed:
                experience.learn(after, index < confirmed)

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
                if draft.tokens and draft.guessed[-1] and (joined := ahead.join(draft.tokens[-1], certain[0])):
                    draft.tokens[-1] = joined
                else:
                    ahead.accept(certain)
                    draft.append(certain, guessed=False)
                continue
            guess = self._guess(sequence.tokens, index, draft.tokens, ahead, tenant)
            if not guess:
                break
            draft.append(guess, guessed=True)
            if ahead is None:
                break
            ahead.accept(guess)

    def remember(self, answer: IntArray, tenant: str) -> None:
        """Keep an answer that followed a grammar, for others to look up."""
        self._recent.setdefault(tenant, RecentCalls()).add(answer)

    def _guess(
        self, tokens: IntArray, index: NGramIndex, drafted: list[int], ahead: Constraint | None, tenant: str
    ) -> list[int]:
        """What last followed the longest n-gram at the end of tokens and draft, of what the grammar allows."""
        end = np.concatenate((tokens[-NGRAM_SIZES[0] :], np.asarray(drafted[-NGRAM_SIZES[0] :], np.int32)))
        sources = [(tokens, index)]
        if (recent := self._recent.get(tenant)) is not None:
            sources.append((recent.tokens, recent.index))
        for size, (text, places) in product(NGRAM_SIZES, sources):
            if (position := places.find(end, size)) is not None and (ahead is not None or size >= _SMALLEST_IN_PROSE):
                guess: list[int] = text[position : position + MAX_DRAFT - len(drafted)].tolist()
                if ahead is not None:
                    guess = guess[: ahead.valid_prefix(guess)]
                if guess:
                    return guess
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
