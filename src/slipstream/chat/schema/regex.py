"""Regular expressions as ECMA-262 reads them, which is what JSON Schema means by `pattern`: parsed into a tree.

The tree is written down again by `regex_writing.py`: for the grammar, and for Python.
"""

import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

from slipstream.chat.schema.losses import UnsupportedError

HIGHEST = 0x10FFFF
SURROGATES = 0xD800, 0xDFFF
_MOST_REPEATS = 100_000
Range = tuple[int, int]
"""From a code point to another, both included."""


@dataclass(frozen=True, slots=True)
class Chars:
    """One character of a set: of `ranges`, or of a general category of Unicode; of neither if `negated`."""

    ranges: tuple[Range, ...] = ()
    categories: tuple[tuple[str, bool], ...] = ()
    """Each with whether it's the characters outside of it that are meant."""
    negated: bool = False

    def __contains__(self, char: str) -> bool:
        point, category = ord(char), unicodedata.category(char)
        among = any(low <= point <= high for low, high in self.ranges)
        among = among or any(category.startswith(name) != outside for name, outside in self.categories)
        return among != self.negated


@dataclass(frozen=True, slots=True)
class Sequence:
    """Parts one after another; none is the empty text."""

    parts: tuple["Regex", ...] = ()


@dataclass(frozen=True, slots=True)
class Either:
    """One of several; none is nothing at all."""

    branches: tuple["Regex", ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    """So many times; without a bound if `most` is None."""

    body: "Regex"
    least: int
    most: int | None


@dataclass(frozen=True, slots=True)
class Start:
    """The beginning of the text."""


@dataclass(frozen=True, slots=True)
class End:
    """The end of the text."""


@dataclass(frozen=True, slots=True)
class Look:
    """What must follow, or precede, or must not."""

    body: "Regex"
    ahead: bool
    wanted: bool


@dataclass(frozen=True, slots=True)
class Other:
    """What no grammar can hold, as Python writes it: back references and boundaries of words."""

    python: str


@dataclass(frozen=True, slots=True)
class Both:
    """What fits all of several; no pattern says so itself."""

    parts: tuple["Regex", ...]


@dataclass(frozen=True, slots=True)
class Except:
    """All texts that don't fit."""

    body: "Regex"


Regex = Chars | Sequence | Either | Repeat | Start | End | Look | Other | Both | Except

_DIGITS = ((0x30, 0x39),)
_WORD = ((0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A))
_SPACE = (
    *((0x09, 0x0D), (0x20, 0x20), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A), (0x2028, 0x2029)),
    *((0x202F, 0x202F), (0x205F, 0x205F), (0x3000, 0x3000), (0xFEFF, 0xFEFF)),
)
_CLASSES = {"d": _DIGITS, "w": _WORD, "s": _SPACE}
_CONTROLS = {"t": 9, "n": 10, "v": 11, "f": 12, "r": 13, "0": 0}
_LINE_ENDS = ((0x0A, 0x0A), (0x0D, 0x0D), (0x2028, 0x2029))
_CATEGORIES = {
    "Letter": "L", "Uppercase_Letter": "Lu", "Lowercase_Letter": "Ll", "Titlecase_Letter": "Lt", "Mark": "M",
    "Number": "N", "Decimal_Number": "Nd", "Punctuation": "P", "Symbol": "S", "Separator": "Z", "Other": "C",
}  # fmt: skip
_SHORT_CATEGORIES = frozenset(
    ("L", "Lu", "Ll", "Lt", "Lm", "Lo", "M", "Mn", "Mc", "Me", "N", "Nd", "Nl", "No", "P", "Pc", "Pd", "Ps", "Pe")
) | {"Pi", "Pf", "Po", "S", "Sm", "Sc", "Sk", "So", "Z", "Zs", "Zl", "Zp", "C", "Cc", "Cf"}

ANY = Chars(negated=True)
"""Any character."""
ANYTHING = Repeat(ANY, 0, None)
NEVER = Either(())
EMPTY = Sequence()


