"""Sets of JSON values of one type each. A schema means a union of them, see `meaning.py`.

What a member of an array or an object must fit is a `Node`: it is worked out when it's asked for, so that schemas may
refer to themselves.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from slipstream.chat.schema.emptiness import fits_nothing
from slipstream.chat.schema.losses import UnsupportedError
from slipstream.chat.schema.numbers import Numbers
from slipstream.chat.schema.regex import ANY, NEVER, Regex, Repeat, text
from slipstream.chat.schema.regex_writing import (
    JSON,
    both,
    either,
    for_python,
    quoted,
    terminal,
    texts_with,
    without,
)


@dataclass(frozen=True, slots=True)
class Part:
    """A schema within the document, by its number."""

    index: int


@dataclass(frozen=True, slots=True)
class Not:
    """All that doesn't fit a node."""

    node: "Node"


Node = tuple[Part | Not, ...]
"""Values that fit all of these; none is any value."""

ANYTHING: Node = ()
NOTHING: Node = (Not(()),)


@dataclass(frozen=True, slots=True)
class Words:
    """Some of `null`, `true` and `false`."""

    values: frozenset[bool | None] = frozenset({None, True, False})

    def and_also(self, other: "Words") -> "Words | None":
        """Those of both; None if there are none."""
        values = self.values & other.values
        return Words(values) if values else None


@dataclass(frozen=True, slots=True)
class Strings:
    """Texts of a length, which hold some patterns, and don't hold others."""

    least: int = 0
    most: int | None = None
    patterns: tuple[tuple[Regex, bool], ...] = ()
    """Each with whether it is to be found."""
    values: tuple[str, ...] | None = None
    """The only ones, if they are listed."""
    without: frozenset[str] = frozenset()

    def __contains__(self, value: str) -> bool:
        if not self.least <= len(value) <= (len(value) if self.most is None else self.most) or value in self.without:
            return False
        if self.values is not None and value not in self.values:
            return False
        return all((for_python(regex).search(value) is not None) == found for regex, found in self.patterns)

    def and_also(self, other: "Strings") -> "Strings | None":
        """Those that fit both; None if it's known that there are none."""
        most = min((each.most for each in (self, other) if each.most is not None), default=None)
        patterns = tuple(dict.fromkeys((*self.patterns, *other.patterns)))
        both = Strings(max(self.least, other.least), most, patterns, None, self.without | other.without)
        listed = self.values if self.values is not None else other.values
        if listed is not None:
            values = tuple(value for value in listed if value in self and value in other)
            return replace(both, values=values) if values else None
        if (most is not None and both.least > most) or any((regex, not found) in patterns for regex, found in patterns):
            return None
        return both

    def complements(self) -> list["Strings"]:
        """All other texts, as one or several sets."""
        if self.values is not None:
            return [Strings(without=frozenset(self.values))]
        result = [Strings(patterns=((regex, not found),)) for regex, found in self.patterns]
        if self.least:
            result.append(Strings(most=self.least - 1))
        if self.most is not None:
            result.append(Strings(least=self.most + 1))
        if self.without:
            result.append(Strings(values=tuple(sorted(self.without))))
        return result

    @property
    def texts(self) -> Regex:
        """What they look like, without anchors; `NEVER` if there are none."""
        if self.values is not None:
            return either(map(text, self.values))
        wanted = [texts_with(regex) for regex, found in self.patterns if found]
        if self.least or self.most is not None or not wanted:
            wanted.append(Repeat(ANY, self.least, self.most))
        others = [texts_with(regex) for regex, found in self.patterns if not found]
        found = without(both(wanted), (*others, *map(text, sorted(self.without))))
        return NEVER if fits_nothing(found) else found

    def terminal(self) -> str | None:
        """The Lark terminal of how they stand in JSON; None if there are none."""
        if self.values is not None:
            return " | ".join(quoted(quoted(value)) for value in self.values).join("()")
        if self == Strings():
            return "JSON_STRING"
        texts = self.texts
        return None if texts == NEVER else f"(/\\x22/ {terminal(texts, JSON)} /\\x22/)"


def besides(texts: Iterable[str], patterns: Iterable[Regex]) -> Strings:
    """All other texts, in which none of the patterns is found."""
    return Strings(patterns=tuple((regex, False) for regex in dict.fromkeys(patterns)), without=frozenset(texts))


@dataclass(frozen=True, slots=True)
class Contains:
    """How many members of an array fit a node."""

    node: Node
    least: int
    most: int | None


