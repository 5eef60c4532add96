"""Where messages stand in a conversation's rendered text, told by where its characters come from."""

from collections.abc import Iterator
from itertools import groupby, pairwise
from typing import NamedTuple

import numpy as np

from slipstream.chat.messages import Message
from slipstream.tokenizer.provenance import ORIGINS, Traced, origin

_CERTAIN = 8
"""Characters that a match must have."""


class _Run(NamedTuple):
    """A stretch of text that is all of one message, by its number."""

    start: int
    end: int
    message: int


class Placing:
    """The places of so many messages in a rendered `text`, whose content has the messages' numbers for origins.

    Names of calls have none, since templates repeat them with the results.
    """

    def __init__(self, text: Traced, messages: int) -> None:
        self.text = text
        self._runs = list(_runs(text))
        self._messages = messages

    def divides(self, place: int, number: int) -> bool:
        """Whether messages up to this one stand before a place in the text, and later ones behind it."""
        return all(
            0 <= run.message <= number if run.start < place else number < run.message < self._messages
            for run in self._runs
        )

    def end_of(self, number: int, answer: Message, generated: str) -> int | None:
        """Where an answer ends that a model wrote as the end of `generated`, None if that can't be told.

        A text ends with the last of it; one that the template changed, but for white space, has no place. Behind calls,
        and reasoning alone, come tags that the template writes as the model did: they end where most of what was
        generated stands right before.
        """
        groups = groupby(self._runs, lambda run: run.message == number)
        own = next((list(group) for is_own, group in groups if is_own), [])  # those that come together first
        if answer.text and not answer.tool_calls:
            said = "".join(self.text[run.start : run.end] for run in own)
            told = (answer.text, answer.reasoning + answer.text)
            return own[-1].end if own and _squeezed(said) in map(_squeezed, told) else None
        before = (run.end for run in self._runs if run.message < number)
        start = own[-1].end if own else max(before, default=0)
        if not own and any(run.message > number and run.start < start for run in self._runs):
            return None
        others = (run.start for run in self._runs if run.start >= start and run.message != number)
        return _best_match(self.text, generated, start, next(others, len(self.text)))


def _runs(text: Traced) -> Iterator[_Run]:
    """Stretches of one message each. Origins begin anew after so many: it's the nearest message that has it."""
    mask = np.frombuffer(text.mask, np.uint8)
    changes = np.flatnonzero(mask[1:] != mask[:-1]) + 1
    number = 0
    for start, end in pairwise((0, *changes.tolist(), len(mask))):
        if start < end and mask[start] >= origin(0):
            step = (int(mask[start]) - origin(number)) % ORIGINS
            number += step if step <= ORIGINS // 2 else step - ORIGINS
            yield _Run(start, end, number)


def _squeezed(text: str) -> str:
    """A text without its white space."""
    return "".join(str.split(text))


def _best_match(text: str, generated: str, start: int, end: int) -> int | None:
    """The place between `start` and `end` that the end of what was generated stands right before, if it's certain."""
    bare = generated.rstrip()
    at, length = _longest_match(text, bare, start, end)
    whole, whole_length = _longest_match(text, generated, start, end)
    if whole_length - (len(generated) - len(bare)) >= length:
        at, length = whole, whole_length
    return at if length >= min(_CERTAIN, len(generated)) else None


def _longest_match(text: str, generated: str, start: int, end: int) -> tuple[int, int]:
    """Where the longest end of what was generated that is found ends, and how long it is."""
    shortest, longest = 0, min(len(generated), end)
    while shortest < longest:  # what has no match has none that's longer
        middle = (shortest + longest + 1) // 2
        if str.find(text, generated[-middle:], max(0, start - middle), end) >= 0:
            shortest = middle
        else:
            longest = middle - 1
    found = str.find(text, generated[len(generated) - shortest :], max(0, start - shortest), end)
    return found + shortest, shortest