def inverted(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """All other characters."""
    result, next_point = [], 0
    for low, high in sorted(ranges):
        if low > next_point:
            result.append((next_point, low - 1))
        next_point = max(next_point, high + 1)
    return (*result, (next_point, HIGHEST)) if next_point <= HIGHEST else tuple(result)


def one_of(ranges: Iterable[Range], categories: Iterable[tuple[str, bool]], *, negated: bool) -> Regex:
    """One character of a set."""
    chars = Chars(tuple(ranges), tuple(categories), negated)
    others = chars.ranges if negated else inverted(chars.ranges)
    return chars if chars.categories or inverted((*others, SURROGATES)) else NEVER


def text(literal: str) -> Regex:
    """Just this text."""
    return Sequence(tuple(Chars(((ord(char), ord(char)),)) for char in literal))


@lru_cache(maxsize=1024)
def parse(pattern: str) -> Regex:
    """The tree of a pattern; raises `UnsupportedError` if it isn't one, or has flags."""
    parser = _Parser(pattern)
    result = parser.disjunction()
    if not parser.ended:
        raise parser.error()
    return result


class _Parser:
    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._at = 0
        self._depth = 0

    @property
    def ended(self) -> bool:
        return self._at >= len(self._pattern)

    def error(self) -> UnsupportedError:
        return UnsupportedError(f"pattern {self._pattern!r}")

    def disjunction(self) -> Regex:
        self._depth += 1
        if self._depth > 100:
            raise self.error()
        branches = [self._alternative()]
        while self._skip("|"):
            branches.append(self._alternative())
        self._depth -= 1
        return branches[0] if len(branches) == 1 else Either(tuple(branches))

    def _alternative(self) -> Regex:
        parts: list[Regex] = []
        while not self.ended and self._peek not in "|)":
            parts.append(self._term())
        return parts[0] if len(parts) == 1 else Sequence(tuple(parts))

    def _term(self) -> Regex:
        atom = self._atom()
        while (bounds := self._quantifier()) is not None:
            asserts = isinstance(atom, Start | End | Look)  # which holds any number of times, or isn't made
            atom = (atom if bounds[0] else EMPTY) if asserts else Repeat(atom, *bounds)
        return atom

    def _quantifier(self) -> tuple[int, int | None] | None:
        bounds: tuple[int, int | None] | None = None
        if self._skip("*"):
            bounds = 0, None
        elif self._skip("+"):
            bounds = 1, None
        elif self._skip("?"):
            bounds = 0, 1
        elif not self.ended and self._peek == "{":
            bounds = self._counts()
        if bounds is not None:
            self._skip("?")  # a lazy one fits the same texts
            if max(bounds[0], bounds[1] or 0) > _MOST_REPEATS or (bounds[1] is not None and bounds[1] < bounds[0]):
                raise self.error()
        return bounds

    def _counts(self) -> tuple[int, int | None] | None:
        end = self._pattern.find("}", self._at)
        least, comma, most = self._pattern[self._at + 1 : max(end, self._at + 1)].partition(",")
        if not least.isdecimal() or (most and not most.isdecimal()):
            return None
        self._at = end + 1
        return int(least), (int(most) if most else None) if comma else int(least)

    def _atom(self) -> Regex:  # noqa: PLR0911 - one for each kind
        if self._skip("^"):
            return Start()
        if self._skip("$"):
            return End()
        if self._skip("."):
            return Chars(inverted(_LINE_ENDS))
        if self._skip("("):
            return self._group()
        if self._skip("["):
            return self._class()
        if self._skip("\\"):
            return self._escape()
        if self._peek in "*+?":
            raise self.error()
        return self._char(ord(self._take()))

    def _group(self) -> Regex:
        result: Regex | None = None
        if self._skip("?"):
            for sign, ahead, wanted in (
                ("=", True, True),
                ("!", True, False),
                ("<=", False, True),
                ("<!", False, False),
            ):
                if self._skip(sign):
                    result = Look(self.disjunction(), ahead, wanted)
                    break
            else:
                if self._skip("P<") or self._skip("<"):  # Python's way to name a group, and ECMA's
                    self._at = self._pattern.find(">", self._at) + 1 or len(self._pattern)
                elif not self._skip(":"):
                    raise self.error()
        if result is None:
            result = self.disjunction()
        if not self._skip(")"):
            raise self.error()
        return result

    def _escape(self) -> Regex:
        if self.ended:
            raise self.error()
        char = self._peek
        if char in "bB":
            return Other("\\" + self._take())
        if char in "AZ":  # Python's anchors, which ECMA takes for letters and nobody means as such
            return Start() if self._take() == "A" else End()
        if char in "123456789":
            return Other("\\" + self._take())
        if self._pattern.startswith("k<", self._at):
            raise self.error()
        return self._set_or_char()

    def _set_or_char(self) -> Chars:  # noqa: PLR0911 - one for each kind
        """What stands after a backslash, in a class or outside."""
        char = self._take()
        if char.lower() in _CLASSES:
            ranges = _CLASSES[char.lower()]
            return Chars(ranges if char.islower() else inverted(ranges))
        if char in "pP":
            return Chars(categories=((self._category(), char == "P"),))
        if char in _CONTROLS:
            return self._char(_CONTROLS[char])
        if char == "c":
            return self._char(ord(self._take()) % 32)
        if char == "x":
            return self._char(self._hex(2))
        if char == "u":
            return self._char(self._unicode())
        return self._char(ord(char))

    def _category(self) -> str:
        if not self._skip("{"):
            raise self.error()
        end = self._pattern.find("}", self._at)
        name = self._pattern[self._at : max(end, self._at)].removeprefix("General_Category=").removeprefix("gc=")
        self._at = end + 1
        name = _CATEGORIES.get(name, name)
        if name not in _SHORT_CATEGORIES:
            raise self.error()
        return name

    def _unicode(self) -> int:
        if self._skip("{"):
            end = self._pattern.find("}", self._at)
            return self._hex(max(end - self._at, 0), "}")
        point = self._hex(4)
        if 0xD800 <= point < 0xDC00 and self._skip("\\u"):
            point = 0x10000 + ((point - 0xD800) << 10) + (self._hex(4) - 0xDC00)
        return point

    def _hex(self, digits: int, after: str = "") -> int:
        value = self._pattern[self._at : self._at + digits]
        self._at += digits
        try:
            point = int(value, 16)
        except ValueError:
            raise self.error() from None
        if not self._skip(after) or point > HIGHEST:
            raise self.error()
        return point

    def _class(self) -> Regex:
        negated = self._skip("^")
        ranges: list[Range] = []
        categories: list[tuple[str, bool]] = []
        while not self._skip("]"):
            first = self._class_atom()
            if self._single(first) and self._pattern[self._at : self._at + 1] == "-" and self._next_is_bound():
                self._skip("-")
                last = self._class_atom()
                if not self._single(last) or last.ranges[0][0] < first.ranges[0][0]:
                    raise self.error()
                ranges.append((first.ranges[0][0], last.ranges[0][0]))
            else:
                ranges += first.ranges
                categories += first.categories
        return one_of(ranges, categories, negated=negated)

    def _next_is_bound(self) -> bool:
        """Whether what follows a hyphen is the upper end of a range: not the class's end, nor a set."""
        rest = self._pattern[self._at + 1 : self._at + 3]
        return rest[:1] not in ("", "]") and not (rest[:1] == "\\" and rest[1:].lower() in ("d", "w", "s", "p"))

    def _class_atom(self) -> Chars:
        char = self._take()
        if char != "\\":
            return self._char(ord(char))
        if self._skip("b"):
            return self._char(8)
        return self._set_or_char()

    @staticmethod
    def _single(chars: Chars) -> bool:
        return len(chars.ranges) == 1 and chars.ranges[0][0] == chars.ranges[0][1] and not chars.categories

    @staticmethod
    def _char(point: int) -> Chars:
        return Chars(((point, point),))

    @property
    def _peek(self) -> str:
        return self._pattern[self._at]

    def _take(self) -> str:
        if self.ended:
            raise self.error()
        self._at += 1
        return self._pattern[self._at - 1]

    def _skip(self, expected: str) -> bool:
        if not self._pattern.startswith(expected, self._at):
            return False
        self._at += len(expected)
        return True


def parts_of(regex: Regex) -> Iterator[Regex]:
    """The tree's nodes, from the top, without what is looked for ahead or behind."""
    yield regex
    match regex:
        case Sequence(inner) | Either(inner) | Both(inner):
            for each in inner:
                yield from parts_of(each)
        case Repeat(body) | Except(body):
            yield from parts_of(body)
