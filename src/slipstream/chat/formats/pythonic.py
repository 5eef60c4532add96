"""LFM2: a list of calls as Python writes them, between tags."""

import ast
import json
import keyword
from collections.abc import Sequence
from typing import Any

from slipstream.chat.formats.base import NativeTools, call_rules, listed_calls, separated, start_rules
from slipstream.chat.messages import Message, ToolCall
from slipstream.chat.reading import Reading, Steps, skip_space, text_until, whole_until
from slipstream.chat.schema import as_object, closed_parameters, json_rule, literal, with_definitions
from slipstream.chat.tags import Tags
from slipstream.chat.tools import Schema, Tool, ToolUse
from slipstream.tokenizer.provenance import content, origin_of, own


class LFM2(NativeTools):
    """`[name(parameter="value", count=3)]`; values are JSON, but for Python's words for true, false and null."""

    name = "lfm2"

    def __init__(self, tags: Tags) -> None:
        self._begin, self._end = tags("<|tool_call_start|>"), tags("<|tool_call_end|>")

    @classmethod
    def recognises(cls, template: str) -> bool:
        """By the way that it lists tools."""
        return any(sign in template for sign in ("<|tool_list_start|>", "<|tool_call_start|>", "List of tools: ["))

    def messages(self, messages: Sequence[Message], use: ToolUse) -> list[dict[str, Any]]:
        """Calls as text, and reasoning by another name; some of its templates have no other way in."""
        result = super().messages(messages, use)
        for made, message in zip(result, messages, strict=True):
            if message.reasoning:
                made["thinking"] = message.reasoning
            if message.tool_calls:
                listed = f"[{', '.join(map(_written, message.tool_calls))}]"
                calls = content(listed, origin_of(message.tool_calls[0].arguments))
                made["content"] = content(message.text) + own(str(self._begin)) + calls + own(str(self._end))
                del made["tool_calls"]
        return result

    def grammar(self, use: ToolUse) -> str:
        """See `ToolFormat.grammar`."""
        start = start_rules(use, self._begin, f"{listed_calls(use)} {self._end.expression}")
        return "\n".join((start, *call_rules(use.callable, _tool_rules)))

    def read(self, reading: Reading, use: ToolUse) -> Steps[None]:  # noqa: ARG002
        """See `ToolFormat.read`. Calls come when all of them are there."""
        while (yield from text_until(reading, self._begin.mark, reading.say)):
            reading.attempt()
            text = yield from whole_until(reading, self._end.mark)
            for name, arguments in _calls(text or ""):
                reading.begin_call(name)
                reading.add_arguments(json.dumps(arguments, ensure_ascii=False))
                reading.end_call()
            if text is None:
                reading.take()
            reading.gave_up()
            yield from skip_space(reading)
        reading.say_rest()


def _tool_rules(rule: str, tool: Tool) -> list[str]:
    """The arguments in the schema's order; any of those that are not required may be missing."""
    whole = closed_parameters(tool.parameters)
    schema = as_object(whole, whole, tool.name)
    required = schema.get("required", [])
    names = [name for name, value in schema.get("properties", {}).items() if value is not False]
    rules = separated(
        f"{rule}_arguments", [(f"{rule}_{index}", name in required) for index, name in enumerate(names)], '", "'
    )
    for index, name in enumerate(names):
        value = schema["properties"][name]
        words = _words(value)
        # What is no name in Python is passed in a dictionary.
        before, after = (literal(f"{name}="), "") if _is_name(name) else (literal(f"**{{{json.dumps(name)}: "), '"}"')
        rules.append(f"{rule}_{index}: {before} {words or f'{rule}_{index}_json'} {after}")
        if words is None:
            described = with_definitions({} if value is True else value, whole)
            rules.append(f"{rule}_{index}_json: {json_rule(described)}")
    return [f'{rule}: {literal(f"{tool.name}(")} {rule}_arguments ")"', *rules]


def _written(call: ToolCall) -> str:
    """A call as Python writes it."""
    arguments = call.parsed_arguments()
    named = arguments.items() if isinstance(arguments, dict) else ()
    written = [
        f"{name}={_as_python(value)}" if _is_name(name) else f"**{_as_python({name: value})}" for name, value in named
    ]
    return f"{call.name}({', '.join(written)})"


def _as_python(value: Any) -> str:
    """A value as models write it: JSON, but for Python's words on their own."""
    alone = value is None or isinstance(value, bool)
    return str(value) if alone else json.dumps(value, ensure_ascii=False)


def _is_name(name: str) -> bool:
    return name.isidentifier() and not keyword.iskeyword(name)


def _words(value: Schema | bool) -> str | None:
    """The Lark expression of a value that Python has words for."""
    if isinstance(value, bool) or "enum" in value:
        return None
    if isinstance(given := value.get("const"), bool):
        return literal(str(given))
    kind = None if "const" in value else value.get("type")
    return {"boolean": '("True" | "False")', "null": '"None"'}.get(str(kind))


def _calls(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Names and arguments of calls; none if the text isn't a list of calls with plain values."""
    words = {"true": True, "false": False, "null": None}
    try:
        listed = ast.parse(text.strip(), mode="eval").body
        assert isinstance(listed, ast.List)
        calls = []
        for call in listed.elts:
            assert isinstance(call, ast.Call)
            arguments: dict[str, Any] = {}
            for each in call.keywords:
                value = _evaluated(each.value, words)
                arguments |= value if each.arg is None else {each.arg: value}
            calls.append((ast.unparse(call.func), arguments))
    except (AssertionError, SyntaxError, TypeError, ValueError, RecursionError, MemoryError):
        return []
    return calls


def _evaluated(node: ast.expr, words: dict[str, Any]) -> Any:
    """A literal, in which JSON's words may stand for Python's."""
    if isinstance(node, ast.Name) and node.id in words:
        return words[node.id]
    if isinstance(node, ast.List):
        return [_evaluated(each, words) for each in node.elts]
    if isinstance(node, ast.Dict):
        keys = [_evaluated(key, words) for key in node.keys if key is not None]
        return dict(zip(keys, (_evaluated(each, words) for each in node.values), strict=True))
    value = ast.literal_eval(node)
    # JSON writes a character beyond U+FFFF as two escapes, which Python leaves apart.
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if isinstance(value, str) else value
