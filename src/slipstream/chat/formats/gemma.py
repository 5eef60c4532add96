"""Gemma 4: calls in a notation of its own, in which strings stand between tokens and names stand bare."""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

from slipstream.chat.formats.base import AnswerGrammar, TaggedCalls, as_json
from slipstream.chat.reading import Reading, Steps, cut_off_in, skip, text_before, whole_until
from slipstream.chat.schema import JsonRules, Meaning, Written, literal, rules_of_arguments
from slipstream.chat.schema.objects import Member
from slipstream.chat.schema.regex import NEVER, parse
from slipstream.chat.schema.regex_writing import RAW, terminal
from slipstream.chat.schema.shapes import Strings
from slipstream.chat.setting import Tool, ToolUse
from slipstream.chat.tags import Tag, Tags, rule_until

_DEEPEST = 64
_NAME = "[a-zA-Z0-9_.$-]{1,64}"
_NAMES = Strings(patterns=((parse(f"^{_NAME}$"), True),))
_WORDS = {"True": "true", "False": "false", "None": "null"}
"""What a template makes of values that it hands over to Python."""


class Gemma4(TaggedCalls):
    """`<|tool_call>call:name{city:<|"|>Bern<|"|>,days:3}<tool_call|>`, arguments in the order of their names."""

    name = "gemma-4"
    JSON_ARGUMENTS = False
    BEGIN, END = "<|tool_call>", "<tool_call|>"
    SIGNS = (BEGIN,)
    INNER, BETWEEN = "call", ""

    def __init__(self, tags: Tags) -> None:
        super().__init__(tags)
        self._quote = tags('<|"|>')
        self.ends = (self._quote, self._end)

    def grammar(self, use: ToolUse) -> AnswerGrammar:
        """See `ToolFormat.grammar`."""
        rules = super().grammar(use)
        return replace(rules, source="\n".join((rules.source, *_anything(self._quote))))

    def _call_rules(self, rule: str, tool: Tool) -> Written:
        values = _Values(Meaning(tool.parameters), f"{rule}_arguments", self._quote)
        arguments = rules_of_arguments(f"{rule}_arguments", values, "any_object")
        return Written([f"{rule}: {literal(f'call:{tool.name}')} {rule}_arguments", *arguments.rules], arguments.losses)

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
        bare = yield from text_before(reading, ",", "}", "]")  # a number, a word, or a string all the same
        if bare is None:
            return None
        text = str.__str__(bare).strip()
        return as_json(_WORDS.get(text, text))


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


def _anything(quote: Tag) -> list[str]:
    """Lark rules for `anything`, any value at all."""
    q = quote.expression
    return [
        'anything: any_text | any_number | "true" | "false" | "null" | any_list | any_object',
        f"any_text: {q} any_rest\n{rule_until(quote, 'any_rest')}",
        "any_number: JSON_NUMBER",
        'any_list: "[" (anything ("," anything)*)? "]"',
        'any_object: "{" (any_pair ("," any_pair)*)? "}"',
        f'any_pair: ANY_NAME ":" anything\nANY_NAME: /{_NAME}/',
    ]


class _Values(JsonRules):
    """Values in Gemma's notation."""

    ANY = "anything"
    SEPARATOR = '","'

    def __init__(self, meaning: Meaning, prefix: str, quote: Tag) -> None:
        super().__init__(meaning, prefix)
        self._quote = quote

    def key(self, key: str) -> str:
        """A name and its colon; one that would be read otherwise stands as a text does."""
        return literal(f"{key}:") if re.fullmatch(_NAME, key) else f'{self._given(key)} ":"'

    def free_key(self, keys: Strings) -> str | None:
        """Keys that can be written as names."""
        if keys == Strings():
            return 'ANY_NAME ":"'
        names = keys.and_also(_NAMES)
        texts = NEVER if names is None else names.texts
        return None if texts == NEVER else f'{self.terminal(terminal(texts, RAW))} ":"'

    def texts(self, strings: Strings, scalars: list[str], others: list[str]) -> None:  # noqa: ARG002
        """Texts between their quotes."""
        if strings.values is not None:
            others += map(self._given, strings.values)
        elif (body := strings.texts) != NEVER:
            rest = self.new_name()
            self.rules.append(rule_until(self._quote, rest, None if strings == Strings() else terminal(body, RAW)))
            others.append(f"{self._quote.expression} {rest}")

    def array(self, values: Iterable[object]) -> str:
        """An array that is given."""
        return ' "," '.join(map(self._given, values)).join(('"[" ', ' "]"'))

    def ordered(self, members: Iterable[Member]) -> tuple[Member, ...]:
        """Names in the order in which templates list them."""
        return tuple(sorted(members, key=lambda member: member.key.lower()))

    def _given(self, value: Any) -> str:
        """The Lark expression of a value that is given."""
        if isinstance(value, str):
            quote = self._quote.expression
            return f"{quote} {literal(value)} {quote}" if value else f"{quote} {quote}"
        return literal(json.dumps(value))
