"""Calls written as JSON objects: their grammar, and reading them while they come."""

import json
import re
from collections.abc import Callable, Sequence

from slipstream.chat.formats.base import call_rules, with_json_arguments
from slipstream.chat.reading import Reading, Steps, skip, skip_space
from slipstream.chat.schema import literal
from slipstream.chat.tools import Tool

# An escape that is cut off after its backslash matches too, without a second character.
_TOKEN = re.compile(r'\\.?|["{}\[\]:,]', re.DOTALL)

_ARGUMENT_KEYS = ('"arguments"', '"parameters"')


def call_opening(tool: Tool) -> str:
    """How a call of the tool begins, up to its name."""
    return f'{{"name": {json.dumps(tool.name, ensure_ascii=False)}'


def json_call_rules(tools: Sequence[Tool], *, arguments_key: str = "arguments") -> list[str]:
    """Lark rules for `call`: an object with the name of one of the tools, and arguments that fit its schema."""

    def rules_of(rule: str, tool: Tool) -> list[str]:
        return with_json_arguments(rule, tool, literal(f'{call_opening(tool)}, "{arguments_key}": '), '"}"')

    return call_rules(tools, rules_of)


def read_json_call(reading: Reading) -> Steps[bool]:
    """Read the next object as a call, its members in any order. Returns whether there was one that came to its end."""
    if not (yield from skip(reading, "{")):
        return False
    named, end = False, ","
    early: list[str] = []  # arguments that came before the name
    while end == ",":
        key, end = yield from _whole_value(reading)
        if end == ":" and key in _ARGUMENT_KEYS:
            end = yield from _value(reading, reading.add_arguments if named else early.append)
        elif end == ":":
            value, end = yield from _whole_value(reading)
            if key == '"name"' and not named and (name := _as_name(value)) is not None:
                named = True
                reading.begin_call(name)
                reading.add_arguments("".join(early))
    if named and end:
        reading.end_call()
    return named and end != ""


def read_json_arguments(reading: Reading) -> Steps[bool]:
    """Read the object that comes next as the arguments of the last call. Returns whether it came to its end."""
    yield from skip_space(reading)
    depth, quoted, escaped = 0, False, False
    while True:
        for place, char in enumerate(str.__str__(reading.rest)):
            if escaped or char == "\\":
                escaped = quoted and not escaped
            elif char == '"':
                quoted = not quoted
            elif not quoted and char in "{[":
                depth += 1
            elif not quoted and char in "}]":
                depth -= 1
                if depth <= 0:
                    reading.add_arguments(reading.take(place + 1))
                    reading.end_call()
                    return True
        reading.add_arguments(reading.take())
        if reading.ended:
            return False
        yield


def _value(reading: Reading, tell: Callable[[str], None]) -> Steps[str]:
    """Tell the text of a JSON value as it comes. Returns what ends it, one of `,:]}`; nothing if the text does."""
    yield from skip_space(reading)
    depth, quoted = 0, False
    while True:
        cut_escape = None
        for match in _TOKEN.finditer(reading.rest):
            token = match.group()
            if token == "\\":
                cut_escape = match.start()
            elif token == '"':
                quoted = not quoted
            elif quoted or token[0] == "\\":
                continue
            elif token in "{[":
                depth += 1
            elif depth == 0:
                tell(reading.take(match.start()).rstrip())
                return str.__str__(reading.take(1))
            elif token in "}]":
                depth -= 1
        if reading.ended:
            tell(reading.take())
            return ""
        certain = len(reading.rest if quoted else reading.rest.rstrip())
        tell(reading.take(certain if cut_escape is None else cut_escape))
        yield


def _whole_value(reading: Reading) -> Steps[tuple[str, str]]:
    """The text of a JSON value, and what ends it, once that's there."""
    pieces: list[str] = []
    end = yield from _value(reading, pieces.append)
    return "".join(pieces), end


def _as_name(value: str) -> str | None:
    """The name that JSON text spells; None if it was cut off, or is no name."""
    try:
        name = json.loads(value, strict=False)
    except ValueError:
        return None
    return name if isinstance(name, str) else None
