"""Whether any text fits: where none does, a grammar must not lead. By derivatives (Brzozowski 1964).

In Python, since llguidance has limits for grammars and none for questions, and patterns come from anywhere.
"""

from functools import lru_cache
from itertools import islice

from slipstream.chat.schema.regex import (
    EMPTY,
    HIGHEST,
    NEVER,
    Both,
    Chars,
    Either,
    Except,
    Regex,
    Repeat,
    Sequence,
    parts_of,
)
from slipstream.chat.schema.regex_writing import both, either, excepting, nullable, sequence

_MOST_STATES = 300
_LARGEST_STATE = 200
"""Nodes of an expression. Where texts are longer or patterns trickier, nobody knows before an answer comes there."""


@lru_cache(maxsize=4096)
def fits_nothing(texts: Regex) -> bool:
    """Whether no text fits; False if that would take too long to say. There are no anchors."""
    if texts == NEVER or not any(isinstance(part, Both | Except) for part in parts_of(texts)):
        return texts == NEVER
    samples = _samples(texts)
    if samples is None:
        return False
    known, pending = {texts}, [texts]
    while pending:
        state = pending.pop()
        if nullable(state):
            return False
        for char in samples:
            after = _derivative(state, char)
            if after == NEVER or after in known:
                continue
            if len(known) > _MOST_STATES or sum(1 for _ in islice(parts_of(after), _LARGEST_STATE)) == _LARGEST_STATE:
                return False
            known.add(after)
            pending.append(after)
    return True


def listed(texts: Regex, most: int) -> list[str] | None:
    """All texts that fit, if they are no more than that, as far as it's easy to see."""
    result: list[str] | None = None
    match texts:
        case Chars(ranges, (), False) if sum(high - low + 1 for low, high in ranges) <= most:
            result = [chr(point) for low, high in ranges for point in range(low, high + 1)]
        case Either(branches):
            each = [listed(branch, most) for branch in branches]
            result = None if None in each else [text for some in each for text in some or ()]
        case Sequence(parts):
            result = _products([listed(part, most) for part in parts], most)
        case Repeat(body, least, int(times)) if times <= most:
            result = listed(Either(tuple(Sequence((body,) * count) for count in range(least, times + 1))), most)
        case Both(parts):
            some = next((found for part in parts if (found := listed(part, most)) is not None), None)
            result = some and [text for text in some if all(_fits(part, text) for part in parts)]
    return None if result is None or len(result) > most else list(dict.fromkeys(result))


def _products(parts: list[list[str] | None], most: int) -> list[str] | None:
    result: list[str] = [""]
    for some in parts:
        if some is None or len(result) * len(some) > most:
            return None
        result = [before + text for before in result for text in some]
    return result


def _fits(texts: Regex, text: str) -> bool:
    for char in text:
        texts = _derivative(texts, char)
    return nullable(texts)


def _samples(texts: Regex) -> list[str] | None:
    """A character of each kind that the expression tells apart; None if it does by general categories."""
    bounds = {0}
    for part in parts_of(texts):
        if isinstance(part, Chars):
            if part.categories:
                return None
            for low, high in part.ranges:
                bounds |= {low, min(high + 1, HIGHEST)}
    return [chr(bound) for bound in sorted(bounds) if not 0xD800 <= bound < 0xE000] + ["\ue000"]


def _derivative(regex: Regex, char: str) -> Regex:  # noqa: PLR0911 - one for each kind
    """What may follow the character."""
    match regex:
        case Chars():
            return EMPTY if char in regex else NEVER
        case Either(branches):
            return either(_derivative(branch, char) for branch in branches)
        case Both(parts):
            return both(_derivative(part, char) for part in parts)
        case Except(body):
            return excepting(_derivative(body, char))
        case Repeat(body, least, most):
            if most == 0:
                return NEVER
            again = Repeat(body, max(least - 1, 0), None if most is None else most - 1)
            return sequence((_derivative(body, char), EMPTY if most == 1 else again))
        case Sequence(parts) if parts:
            rest = Sequence(parts[1:])
            first = sequence((_derivative(parts[0], char), rest))
            return either((first, _derivative(rest, char))) if nullable(parts[0]) else first
    return NEVER
