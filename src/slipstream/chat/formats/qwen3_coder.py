"""Qwen3-Coder: `<tool_call>` around XML-like tags, one for each parameter."""

import json
import re
from collections.abc import Mapping
from typing import Any

from slipstream.chat.formats.base import Mark, NativeTools, ParsedAnswer, ParsedCall
from slipstream.chat.formats.hermes import BEGIN, END
from slipstream.chat.formats.json_calls import MORE, free_text_then, read_marked_calls, unique_call_id
from slipstream.chat.schema import closed_parameters, json_rule, literal
from slipstream.chat.tools import Tool, ToolUse

_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>\n?")
_PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
_CLOSING = re.compile(r"\s*</function>")

# A text ends at the first closing tag, so it can't hold one.
_VALUE = "value[lazy]: /(.|\\n)*\\n<\\/parameter>/"


class Qwen3Coder(NativeTools):
    """Strings stand as they are, other values as JSON."""

    name = "qwen3-coder"

    def recognises(self, template: str) -> bool:
        """By the tag of a function."""
        return BEGIN in template and "<function=" in template

    def grammar(self, use: ToolUse, mark: Mark) -> str:
        """See `ToolFormat.grammar`."""
        begin, end = mark(BEGIN), mark(END)
        more = f'("\\n" {begin} "\\n" call "\\n" {end}){MORE}' if use.parallel else ""
        calls = f'"\\n" call "\\n" {end} {more}'
        start = f"start: {begin} {calls}" if use.mode == "required" else free_text_then(BEGIN, begin, calls)
        rules = [start, "call: " + " | ".join(f"call_{index}" for index in range(len(use.callable)))]
        for index, tool in enumerate(use.callable):
            rules.extend(_call_rules(f"call_{index}", tool))
        return "\n".join((*rules, _VALUE))

    def parse(self, text: str, use: ToolUse, *, complete: bool) -> ParsedAnswer:
        """See `ToolFormat.parse`."""
        schemas = {tool.name: closed_parameters(tool.parameters) for tool in use.tools}

        def read(text: str, start: int) -> tuple[ParsedCall | None, int | None]:
            return _read_call(text, start, schemas)

        return read_marked_calls(text, BEGIN, END, read, complete=complete)

    def new_call_id(self) -> str:
        """See `ToolFormat.new_call_id`."""
        return unique_call_id()


def _call_rules(rule: str, tool: Tool) -> list[str]:
    """A tag for each property, in the schema's order; those that are not required may be missing."""
    schema = closed_parameters(tool.parameters)
    required = schema.get("required", [])
    parts, rules = [], []
    for index, (name, value) in enumerate(schema.get("properties", {}).items()):
        parts.append(f"{rule}_{index}" + ("" if name in required else "?"))
        head = literal(f"\n<parameter={name}>\n")
        if _is_text(value) and "enum" in value:
            options = " | ".join(literal(f"{option}\n</parameter>") for option in value["enum"])
            rules.append(f"{rule}_{index}: {head} ({options})")
        elif _is_text(value):
            rules.append(f"{rule}_{index}: {head} value")
        else:
            rules.append(f'{rule}_{index}: {head} {rule}_{index}_json "\\n</parameter>"')
            rules.append(f"{rule}_{index}_json: {json_rule(_with_definitions(value, schema))}")
    body = " ".join((literal(f"<function={tool.name}>"), *parts, literal("\n</function>")))
    return [f"{rule}: {body}", *rules]


def _with_definitions(value: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    return {**value, **{key: schema[key] for key in ("$defs", "definitions") if key in schema}}


def _is_text(schema: Mapping[str, Any]) -> bool:
    return schema.get("type") == "string"


def _read_call(text: str, start: int, schemas: Mapping[str, Mapping[str, Any]]) -> tuple[ParsedCall | None, int | None]:
    """The call that begins at `start`, with the parameters that are whole, and where it ends, if it does."""
    function = _FUNCTION.match(text, start)
    if function is None:
        return None, None
    schema = schemas.get(function[1], {})
    at = function.end()
    members = []
    while parameter := _PARAMETER.match(text, at):
        name, value = parameter[1], parameter[2]
        members.append(f"{json.dumps(name, ensure_ascii=False)}: {_as_json(value, schema, name)}")
        at = parameter.end()
    closing = _CLOSING.match(text, at)
    arguments = "{" + ", ".join(members) + ("}" if closing else "")
    return ParsedCall(function[1], arguments), closing.end() if closing else None


def _as_json(value: str, schema: Mapping[str, Any], name: str) -> str:
    """The value as JSON text: as it stands, unless the schema says string or it isn't JSON."""
    if not _is_text(schema.get("properties", {}).get(name, {})):
        try:
            return json.dumps(json.loads(value), ensure_ascii=False)
        except ValueError:
            pass
    return json.dumps(value, ensure_ascii=False)
