"""Regular expressions written down: as terminals of a Lark grammar, in an answer's alphabet, and for Python's `re`.

In a grammar a pattern is a language of whole texts. Where `^` and `$` can match is worked out beforehand, and what
looks ahead or behind becomes an intersection, or a complement.
"""

import json
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache, reduce
from itertools import groupby, islice

from slipstream.chat.schema.losses import UnsupportedError
from slipstream.chat.schema.regex import (
    ANY,
    ANYTHING,
    EMPTY,
    HIGHEST,
    NEVER,
    SURROGATES,
    Both,
    Chars,
    Either,
    End,
    Except,
    Look,
    Other,
    Range,
    Regex,
    Repeat,
    Sequence,
    Start,
    inverted,
    parts_of,
)

_LARGEST = 5_000
"""Nodes of an expression."""
_SHORT_ESCAPES = {'"': '"', "\\": "\\", "\b": "b", "\f": "f", "\n": "n", "\r": "r", "\t": "t"}
_ESCAPED = [*map(chr, range(32)), '"', "\\"]


@dataclass(frozen=True, slots=True)
class Alphabet:
    """How an answer spells the characters of a text; each in one way alone."""

    escapes: bool
    """Whether as `json.dumps` does in JSON, or as they are."""

    def char(self, chars: Chars) -> str:
        """The regular expression, in Rust's syntax, of one of the characters; empty if there is none."""
        return _char(self, chars)

    def spelled(self, text: str) -> str:
        """A text as the answer spells it, without quotes."""
        return quoted(text)[1:-1] if self.escapes else text

    def any_text(self) -> str:
        """The terminal of any text."""
        return f"/{self.char(ANY)}*/"


JSON = Alphabet(escapes=True)
RAW = Alphabet(escapes=False)


@lru_cache(maxsize=4096)
def _char(alphabet: Alphabet, chars: Chars) -> str:
    if not alphabet.escapes:
        return _rust_class(chars)
    escaped = [char for char in _ESCAPED if char in chars]
    plain = _rust_class(chars, without=_ESCAPED)
    short = "".join(f"\\x{{{ord(_SHORT_ESCAPES[char]):x}}}" for char in escaped if char in _SHORT_ESCAPES)
    long = [f"u{ord(char):04x}" for char in escaped if char not in _SHORT_ESCAPES]
    ways = [*([f"[{short}]"] if short else []), *_merged(long)]
    escape = f"\\x{{5c}}(?:{'|'.join(ways)})" if ways else ""
    return f"(?:{plain}|{escape})" if plain and escape else plain or (escape and f"(?:{escape})")


@lru_cache(maxsize=4096)
def texts_with(pattern: Regex) -> Regex:
    """All texts in which a pattern is found: without anchors, and without looking around.

    Raises `UnsupportedError` for what no grammar can hold.
    """
    ahead, _ = _followed(Sequence((ANYTHING, pattern, ANYTHING)), (EMPTY, EMPTY))
    # What looks behind looks ahead where texts are read from their ends.
    behind, _ = _followed(_mirrored(ahead), (EMPTY, EMPTY))
    if any(isinstance(part, Look) for part in parts_of(behind)):
        raise UnsupportedError("pattern")
    return _mirrored(behind)


def both(parts: Iterable[Regex]) -> Regex:
    """Texts that fit all parts."""
    known: dict[Regex, None] = {}
    for part in parts:
        known |= dict.fromkeys(part.parts if isinstance(part, Both) else (part,))
    if NEVER in known or any(isinstance(part, Except) and part.body in known for part in known):
        return NEVER
    some = tuple(part for part in known if part != ANYTHING)
    return ANYTHING if not some else some[0] if len(some) == 1 else Both(some)


def without(texts: Regex, others: Iterable[Regex]) -> Regex:
    """The texts, but for the others."""
    return both((texts, *(excepting(other) for other in others)))


def excepting(texts: Regex) -> Regex:
    """All other texts."""
    match texts:
        case Except(body):
            return body
        case Either(()):
            return ANYTHING
    return NEVER if texts == ANYTHING else Except(texts)


# Anchors and what looks ahead: each is a condition on the rest of a text, worked out from its end

_Rest = tuple[Regex, Regex]
"""The rest of a text, if what is before it is nothing, and if it's something."""


