"""Prompt lookup: drafts of what comes next, copied from where the same words stood before (PLD, LLMA arXiv 2304.04487).

A draft follows the grammar where there is one: what the grammar forces is part of it, and only what is left open is
looked up. So one draft can run through several fields of a call.

Where the same words stood is rarely one place: `"path": "` stands in the call before, in the result that just came, in
the tool's description. Each length of match, in the conversation and in recent calls, makes a guess of its own. Which
of them to believe is learned from what the model then chose, for each n-gram apart, as branch predictors do (TAGE):
so after `"path": "` the result may be right, and after `"timeout": ` the last call.
"""

import contextlib
from collections import OrderedDict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from slipstream.engine.grammar import Constraint, GrammarBrokenError, GrammarFailedError
from slipstream.kv import Sequence
from slipstream.kv.prefix_index import common_length
from slipstream.types import IntArray

MAX_DRAFT = 32
NGRAM_SIZES = (1, 2, 3, 5, 8)
_LONGEST = NGRAM_SIZES[-1]
_LEAST_CHANCE = 0.05
"""A draft ends where it is less likely than this to be right so far."""

_SURE = 0.95
"""A copy that is so likely to go on is followed without looking elsewhere."""

_WHOLE_VALUE = 0.9
"""The chance that a value ends where its copy would go on with what the grammar forbids."""

_HASH_FACTOR = 0x9E3779B97F4A7C15
_HASH_MASK = 2**64 - 1
_FACTORS = [np.uint64(pow(_HASH_FACTOR, power, 2**64)) for power in range(_LONGEST)]
_POOL_TOKENS = 16_384
_WINDOW = 16_384
"""Tokens that are indexed at once, which takes some 20 ms; a conversation of more is seldom new."""
_DEEPEST = 8


@dataclass(slots=True)
class Draft:
    """Tokens that may come next, each with its chance to come true together with all before it.

    `guessed` marks those that were looked up; the others follow from the grammar.
    """

    tokens: list[int] = field(default_factory=list)
    guessed: list[bool] = field(default_factory=list)
    chances: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def chance(self) -> float:
        """That all of it comes true."""
        return self.chances[-1] if self.chances else 1.0

    def cut(self, length: int) -> "Draft":
        """The first `length` tokens."""
        return Draft(self.tokens[:length], self.guessed[:length], self.chances[:length])

    def append(self, token: int, rate: float, *, guessed: bool) -> None:
        """Add a token that comes true at that rate if all before it do."""
        self.chances.append(self.chance * rate)
        self.tokens.append(token)
        self.guessed.append(guessed)

    def extend(self, guesses: "list[_Guess]") -> None:
        """Add tokens that were looked up."""
        chance = self.chance
        self.chances += [chance := chance * guess.rate for guess in guesses]
        self.tokens += [guess.token for guess in guesses]
        self.guessed += [True] * len(guesses)


