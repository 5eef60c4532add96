"""Formats with calls as JSON objects: Hermes, lists of calls, Llama 3. Their grammar, and reading JSON as it comes."""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from slipstream.chat.formats.base import MORE, MarkedCalls, TaggedCalls, ToolFormat, call_opening
from slipstream.chat.messages import Message
from slipstream.chat.reading import Reading, Steps, comes_next, cut_off_in, skip, skip_space
from slipstream.chat.setting import ToolUse

# An escape that is cut off after its backslash matches too, without a second character.
_TOKEN = re.compile(r'\\.?|["{}\[\]:,]', re.DOTALL)

_ARGUMENT_KEYS = ('"arguments"', '"parameters"')

_JSON_IN_TAGS = re.compile(r"<tool_call>(\s|\\n)*\{")
"""As a template's source spells it too."""


class Hermes(TaggedCalls):
    """Hermes, Qwen 2.5 and 3, Granite 4: `<tool_call>` around a JSON object."""

    name = "hermes"

    @classmethod
    def recognises(cls, template: str) -> bool:
        """By its tag before JSON."""
        return _JSON_IN_TAGS.search(template) is not None

    def _read_call(self, reading: Reading, use: ToolUse) -> Steps[bool]:  # noqa: ARG002
        return read_json_call(reading)


class ListedCalls(MarkedCalls):
    """All calls of an answer in one list after a tag, here of JSON: `BEGIN[{…}, {…}]END`, where there may be no end."""

    def _calls(self, use: ToolUse) -> str:
        return f'"[" call (", " call){MORE} "]"' if use.parallel else '"[" call "]"'

    def _read_calls(self, reading: Reading, use: ToolUse) -> Steps[bool]:  # noqa: ARG002
        complete = (yield from skip(reading, "[")) and (yield from read_json_call(reading))
        while complete and (yield from skip(reading, ",")):
            reading.attempt(before=",")
            complete = yield from read_json_call(reading)
        if not complete:
            return False
        for end in ("]", self._end.mark):
            if not (yield from skip(reading, end)) and reading.ended and cut_off_in(reading, end):
                return False
        return True


class Mistral(ListedCalls):
    """Mistral Nemo, Large 2411, Small 2501: templates until v7."""

    name = "mistral"
    BEGIN = "[TOOL_CALLS]"
    SIGNS = (BEGIN,)
    SHORT_IDS = True


class Granite3(ListedCalls):
    """Granite 3.0 to 3.3."""

    name = "granite3"
    BEGIN = "<|tool_call|>"
    SIGNS = (BEGIN, "<|start_of_role|>")


class Phi4Mini(ListedCalls):
    """Phi-4-mini, whose template takes tools as text with the system message, and calls as text."""

    name = "phi4-mini"
    BEGIN, END = "<|tool_call|>", "<|/tool_call|>"
    SIGNS = ("<|tool|>", "<|/tool|>")
    TOOLS_IN_MESSAGES = True

    def messages(self, messages: Sequence[Message], use: ToolUse) -> list[dict[str, Any]]:
        """See `ToolFormat.messages`."""
        result = super().messages(messages, use)
        if use.described:
            if not result or result[0]["role"] != "system":
                result.insert(0, {"role": "system", "content": ""})
            functions = [tool.as_dict()["function"] for tool in use.described]
            result[0]["tools"] = json.dumps(functions, ensure_ascii=False)
        return result

    def message(self, message: Message) -> dict[str, Any]:
        """See `ToolFormat.message`."""
        made = super().message(message)
        if calls := made.pop("tool_calls", None):
            listed = json.dumps([call["function"] for call in calls], ensure_ascii=False)
            made["content"] = self._as_text(message, listed)
        return made


class Llama3(ToolFormat):
    """Llama 3.1 to 3.3: an answer that begins as a call does is one JSON object with `parameters`, others are text."""

    name = "llama3"
    SIGNS = ("<|start_header_id|>", '"parameters"')
    ARGUMENTS = "parameters"

    def _start(self, use: ToolUse) -> str:
        return "start: call" if use.mode == "required" else "start: call | TEXT\nTEXT: /([^{](.|\n)*)?/"

    def read(self, reading: Reading, use: ToolUse) -> Steps[None]:
        """See `ToolFormat.read`. An object that doesn't begin as a call is text: a response schema may ask for it."""
        if (yield from comes_next(reading, *map(call_opening, use.callable))) and reading.rest.startswith("{"):
            yield from read_json_call(reading)
        else:
            yield from reading.say_all()


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
    complete = bool((yield from _value(reading, reading.add_arguments, alone=True)))
    if complete:
        reading.end_call()
    return complete


def _value(reading: Reading, tell: Callable[[str], None], *, alone: bool = False) -> Steps[str]:
    """Tell the text of a JSON value as it comes. Returns what ends it, one of `,:]}`; nothing if the text does.

    One that stands `alone` is an object, which ends with its own bracket.
    """
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
            elif depth == 0 and not alone:
                tell(reading.take(match.start()).rstrip())
                return str.__str__(reading.take(1))
            elif token in "}]":
                depth -= 1
                if alone and depth <= 0:
                    tell(reading.take(match.end()))
                    return token
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
