"""Lark rules of values that fit a schema: JSON, written the way that `json.dumps` writes it, or a notation like it.

Keys come in the order of the schema, with those after them that it doesn't list. There is no free white space: a third
fewer tokens than what a model left to itself likes to write.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate

from slipstream.chat.schema.arrays import ArrayRules, listed_arrays
from slipstream.chat.schema.losses import UnsupportedError
from slipstream.chat.schema.meaning import Meaning
from slipstream.chat.schema.numbers import INTEGER, INTEGERS, NUMBER, Numbers
from slipstream.chat.schema.objects import Form, Member, form_of, settled
from slipstream.chat.schema.regex_writing import JSON, quoted
from slipstream.chat.schema.shapes import (
    ANYTHING,
    Arrays,
    Node,
    Objects,
    Shape,
    Strings,
    Words,
)

_SEPARATOR = '", "'
_MOST_LISTED = 2_000
"""Arrays without repetitions that one schema may be made to list: definitions let a short one ask for many."""
_MOST_COUNTED = 100
"""Members of an object that are counted, each of which may be left out."""

SHARED = {
    "json_any": "json_any: JSON_SCALAR | json_array | json_object",
    "json_array": f'json_array: "[" (json_any ({_SEPARATOR} json_any)*)? "]"',
    "json_object": f'json_object: "{{" (json_member ({_SEPARATOR} json_member)*)? "}}"',
    "json_member": 'json_member: JSON_STRING ": " json_any',
    "JSON_SCALAR": f'JSON_SCALAR: JSON_STRING | /{NUMBER}/ | "true" | "false" | "null"',
    "JSON_STRING": f"JSON_STRING: /\\x22/ {JSON.any_text()} /\\x22/",
    "JSON_NUMBER": f"JSON_NUMBER: /{NUMBER}/",
    "JSON_INTEGER": f"JSON_INTEGER: /{INTEGER}/",
}
"""Rules that any grammar may need, by their names."""


def shared_rules(rules: Iterable[str]) -> list[str]:
    """The shared rules that some rules refer to, and those refer to."""
    wanted, text = [], "\n".join(rules)
    known = dict(SHARED)
    while found := [name for name in known if name in text]:
        added = [known.pop(name) for name in found]
        wanted += added
        text = "\n".join(added)
    return wanted


class JsonRules:
    """Lark `rules` for values of nodes; the name of each begins with `prefix`."""

    ANY = "json_any"
    """The rule of any value."""
    SEPARATOR = _SEPARATOR

    def __init__(self, meaning: Meaning, prefix: str) -> None:
        self.meaning = meaning
        self.rules: list[str] = []
        self._prefix = prefix
        self._count = 0
        self._listed = 0
        self._written: dict[Node, str] = {}
        self._inhabited: set[Node] = set()
        self._empty: set[Node] = set()

    def expression(self, node: Node) -> str:
        """The Lark expression of a node's values, of which there must be some."""
        if node == ANYTHING:
            return self.ANY
        if node not in self._written:
            name = self._written[node] = self.new_name()
            body = self._body(node)
            if body.isidentifier():  # and so refers to nothing that could refer back
                self._written[node] = body
            else:
                self.rules.append(f"{name}: {body}")
        return self._written[node]

    def is_nothing(self, node: Node, above: frozenset[Node] = frozenset()) -> bool:
        """Whether no value fits a node that comes to an end, and so holds none of the nodes `above`."""
        if node == ANYTHING or node in self._inhabited:
            return False
        if node in above or node in self._empty:
            return True
        is_nothing = partial(self.is_nothing, above=above | {node})
        if any(self._has_value(shape, is_nothing) for shape in self.meaning.shapes(node)):
            self._inhabited.add(node)
            return False
        if not above:
            self._empty.add(node)
        return True

    def new_name(self) -> str:
        """A name for another rule."""
        self._count += 1
        return f"{self._prefix}_{self._count}"

    def _has_value(self, shape: Shape, is_nothing: Callable[[Node], bool]) -> bool:
        match shape:
            case Objects():
                return bool(self.forms(shape, is_nothing))
            case Arrays():
                if shape.unique and listed_arrays(shape, self.meaning) == []:  # too few values to differ
                    return False
                return self._countable(shape, is_nothing).fits_some
            case Strings():
                return shape.terminal() is not None
        return True

    def forms(self, shape: Objects, is_nothing: Callable[[Node], bool] | None = None) -> list[Form]:
        """The ways to write an object; what would be too many is let go."""
        is_nothing = is_nothing or self.is_nothing
        try:
            return [form for each in settled(shape) if (form := form_of(each, is_nothing)) is not None]
        except UnsupportedError as error:
            self.meaning.lose(str(error))
            simple = replace(shape, members=(), exists=(), patterns=(), says=False)
            return [form for each in settled(simple) if (form := form_of(each, is_nothing)) is not None]

    def _countable(self, arrays: Arrays, is_nothing: Callable[[Node], bool]) -> ArrayRules:
        """What writes the arrays, without `contains` if that would be too much."""
        rules = ArrayRules(arrays, self, is_nothing)
        try:
            rules.fits_some  # noqa: B018 - which counts
        except UnsupportedError as error:
            self.meaning.lose(str(error))
            return ArrayRules(replace(arrays, contains=()), self, is_nothing)
        return rules

    def _body(self, node: Node) -> str:
        """The alternatives of a node's rule."""
        scalars: list[str] = []
        others: list[str] = []
        for shape in self.meaning.shapes(node):
            match shape:
                case Objects():
                    others += map(self._object, self.forms(shape))
                case Arrays():
                    others += self._array(shape)
                case Numbers():
                    try:
                        scalars.append(shape.terminal())
                    except UnsupportedError:
                        others.append(self._multiples(shape))
                case Strings():
                    self.texts(shape, scalars, others)
                case Words(values):
                    scalars += [f'"{json.dumps(value)}"' for value in sorted(values, key=str)]
        scalars = list(dict.fromkeys(scalars))
        if len(scalars) > 1 or (scalars and not (scalars[0].startswith("JSON_") or scalars[0].startswith('"'))):
            scalars = [self.terminal(" | ".join(scalars))]
        return " | ".join(dict.fromkeys((*scalars, *others)))

    def _multiples(self, numbers: Numbers) -> str:
        """Multiples are the compiler's own business."""
        try:
            return "%json " + json.dumps(numbers.as_schema())
        except UnsupportedError:
            self.meaning.lose("multipleOf")
            step = INTEGERS.step if numbers.step is not None and numbers.step.denominator == 1 else None
            return self.terminal(replace(numbers, step=step, no_steps=frozenset()).terminal())

    def terminal(self, body: str) -> str:
        """A name for a terminal."""
        name = self.new_name().upper()
        self.rules.append(f"{name}: {body}")
        return name

    def _array(self, arrays: Arrays) -> list[str]:
        if arrays.unique:
            found = listed_arrays(arrays, self.meaning) if self._listed <= _MOST_LISTED else None
            self._listed += len(found or ())
            if found is None or self._listed > _MOST_LISTED:
                self.meaning.lose("uniqueItems")
            else:
                return [self.array(each) for each in found]
        rules = self._countable(arrays, self.is_nothing)
        return [rules.expression()] if rules.fits_some else []

    # Objects

    def _object(self, form: Form) -> str:
        members = self.ordered(form.members)
        needed = sum(member.required for member in members)
        least, most = form.least if form.least > needed else 0, form.most
        if form.free and form.least > needed + 1:  # keys that aren't listed may be the same one twice
            self.meaning.lose("minProperties")
        if len(members) > _MOST_COUNTED and (least or most is not None):
            self.meaning.lose("minProperties" if most is None else "maxProperties")
            least, most = 0, None
        parts = [(f"{self.key(member.key)} {self.expression(member.node)}", member.required) for member in members]
        free = self._free_member(form) if form.free else None
        return f'"{{" {self.separated(parts, free, least, most)} "}}"'

    def separated(
        self, parts: Sequence[tuple[str, bool]], free: str | None = None, least: int = 0, most: int | None = None
    ) -> str:
        """The Lark expression of so many parts, of which there must be some way to take that many.

        They come in their order, each with whether it must be there, and then any number of `free` ones.
        """
        highest = max(least, 1) if most is None else most  # more before a part make no difference to it
        needed = [0, *accumulate(required for _, required in parts)]
        after: dict[int, str] = {}
        for count in range(min(needed[-1], highest), min(len(parts), highest) + 1):
            if free is not None:
                after[count] = self.repeated(free, max(least - count, 0), most and most - count, first=not count)
            elif count >= least:
                after[count] = '""'
        for index in reversed(range(len(parts))):
            (part, required), rest, after = parts[index], after, {}
            for count in range(min(needed[index], highest), min(index, highest) + 1):
                separator, more = (
                    self.SEPARATOR if count else "",
                    count + 1 if most is not None else min(count + 1, highest),
                )
                ways = [f"{separator} {part} {rest[more]}"] if more in rest else []
                ways += [rest[count]] if count in rest and not required else []
                if ways:
                    after[count] = ways[0] if len(ways) == 1 else self._rule(" | ".join(ways))
        return after[0]

    def repeated(self, item: str, least: int, most: int | None, *, first: bool) -> str:
        """So many of an item, with separators between them, or before each if they aren't the first."""
        if most == 0:
            return '""'
        if not first:
            return f"({self.SEPARATOR} {item}){_times(least, most)}"
        rest = "" if most == 1 else f" ({self.SEPARATOR} {item}){_times(max(least - 1, 0), most and most - 1)}"
        return f"{item}{rest}" if least else f"({item}{rest})?"

    def _rule(self, body: str) -> str:
        name = self.new_name()
        self.rules.append(f"{name}: {body}")
        return name

    def key(self, key: str) -> str:
        """The Lark expression of a key and what stands after it."""
        return f'{quoted(quoted(key))} ": "'

    def free_key(self, keys: Strings) -> str | None:
        """The Lark expression of any of the keys and what stands after it; None if none can be written."""
        texts = keys.terminal()
        return texts and f'{texts if texts.isidentifier() else self.terminal(texts)} ": "'

    def texts(self, strings: Strings, scalars: list[str], others: list[str]) -> None:  # noqa: ARG002
        """Add texts to the terminals of single values, or to other expressions if they have to stand apart."""
        if (texts := strings.terminal()) is not None:
            scalars.append(texts)

    def array(self, values: Iterable[object]) -> str:
        """The Lark expression of an array that is given."""
        written = f" {self.SEPARATOR} ".join(quoted(json.dumps(value, ensure_ascii=False)) for value in values)
        return f'"[" {written} "]"'

    def ordered(self, members: Iterable[Member]) -> tuple[Member, ...]:
        """The members of an object in the order in which they are written."""
        return tuple(members)

    def _free_member(self, form: Form) -> str:
        ways = [
            f"{key} {self.expression(each.node)}" for each in form.free if (key := self.free_key(each.keys)) is not None
        ]
        return self._rule(" | ".join(ways))


def _times(least: int, most: int | None) -> str:
    if most == 1:
        return "" if least else "?"
    return "*" if not least and most is None else f"{{{least},{'' if most is None else most}}}"
