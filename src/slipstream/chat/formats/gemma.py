"""Gemma 4: calls in a notation of its own, in which strings stand between tokens and names stand bare."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from slipstream.chat.formats.base import TaggedCalls, separated
from slipstream.chat.reading import Reading, Steps, cut_off_in, skip, text_before, whole_until
from slipstream.chat.schema import as_object, closed_parameters, json_rule, literal, resolved, with_definitions
from slipstream.chat.setting import Schema, Tool, ToolUse
from slipstream.chat.tags import Tag, Tags, rule_until

_DEEPEST = 64
_NAME = "[a-zA-Z0-9_.$-]{1,64}"
_WORDS = {"True": "true", "False": "false", "None": "null"}
"""What a template makes of values that it hands over to Python."""


class Gemma4(TaggedCalls):
    """`<|tool_call>call:name{city:<|"|>Bern<|"|>,days:3}<tool_call|>`, arguments in the order of their names."""

    name = "gemma-4"
    BEGIN, END = "<|tool_call>", "<tool_call|>"
    SIGNS = (BEGIN,)
    INNER, BETWEEN = "call", ""

    def __init__(self, tags: Tags) -> None:
        super().__init__(tags)
        self._quote = tags('<|"|>')
        self.ends = (self._quote, self._end)

    def grammar(self, use: ToolUse) -> str:
        """See `ToolFormat.grammar`."""
        return "\n".join((super().grammar(use), *_anything(self._quote)))

    def _call_rules(self, rule: str, tool: Tool) -> list[str]:
        values = _Values(closed_parameters(tool.parameters), self._quote, f"{rule}_value")
        arguments = values.object(as_object(values.schema, values.schema, tool.name))
        return [f"{rule}: {literal(f'call:{tool.name}')} {arguments}", *values.rules]

    def _read_call(self, reading: Reading, use: ToolUse) -> Steps[bool]:  # noqa: ARG002
        """The arguments come one by one, when they are whole."""
        if not (yield from skip(reading, "call:")):
            return False
        name = yield from whole_until(reading, "{")
        if name is None or not name.strip():
            return False
        reading.begin_call(name.strip())
        reading.add_arguments("{")
        if not (yield from _read_members(reading, "}", partial(self._read_pair, reading, 0), reading.add_arguments)):
            return False
        reading.add_arguments("}")
        reading.end_call()
        return True

    def _read_pair(self, reading: Reading, depth: int) -> Steps[str | None]:
        """Read a name and its value, as JSON text; None if they were cut off."""
        if (yield from skip(reading, self._quote.mark)):
            name = yield from whole_until(reading, self._quote.mark)
            yield from skip(reading, ":")
        else:
            name = yield from whole_until(reading, ":")
        value = (yield from self._read_value(reading, depth)) if name is not None else None
        return f"{_as_text(name or '')}: {value}" if value is not None else None

    def _read_value(self, reading: Reading, depth: int) -> Steps[str | None]:
        """Read a value, as JSON text; None if it was cut off."""
        if (yield from skip(reading, self._quote.mark)):
            text = yield from whole_until(reading, self._quote.mark)
            return _as_text(text) if text is not None else None
        for begin, end, read in (("{", "}", self._read_pair), ("[", "]", self._read_value)):
            if depth < _DEEPEST and (yield from skip(reading, begin)):
                members: list[str] = []
                whole = yield from _read_members(reading, end, partial(read, reading, depth + 1), members.append)
                return f"{begin}{''.join(members)}{end}" if whole else None
        bare = yield from text_before(reading, ",", "}", "]")
        return _bare_value(str.__str__(bare).strip()) if bare is not None else None


def _read_members(
    reading: Reading, end: str, read: Callable[[], Steps[str | None]], tell: Callable[[str], None]
) -> Steps[bool]:
    """Tell the members of an object or a list as JSON has them, one by one. Returns whether none was cut off.

    The end may be missing where something else stands.
    """
    separator = ""
    while not (yield from skip(reading, end)):
        if (member := (yield from read())) is None:
            return False
        tell(separator + member)
        separator = ", "
        if not (yield from skip(reading, ",")):
            return (yield from skip(reading, end)) or not cut_off_in(reading, end)
    return True


def _as_text(text: str) -> str:
    return json.dumps(str.__str__(text), ensure_ascii=False)


def _bare_value(text: str) -> str:
    """What stands without quotes, as JSON text: a number, a word, or a string all the same."""
    text = _WORDS.get(text, text)
    try:
        json.loads(text)
    except ValueError:
        return _as_text(text)
    return text


def _anything(quote: Tag) -> list[str]:
    """Lark rules for `anything`, any value at all."""
    q = quote.expression
    number = json_rule({"type": "number"})
    return [
        'anything: any_text | any_number | "true" | "false" | "null" | any_list | any_object',
        f"any_text: {q} any_rest\n{rule_until(quote, 'any_rest')}",
        f"any_number: {number}",
        'any_list: "[" (anything ("," anything)*)? "]"',
        'any_object: "{" (any_pair ("," any_pair)*)? "}"',
        f'any_pair: ANY_NAME ":" anything\nANY_NAME: /{_NAME}/',
    ]


class _Values:
    """Lark `rules` for values of a schema; each has a name that begins with `prefix`.

    What the notation can't hold is let go: patterns and formats of strings, and several schemas at once.
    """

    def __init__(self, schema: Schema, quote: Tag, prefix: str) -> None:
        self.schema = schema
        self.rules: list[str] = []
        self._quote = quote
        self._prefix = prefix
        self._count = 0
        self._references: dict[str, str] = {}

    def expression(self, schema: Any) -> str:
        """The Lark expression of a value."""
        if not isinstance(schema, Mapping):
            return "anything"
        if isinstance(reference := schema.get("$ref"), str):
            return self._referred(reference)
        schema = as_object(schema, self.schema) if "allOf" in schema else schema
        if "const" in schema or "enum" in schema:
            return self._one_of(self._written(value) for value in schema.get("enum", [schema.get("const")]))
        if (several := schema.get("anyOf", schema.get("oneOf"))) is not None:
            return self._one_of(map(self.expression, several))
        kind = schema.get("type", "object" if "properties" in schema else None)
        if isinstance(kind, list):
            return self._one_of(self.expression({**schema, "type": each}) for each in kind)
        writers: dict[Any, Callable[[Schema], str]] = {
            "string": self._text,
            "boolean": lambda _: '("true" | "false")',
            "null": lambda _: '"null"',
            "integer": self._number,
            "number": self._number,
            "array": self._list,
            "object": self.object,
        }
        write = writers.get(kind)
        return write(schema) if write is not None else "anything"

    def _new_name(self) -> str:
        self._count += 1
        return f"{self._prefix}_{self._count}"

    def _rule(self, body: str) -> str:
        self.rules.append(f"{(name := self._new_name())}: {body}")
        return name

    @staticmethod
    def _one_of(expressions: Iterable[str]) -> str:
        return f"({' | '.join(expressions)})"

    def _referred(self, reference: str) -> str:
        """The rule of a definition, which may refer to itself."""
        if reference not in self._references:
            name = self._references[reference] = self._new_name()
            self.rules.append(f"{name}: {self.expression(resolved(reference, self.schema))}")
        return self._references[reference]

    def _number(self, schema: Schema) -> str:
        return self._rule(json_rule(with_definitions(schema, self.schema)))

    def _text(self, schema: Schema) -> str:
        rest = self._new_name()
        self.rules.append(rule_until(self._quote, rest, schema.get("minLength", 0), schema.get("maxLength")))
        return f"{self._quote.expression} {rest}"

    def _written(self, value: Any) -> str:
        """The Lark expression of a value that is given."""
        if isinstance(value, str):
            quote = self._quote.expression
            return f"{quote} {literal(value)} {quote}" if value else f"{quote} {quote}"
        if isinstance(value, Mapping):
            pairs = [f"{self._name(name)} {self._written(value[name])}" for name in _sorted(value)]
            return ' "," '.join(pairs).join(('"{" ', ' "}"'))
        if isinstance(value, list):
            return ' "," '.join(map(self._written, value)).join(('"[" ', ' "]"'))
        return literal(json.dumps(value))

    def _name(self, name: str) -> str:
        """The Lark expression of a name and its colon; one that would be read otherwise stands as a text does."""
        bare = re.fullmatch(_NAME, name) is not None
        return literal(f"{name}:") if bare else f'{self._written(name)} ":"'

    def _list(self, schema: Schema) -> str:
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        if most == 0:
            return '"[]"'
        item = self._rule(self.expression(schema.get("items", True)))
        more = f'("," {item}){{{max(0, least - 1)},{"" if most is None else most - 1}}}' if most != 1 else ""
        members = f"{item} {more}"
        return self._rule(f'"[" {members if least else f"({members})?"} "]"')

    def object(self, schema: Schema) -> str:
        """The Lark expression of an object."""
        properties = {name: value for name, value in schema.get("properties", {}).items() if value is not False}
        required = schema.get("required", [])
        if not properties and (others := schema.get("additionalProperties", True)) is not False:
            pair = self._rule(f'ANY_NAME ":" {self.expression(others)}')
            return self._rule(f'"{{" ({pair} ("," {pair})*)? "}}"')
        pairs = [
            (self._rule(f"{self._name(name)} {self.expression(properties[name])}"), name in required)
            for name in _sorted(properties)
        ]
        name = self._new_name()
        self.rules += separated(name, pairs, '","')
        return self._rule(f'"{{" {name} "}}"')


def _sorted(names: Iterable[str]) -> list[str]:
    """Names in the order in which templates list them."""
    return sorted(names, key=str.lower)