@dataclass(frozen=True, slots=True)
class Arrays:
    """Arrays that fit all of this."""

    prefix: tuple[Node, ...] = ()
    """What the first members must fit, one by one."""
    items: Node = ANYTHING
    """What all others must fit."""
    says: bool = False
    """Whether others are spoken of."""
    least: int = 0
    most: int | None = None
    contains: tuple[Contains, ...] = ()
    unique: bool = False

    def and_also(self, other: "Arrays") -> "Arrays | None":
        """Those that fit both; None if it's known that there are none."""
        most = min((each.most for each in (self, other) if each.most is not None), default=None)
        least = max(self.least, other.least)
        if most is not None and least > most:
            return None
        length = max(len(self.prefix), len(other.prefix))
        return Arrays(
            tuple(joined((self.node(index), other.node(index))) for index in range(length)),
            joined((self.items, other.items)),
            self.says or other.says,
            least,
            most,
            (*self.contains, *other.contains),
            self.unique or other.unique,
        )

    def node(self, index: int) -> Node:
        """What the member of an index must fit."""
        return self.prefix[index] if index < len(self.prefix) else self.items


@dataclass(frozen=True, slots=True)
class Members:
    """Members of an object whose keys are among some and whose values fit a node."""

    keys: Strings
    node: Node


@dataclass(frozen=True, slots=True, eq=False)
class Objects:
    """Objects that fit all of this."""

    properties: Mapping[str, Node] = field(default_factory=dict)
    """What members must fit, by their keys."""
    members: tuple[Members, ...] = ()
    """What all members must fit whose keys are among some."""
    required: tuple[str, ...] = ()
    least: int = 0
    most: int | None = None
    exists: tuple[Members, ...] = ()
    """There is one of each."""
    denied: frozenset[str] = frozenset()
    """Required keys that only a negation speaks of."""
    listed: tuple[str, ...] = ()
    """Keys that a writer would think of, which those are not that come out of a negation."""
    patterns: tuple[Regex, ...] = ()
    """What keys look like that a writer would think of."""
    says: bool = False
    """Whether other keys are spoken of."""
    is_root: bool = False
    """Whether it's empty if nothing is said of it: a function's arguments."""

    def and_also(self, other: "Objects") -> "Objects | None":
        """Those that fit both; None if it's known that there are none."""
        most = min((each.most for each in (self, other) if each.most is not None), default=None)
        required = tuple(dict.fromkeys((*self.required, *other.required)))
        if most is not None and max(self.least, other.least, len(required)) > most:
            return None
        properties = dict(self.properties)
        for key, node in other.properties.items():
            properties[key] = joined((properties.get(key, ANYTHING), node))
        return Objects(
            properties,
            (*self.members, *other.members),
            required,
            max(self.least, other.least),
            most,
            (*self.exists, *other.exists),
            self.denied | other.denied,
            (*self.listed, *other.listed),
            (*self.patterns, *other.patterns),
            self.says or other.says,
            self.is_root or other.is_root,
        )

    def node(self, key: str) -> Node:
        """What the member of a key must fit."""
        return joined((self.properties.get(key, ANYTHING), *(each.node for each in self.members if key in each.keys)))


Shape = Words | Numbers | Strings | Arrays | Objects
ANY_SHAPES: list[Shape] = [Strings(), Numbers(), Words(), Arrays(), Objects()]


def joined(nodes: Iterable[Node]) -> Node:
    """Values that fit all of the nodes."""
    return tuple(dict.fromkeys(term for node in nodes for term in node))


def merged(first: Shape, second: Shape) -> Shape | None:
    """Values of both; None if there are none."""
    if type(first) is not type(second):
        return None
    return first.and_also(second)  # type: ignore[arg-type]


def only(shape: Shape) -> list[Shape]:
    """What says something of one type alone: values of all other types fit too."""
    return [shape, *(each for each in ANY_SHAPES if type(each) is not type(shape))]


MOST_SHAPES = 256
"""Alternatives that one schema may have."""


def intersection(first: list[Shape], second: list[Shape]) -> list[Shape]:
    """Values of both unions; raises `UnsupportedError` if they have too many alternatives."""
    if first is ANY_SHAPES or second is ANY_SHAPES:
        return second if first is ANY_SHAPES else first
    result = [both for one in first for other in second if (both := merged(one, other)) is not None]
    if len(result) > MOST_SHAPES:
        raise UnsupportedError("too many alternatives")
    return result
