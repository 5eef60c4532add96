"""Calls written as JSON objects: their grammar, and reading them from text that is still growing."""

import json
import re
import secrets
from collections.abc import Callable, Sequence
from itertools import takewhile

from slipstream.chat.formats.base import ParsedAnswer, ParsedCall, certain_length
from slipstream.chat.schema import closed_parameters, json_rule, literal
from slipstream.chat.tools import Tool

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|"|[{}\[\]:,]|[^\s{}\[\]:,"]+', re.DOTALL)
CallReader = Callable[[str, int], tuple[ParsedCall | None, int | None]]
"""Reads the call that begins at or after a position, as far as it's there, and tells where it ends, if it does."""

MORE = "{0,15}"
"""How many calls may follow the first: a model that has lost its way calls without end."""

_ARGUMENT_KEYS = ("arguments", "parameters")


def call_rules(tools: Sequence[Tool], *, arguments_key: str = "arguments") -> str:
    """Lark rules for `call`: an object with the name of one of the tools, and arguments that fit its schema."""
    names = " | ".join(f"call_{index}" for index in range(len(tools)))
    rules = [f"call: {names}"]
    for index, tool in enumerate(tools):
        head = f'{{"name": {json.dumps(tool.name, ensure_ascii=False)}, "{arguments_key}": '
        rules.append(f'call_{index}: {literal(head)} arguments_{index} "}}"')
        rules.append(f"arguments_{index}: {json_rule(closed_parameters(tool.parameters))}")
    return "\n".join(rules)


def free_text_then(begin: str, marked: str, calls: str) -> str:
    """Lark rules for `start`: free text, or free text up to `begin` and then calls.

    `marked` is the Lark expression of `begin`, which may be a special token; `calls` is the expression of what follows.
    """
    if marked.startswith("<"):
        return f"start: TEXT | head {calls}\nhead: TEXT {marked}\nTEXT: /(.|\\n)*/"
    return f"start: TEXT | head {calls}\nhead[lazy]: TEXT {literal(begin)}\nTEXT: /(.|\\n)*/"


def read_call(text: str, start: int) -> tuple[ParsedCall | None, int | None]:
    """The call that begins at or after `start`, as far as it's there, and where it ends (None if it doesn't yet)."""
    if (start := text.find("{", start)) < 0:
        return None, None
    depth, key, in_value = 0, "", False
    name: str | None = None
    begin = end = None
    # What follows the quote of a string that has not ended is part of it, whatever it looks like.
    for match in takewhile(lambda match: match.group() != '"', _TOKEN.finditer(text, start)):
        token = match.group()
        if depth == 1 and in_value and key in _ARGUMENT_KEYS and begin is None:
            begin = match.start()
        if token[0] == '"' and depth == 1:
            if not in_value:
                key = json.loads(token, strict=False)
            elif key == "name":
                name = json.loads(token, strict=False)
        elif token == ":" and depth == 1:
            in_value = True
        elif token in "{[":
            depth += 1
        elif token in "}],":
            if depth == 1:  # the end of a member
                end = match.start() if begin is not None and end is None else end
                in_value = False
            if token != ",":
                depth -= 1
            if depth == 0:
                call = ParsedCall(name, _slice(text, begin, end)) if name is not None else None
                return call, match.end()
    call = ParsedCall(name, _slice(text, begin, end)) if name is not None else None
    return call, None


def _slice(text: str, begin: int | None, end: int | None) -> str:
    return "" if begin is None else text[begin:end].rstrip()


def read_marked_calls(text: str, begin: str, end: str, read: CallReader, *, complete: bool) -> ParsedAnswer:
    """Free text with calls between `begin` and `end`; white space around calls belongs to nobody."""
    closing = re.compile(r"\s*" + re.escape(end))
    shown: list[str] = []
    calls: list[ParsedCall] = []
    at = 0
    while (found := text.find(begin, at)) >= 0:
        shown.append(text[at:found].strip() if calls else text[at:found].rstrip())
        call, after = read(text, found + len(begin))
        if call is not None:
            calls.append(call)
        if after is None:
            return ParsedAnswer("".join(shown), tuple(calls))
        closed = closing.match(text, after)
        if closed is None and (end + " ").startswith(text[after:].lstrip()):
            return ParsedAnswer("".join(shown), tuple(calls))
        at = closed.end() if closed else after
    rest = text[at:]
    if not complete:
        rest = rest[: certain_length(rest, (begin,))]
    elif calls:
        rest = rest.rstrip()
    shown.append(rest.lstrip() if calls else rest)
    return ParsedAnswer("".join(shown), tuple(calls))


def unique_call_id() -> str:
    """An id such as OpenAI's."""
    return f"call_{secrets.token_hex(12)}"
