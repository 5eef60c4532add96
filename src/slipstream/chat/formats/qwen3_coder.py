"""Qwen3-Coder: `<tool_call>` around XML-like tags, one for each parameter."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from slipstream.chat.formats.reading import Reading, Steps, skip, whole_until
from slipstream.chat.formats.tagged import BEGIN, TaggedCalls
from slipstream.chat.schema import closed_parameters, json_rule, literal
from slipstream.chat.tools import Tool, ToolUse

# A text ends at the first closing tag, so it can't hold one.
_VALUE = "value[lazy]: /(.|\\n)*\\n<\\/parameter>/"


class Qwen3Coder(TaggedCalls):
    """Strings stand as they are, other values as JSON."""

    name = "qwen3-coder"

    def recognises(self, template: str) -> bool:
        """By the tag of a function."""
        return BEGIN in template and "<function=" in template

    def _call_rules(self, tools: Sequence[Tool]) -> Sequence[str]:
        rules = ["call: " + " | ".join(f"call_{index}" for index in range(len(tools)))]
        for index, tool in enumerate(tools):
            rules.extend(_tool_rules(f"call_{index}", tool))
        return (*rules, _VALUE)

    def _read_call(self, reading: Reading, use: ToolUse) -> Steps[bool]:
        """The arguments come one by one, when they are whole."""
        if not (yield from skip(reading, "<function=")):
            return False
        if (name := (yield from whole_until(reading, ">"))) is None:
            return False
        properties = _properties(name, use)
        reading.begin_call(name)
        reading.add_arguments("{")
        separator = ""
        while (yield from skip(reading, "<parameter=")):
            parameter = yield from whole_until(reading, ">")
            value = yield from whole_until(reading, "</parameter>")
            if parameter is None or value is None:
                return False
            value = _as_json(value.removeprefix("\n").removesuffix("\n"), properties.get(parameter, {}))
            reading.add_arguments(f"{separator}{json.dumps(parameter, ensure_ascii=False)}: {value}")
            separator = ", "
        if not (yield from skip(reading, "</function>")):
            return False
        reading.add_arguments("}")
        reading.end_call()
        return True


def _tool_rules(rule: str, tool: Tool) -> list[str]:
    """A tag for each property, in the schema's order; those that are not required may be missing."""
    schema = closed_parameters(tool.parameters)
    required = schema.get("required", [])
    parts, rules = [], []
    for index, (name, value) in enumerate(schema.get("properties", {}).items()):
        if value is False:
            continue
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


def _properties(name: str, use: ToolUse) -> Mapping[str, Any]:
    """The schemas of a tool's parameters."""
    parameters = next((tool.parameters for tool in use.callable if tool.name == name), {})
    properties: Mapping[str, Any] = closed_parameters(parameters).get("properties", {})
    return properties


def _as_json(value: str, schema: Mapping[str, Any]) -> str:
    """The value as JSON text: as it stands, unless the schema says string or it isn't JSON."""
    if not _is_text(schema):
        try:
            return json.dumps(json.loads(value), ensure_ascii=False)
        except ValueError:
            pass
    return json.dumps(value, ensure_ascii=False)