def _followed(regex: Regex, rest: _Rest) -> _Rest:  # noqa: PLR0911 - one for each kind
    """What fits an expression, and a rest after it. What looks behind stays as it is."""
    at_start, later = rest
    if not _has_condition(regex):
        both_ways = sequence((regex, later))
        if at_start == later or not nullable(regex):
            return both_ways, both_ways
        some = both((regex, Repeat(ANY, 1, None)))
        return either((sequence((some, later)), at_start)), both_ways
    match regex:
        case Start():
            return at_start, NEVER
        case End():
            return _each(lambda texts: EMPTY if all(map(nullable, texts)) else NEVER, rest)
        case Look(body, True, wanted):
            seen = _followed(body, (ANYTHING, ANYTHING))
            return _each(both if wanted else lambda texts: without(texts[0], texts[1:]), rest, seen)
        case Sequence(parts):
            return reduce(lambda after, part: _followed(part, after), reversed(parts), rest)
        case Either(branches):
            others = either(branch for branch in branches if not _has_condition(branch))
            ways = (others, *filter(_has_condition, branches))
            return _each(either, *(_followed(branch, rest) for branch in ways))
        case Repeat(body, 0, 1):
            return _followed(Either((EMPTY, body)), rest)
        case Repeat(body, 1, 1):
            return _followed(body, rest)
        case Both(parts) if rest == (EMPTY, EMPTY):
            return _each(both, *(_followed(part, rest) for part in parts))
    raise UnsupportedError("pattern")


def _has_condition(regex: Regex) -> bool:
    return any(
        isinstance(part, Start | End | Other) or (isinstance(part, Look) and part.ahead) for part in parts_of(regex)
    )


def _each(made: Callable[[tuple[Regex, ...]], Regex], *rests: _Rest) -> _Rest:
    """What is made of several rests; raises `UnsupportedError` if that's too large."""
    at_start, later = map(made, zip(*rests, strict=True))
    for texts in (at_start, later):
        if sum(1 for _ in islice(parts_of(texts), _LARGEST)) == _LARGEST:
            raise UnsupportedError("pattern")
    return at_start, later


def _mirrored(regex: Regex) -> Regex:  # noqa: PLR0911 - one for each kind
    """The same for texts that are read from their ends."""
    match regex:
        case Sequence(parts):
            return Sequence(tuple(map(_mirrored, reversed(parts))))
        case Either(branches):
            return Either(tuple(map(_mirrored, branches)))
        case Both(parts):
            return Both(tuple(map(_mirrored, parts)))
        case Except(body):
            return Except(_mirrored(body))
        case Repeat(body, least, most):
            return Repeat(_mirrored(body), least, most)
        case Look(body, ahead, wanted):
            return Look(_mirrored(body), not ahead, wanted)
        case Start() | End():
            return End() if isinstance(regex, Start) else Start()
    return regex


def either(branches: Iterable[Regex]) -> Regex:
    """One of several."""
    known: dict[Regex, None] = {}
    for branch in branches:
        known |= dict.fromkeys(branch.branches if isinstance(branch, Either) else (branch,))
    if ANYTHING in known:
        return ANYTHING
    return next(iter(known)) if len(known) == 1 else Either(tuple(known))


def sequence(parts: Iterable[Regex]) -> Regex:
    """Parts one after another."""
    flat: list[Regex] = []
    for part in parts:
        flat += part.parts if isinstance(part, Sequence) else (part,)
    return NEVER if NEVER in flat else flat[0] if len(flat) == 1 else Sequence(tuple(flat))


def nullable(regex: Regex) -> bool:
    """Whether the empty text fits; there are no anchors."""
    match regex:
        case Both(parts):
            return all(map(nullable, parts))
        case Except(body):
            return not nullable(body)
        case Sequence(parts):
            return all(map(nullable, parts))
        case Either(branches):
            return any(map(nullable, branches))
        case Repeat(body, least):
            return least == 0 or nullable(body)
        case Look():
            raise UnsupportedError("pattern")
    return False


# Writing


def terminal(texts: Regex, alphabet: Alphabet) -> str:
    """The Lark terminal of some texts, without anchors; there must be some."""
    if (given := _given(texts)) is not None:
        return quoted(alphabet.spelled(given))
    if not any(isinstance(part, Both | Except) for part in parts_of(texts)):
        written = _written(texts, alphabet.char)
        return f"/{written}/" if written else '""'
    match texts:
        case Both(parts):
            wanted = [terminal(part, alphabet) for part in parts if not isinstance(part, Except)]
            others = [f"~{terminal(part.body, alphabet)}" for part in parts if isinstance(part, Except)]
            return f"({' & '.join((*(wanted or [alphabet.any_text()]), *others))})"
        case Except():
            return terminal(Both((texts,)), alphabet)
        case Either(branches):
            return f"({' | '.join(terminal(branch, alphabet) for branch in branches)})"
        case Sequence(parts):
            return f"({' '.join(terminal(part, alphabet) for part in parts)})"
    raise UnsupportedError("pattern")