class NGramIndex:
    """Tokens to look things up in: where each n-gram of a growing list last stood.

    Costs O(1) for each token added and each lookup, whatever the length. Keys are hashes: a collision, or an entry for
    tokens that were since taken back, gives a bad draft, which is rejected like any other. So does what is missing: of
    many tokens at once the last `_WINDOW` are indexed, and an index that goes on from the first `length` tokens of
    another, `base`, knows of those what that one knows.
    """

    def __init__(self, base: "NGramIndex | None" = None, length: int = 0) -> None:
        self.tokens: IntArray = np.empty(0, np.int32)
        self._next: dict[int, dict[int, int]] = {size: {} for size in NGRAM_SIZES}
        self._base = base if base is not None and base.depth < _DEEPEST else None
        self._indexed = self._base_length = length if self._base is not None else 0
        self.depth: int = 1 + (self._base.depth if self._base is not None else 0)

    def update(self, tokens: IntArray) -> None:
        """Take `tokens`, int32 [n], as they are now: those from before and more, or fewer; and index what was added."""
        self.tokens = tokens
        start = max(1, min(self._indexed, len(tokens)), len(tokens) - _WINDOW)
        count = len(tokens) - start
        self._indexed = len(tokens)
        if count <= 0:
            return
        window = np.zeros(_LONGEST + count - 1, np.uint64)  # the tokens before each new one
        known = tokens[max(0, start - _LONGEST) : -1]
        window[len(window) - len(known) :] = known
        keys = np.zeros(count, np.uint64)
        for size, factor in enumerate(_FACTORS, start=1):
            keys += window[_LONGEST - size : _LONGEST - size + count] * factor
            if size in self._next:
                skipped = max(0, size - start)  # those that have fewer tokens before them
                self._next[size].update(zip(keys[skipped:].tolist(), range(start + skipped, len(tokens)), strict=True))

    def add(self, answer: IntArray) -> None:
        """Add an answer; when there are too many tokens, the older half goes."""
        tokens = np.concatenate((self.tokens, answer))
        if len(tokens) > _POOL_TOKENS:
            tokens = tokens[-_POOL_TOKENS // 2 :]
            self._next, self._indexed = {size: {} for size in NGRAM_SIZES}, 0
        self.update(tokens)

    def find(self, size: int, key: int) -> int | None:
        """The position that last followed the n-gram of that size and key (see `_keys`)."""
        place = self._next[size].get(key)
        if place is None and self._base is not None:
            place = self._base.find(size, key)
            return place if place is not None and place < self._base_length else None
        return place


def _keys(context: list[int]) -> Iterator[tuple[int, int]]:
    """The size and the key of each n-gram at the end of `context`, shortest first."""
    key, factor = 0, 1
    for size, token in enumerate(reversed(context), start=1):
        key = (key + token * factor) & _HASH_MASK
        factor = (factor * _HASH_FACTOR) & _HASH_MASK
        if size in NGRAM_SIZES:
            yield size, key


class _Guess(NamedTuple):
    """A token that may come next, and where it was found; guesses are ordered by rate and kind."""

    rate: float
    """The share of such guesses that were right, each given that all before it were."""
    kind: int
    """How it was found: by an n-gram of the kind's size, or, if it's one of the first two, where the last was right."""
    token: int
    position: int
    """Of the token in the text."""
    text: NGramIndex
    name: int
    """Of the n-gram before it and the kind."""


_RUN, _RUN_RECENT = 0, 1
_KINDS = {size: 2 * (at + 1) for at, size in enumerate(NGRAM_SIZES)}
"""The kind of an n-gram in the conversation, by its size; in recent calls it is the next one."""


class Experience:
    """How often guesses came true: those after an n-gram, and where that is new, those of the kind."""

    _MAX_NAMES = 65_536
    _SLOWEST = 0.15
    """An n-gram's rate follows at least so fast what happens."""
    _SLOWEST_KIND = 0.02
    _PRIOR = 0.7

    def __init__(self) -> None:
        self._kinds = [self._PRIOR] * (2 * len(NGRAM_SIZES) + 2)
        self._names: OrderedDict[int, tuple[float, int]] = OrderedDict()  # learning is too frequent for `Recent`

    def guess(self, kind: int, key: int, text: NGramIndex, position: int) -> _Guess:
        """What stands at a place in a text, with how likely it is to be right after an n-gram of that key."""
        name = key * 16 + kind
        known = self._names.get(name)
        rate = known[0] if known is not None else self._kinds[kind]
        return _Guess(rate, kind, text.tokens.item(position), position, text, name)

    def sure(self, kind: int, before: int, text: NGramIndex, start: int, limit: int) -> list[_Guess]:
        """The tokens from a place in a text on, up to `limit`, of which each is sure to follow the one before."""
        found: list[_Guess] = []
        known, usual = self._names.get, (self._kinds[kind], 0)
        for position, token in enumerate(text.tokens[start : start + limit].tolist(), start):
            name = before * 16 + kind
            rate, _ = known(name, usual)
            if rate <= _SURE:
                break
            found.append(_Guess(rate, kind, token, position, text, name))
            before = token
        return found

    def learn(self, guess: _Guess, token: int) -> None:
        """Note which token came in its place."""
        names, right, usual = self._names, guess.token == token, self._kinds[guess.kind]
        known = names.pop(guess.name, None)
        rate, seen = known if known is not None else (usual, 0)
        speed = 1 / (seen + 2)
        rate += (right - rate) * (speed if speed > self._SLOWEST else self._SLOWEST)
        names[guess.name] = (rate, seen + 1)
        if len(names) > self._MAX_NAMES:
            names.popitem(last=False)
        self._kinds[guess.kind] = usual + (right - usual) * self._SLOWEST_KIND


@dataclass(slots=True)
class _Cursor:
    """The end of a text that is being written: its last tokens, and the place elsewhere that it has been following."""

    context: list[int]
    run: tuple[NGramIndex, int] | None = None

    def copy(self) -> "_Cursor":
        return _Cursor(list(self.context), self.run)

    def push(self, token: int) -> None:
        """Go on by a token."""
        if self.run is not None:
            text, position = self.run
            goes_on = position < len(text.tokens) and text.tokens.item(position) == token
            self.run = (text, position + 1) if goes_on else None
        self.context.append(token)
        del self.context[:-_LONGEST]

    def follow(self, copied: "list[_Guess]") -> None:
        """Go on by tokens that were copied one after the other."""
        self.context += [guess.token for guess in copied]
        del self.context[:-_LONGEST]
        self.run = (copied[-1].text, copied[-1].position + 1)


class _Lookup:
    """What drafts for one sequence are made from."""

    def __init__(self, recent: NGramIndex, experience: Experience) -> None:
        self.conversation = NGramIndex()
        self.recent = recent
        self.experience = experience
        self.cursor = _Cursor([])
        self.length = -1
        """Of the sequence up to the cursor."""

    def move_to(self, tokens: IntArray, length: int) -> None:
        """Be at the first `length` of the sequence's tokens."""
        if length != self.length:
            self.cursor = _Cursor(tokens[max(0, length - _LONGEST) : length].tolist())
            self.length = length

    def copied(self, cursor: _Cursor, limit: int) -> list[_Guess]:
        """The next tokens of the copy that is being followed, up to `limit` of them, while it surely goes on."""
        if cursor.run is None:
            return []
        text, position = cursor.run
        kind = _RUN_RECENT if text is self.recent else _RUN
        return self.experience.sure(kind, cursor.context[-1], text, position, limit)

    def guesses(self, cursor: _Cursor) -> Iterator[_Guess]:
        """What may come next: a copy that surely goes on, and then all guesses, likeliest first."""
        conversation, recent, guess = self.conversation, self.recent, self.experience.guess
        found = []
        if cursor.run is not None and cursor.run[1] < len(cursor.run[0].tokens):
            text, position = cursor.run
            found.append(guess(_RUN_RECENT if text is recent else _RUN, cursor.context[-1], text, position))
            if found[0].rate > _SURE:
                yield found[0]
        for size, key in _keys(cursor.context):
            kind = _KINDS[size]
            if (place := conversation.find(size, key)) is not None and place < len(conversation.tokens):
                found.append(guess(kind, key, conversation, place))
            if (place := recent.find(size, key)) is not None and place < len(recent.tokens):
                found.append(guess(kind + 1, key, recent, place))
        found.sort(reverse=True)
        yield from found


class Drafter:
    """Proposes drafts for all requests of an engine, and learns from what came true. Tenants share nothing."""

    def __init__(self) -> None:
        self._lookups: WeakKeyDictionary[Sequence, _Lookup] = WeakKeyDictionary()
        self._tenants: dict[str, tuple[NGramIndex, Experience]] = {}

    def propose(self, sequence: Sequence, constraint: Constraint | None, tenant: str, *, forced: bool) -> Draft:
        """A draft of what follows the sequence's tokens; `forced` lets the grammar's forced tokens take part."""
        lookup = self._lookup(sequence, tenant)
        lookup.conversation.update(sequence.tokens)
        lookup.move_to(sequence.tokens, len(sequence))
        draft = Draft()
        ahead = constraint.copy() if constraint is not None else None
        with contextlib.suppress(GrammarFailedError, GrammarBrokenError):  # a limit met ahead: the draft ends before it
            _extend(draft, lookup, ahead, forced=forced)
        return draft

    def learn(self, sequence: Sequence, tenant: str, start: int, chosen: Collection[int]) -> None:
        """Take note of the sequence's tokens from `start` on; the model chose those at the positions `chosen`."""
        lookup = self._lookup(sequence, tenant)
        lookup.move_to(sequence.tokens, start)
        lookup.conversation.tokens = sequence.tokens
        cursor, experience = lookup.cursor, lookup.experience
        tokens = sequence.tokens[start:].tolist()
        wanted = {position - start for position in chosen}
        done = 0
        while done < len(tokens):
            came_true: list[_Guess] = []
            for place, guess in enumerate(lookup.copied(cursor, len(tokens) - done), start=done):
                if place not in wanted or guess.token != tokens[place]:
                    break
                experience.learn(guess, guess.token)
                came_true.append(guess)
            if came_true:
                cursor.follow(came_true)
                done += len(came_true)
                continue
            token, right = tokens[done], None
            if done in wanted:
                for guess in lookup.guesses(cursor):
                    if right is None and guess.token == token:
                        right = guess
                    experience.learn(guess, token)
            if right is not None:
                cursor.run = (right.text, right.position)
            cursor.push(token)
            done += 1
        lookup.length = len(sequence)

    def remember(self, answer: IntArray, tenant: str) -> None:
        """Keep an answer that followed a grammar, for others to look up."""
        self._tenant(tenant)[0].add(answer)

    def _tenant(self, tenant: str) -> tuple[NGramIndex, Experience]:
        return self._tenants.setdefault(tenant, (NGramIndex(), Experience()))

    def _lookup(self, sequence: Sequence, tenant: str) -> _Lookup:
        known = self._lookups.get(sequence)
        if known is None:
            known = self._lookups[sequence] = _Lookup(*self._tenant(tenant))
            source = sequence.forked_from() if sequence.forked_from is not None else None
            if source is not None and source in self._lookups:
                base = self._lookups[source].conversation
                known.conversation = NGramIndex(base, common_length(source.tokens, sequence.tokens))
        return known


def _extend(draft: Draft, lookup: _Lookup, ahead: Constraint | None, *, forced: bool) -> None:
    """Add what is certain and what is guessed, in turns, until there is enough."""
    cursor = lookup.cursor.copy()
    while len(draft) < MAX_DRAFT and draft.chance >= _LEAST_CHANCE:
        if ahead is None and (copied := lookup.copied(cursor, MAX_DRAFT - len(draft))):
            draft.extend(copied)
            cursor.follow(copied)
            continue
        if ahead is not None and forced and (certain := ahead.forced()):
            if draft.tokens and draft.guessed[-1] and (joined := ahead.join(draft.tokens[-1], certain[0])):
                draft.tokens[-1] = cursor.context[-1] = joined
                continue
            ahead.accept(certain)
            for token in certain:
                draft.append(token, 1.0, guessed=False)
                cursor.push(token)
            continue
        if (likeliest := _likeliest(lookup, cursor, ahead)) is None:
            return
        draft.append(likeliest.token, likeliest.rate, guessed=True)
        cursor.run = (likeliest.text, likeliest.position)
        cursor.push(likeliest.token)
        if ahead is not None:
            ahead.accept((likeliest.token,))


def _likeliest(lookup: _Lookup, cursor: _Cursor, ahead: Constraint | None) -> _Guess | None:
    """The best guess that the grammar allows."""
    for guess in lookup.guesses(cursor):
        if ahead is None or ahead.valid_prefix((guess.token,)):
            return guess
        if guess.kind <= _RUN_RECENT and (end := ahead.value_end()) is not None:
            # A value was copied up to here, and what follows it there has no place here: then it's whole.
            return guess._replace(rate=_WHOLE_VALUE, token=end)
    return None