def _given(regex: Regex) -> str | None:
    """The one text that fits, if it's easy to see."""
    parts = regex.parts if isinstance(regex, Sequence) else (regex,)
    text = ""
    for part in parts:
        if not isinstance(part, Chars) or part.negated or part.categories or len(part.ranges) != 1:
            return None
        (low, high) = part.ranges[0]
        if low != high or SURROGATES[0] <= low <= SURROGATES[1]:
            return None
        text += chr(low)
    return text


def _written(regex: Regex, char: Callable[[Chars], str]) -> str:  # noqa: PLR0911 - one for each kind
    """The expression as Rust and Python have it; `char` writes one of some characters, or nothing if there are none."""
    match regex:
        case Chars():
            return char(regex) or _NOTHING
        case Sequence(parts):
            return "".join(_written(part, char) for part in parts)
        case Either(branches):
            return f"(?:{'|'.join(_written(branch, char) for branch in branches)})" if branches else _NOTHING
        case Repeat(body, least, most):
            inner = _written(body, char)
            times = "*" if (least, most) == (0, None) else f"{{{least},{'' if most is None else most}}}"
            return f"{inner if isinstance(body, Chars) else f'(?:{inner})'}{times}"
        case Start():
            return r"\A"
        case End():
            return r"\Z"
        case Look(body, ahead, wanted):
            return f"(?{'' if ahead else '<'}{'=' if wanted else '!'}{_written(body, char)})"
        case Other(python):
            return f"(?a:{python})"
    raise UnsupportedError("pattern")


_NOTHING = r"[^\s\S]"


def _rust_class(chars: Chars, without: Iterable[str] = ()) -> str:
    """A class of characters, in Rust's syntax; empty if it has none."""
    taken = [(ord(char), ord(char)) for char in without]
    if not chars.categories:
        ranges = inverted(chars.ranges) if chars.negated else chars.ranges
        left = inverted([*inverted(ranges), *taken, SURROGATES])
        written = _rust_ranges(left)
        alone = len(left) == 1 and left[0][0] == left[0][1]
        return written if alone or not left else f"[{written}]"
    left = inverted([*inverted(chars.ranges), SURROGATES])
    categories = "".join(f"\\{'P' if outside else 'p'}{{{name}}}" for name, outside in chars.categories)
    among = f"[{'^' if chars.negated else ''}{_rust_ranges(left)}{categories}]"
    return f"[{among}&&[^{_rust_ranges(taken)}]]" if taken else among


def _rust_ranges(ranges: Iterable[Range]) -> str:
    return "".join(_rust_char(low) + (f"-{_rust_char(high)}" if high > low else "") for low, high in ranges)


def _rust_char(point: int) -> str:
    char = chr(point)
    return char if char.isascii() and char.isalnum() else f"\\x{{{point:x}}}"


def _merged(escapes: list[str]) -> list[str]:
    """`u0000` to `u001f`, with those that differ in the last digit alone put together."""
    grouped = groupby(escapes, key=lambda each: each[:-1])
    return [f"{head}[{''.join(each[-1] for each in group)}]" for head, group in grouped]


@lru_cache(maxsize=1024)
def for_python(regex: Regex) -> re.Pattern[str]:
    """The same for `re.search`."""
    try:
        return re.compile(_written(regex, _python_char))
    except (re.error, OverflowError, RecursionError) as error:
        raise UnsupportedError("pattern") from error


def _python_char(chars: Chars) -> str:
    ranges = [*chars.ranges, *(each for name, outside in chars.categories for each in _category(name, outside))]
    written = "".join(f"\\U{low:08x}-\\U{high:08x}" for low, high in ranges)
    return f"[{'^' if chars.negated else ''}{written}]" if written else r"[\s\S]" * chars.negated


@lru_cache(maxsize=64)
def _category(name: str, outside: bool) -> list[Range]:
    """The characters of a general category of Unicode."""
    points = (point for point in range(sys.maxunicode + 1) if unicodedata.category(chr(point)).startswith(name))
    ranges: list[Range] = []
    for point in points:
        if ranges and ranges[-1][1] == point - 1:
            ranges[-1] = ranges[-1][0], point
        else:
            ranges.append((point, point))
    return list(inverted(ranges)) if outside else ranges


def quoted(literal: str) -> str:
    """A text as JSON has it."""
    return json.dumps(literal, ensure_ascii=False)


assert sys.maxunicode == HIGHEST
