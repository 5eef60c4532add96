"""LFM2: a list of calls as Python writes them, between tags."""

import ast
import json
import keyword
from collections.abc import Mapping
from typing import Any

from slipstream.chat.formats.json_calls import ListedCalls
from slipstream.chat.messages import Message, ToolCall
from slipstream.chat.reading import Reading, Steps, whole_until
from slipstream.chat.schema import Arguments, Written, literal
from slipstream.chat.schema.objects import Member
from slipstream.chat.schema.shapes import Words
from slipstream.chat.setting import Tool, ToolUse


class LFM2(ListedCalls):
    """`[name(parameter="value", count=3)]`; values are JSON, but for Python's words for true, false and null."""

    name = "lfm2"
    JSON_ARGUMENTS = False
    BEGIN, END = "<|tool_call_start|>", "<|tool_call_end|>"
    THOUGHTS = (*ListedCalls.THOUGHTS, "thinking")

    @classmethod
    def recognises(cls, template: str) -> bool:
        """By the way that it lists tools."""
        return any(sign in template for sign in ("<|tool_list_start|>", cls.BEGIN, "List of tools: ["))

    def message(self, message: Message) -> dict[str, Any]:
        """Calls as text; some of its templates have no other way in."""
        made = super().message(message)
        if made.pop("tool_calls", None):
            made["content"] = self._as_text(message, f"[{', '.join(map(_written, message.tool_calls))}]")
        return made

    def _call_rules(self, rule: str, tool: Tool) -> Written:
        """The arguments in the schema's order; any of those that are not required may be missing."""
        arguments = Arguments(tool.parameters, prefix=f"{rule}_value")
        ways = []
        for members in arguments.forms:
            parts = []
            for member in members:
                # What is no name in Python is passed in a dictionary.
                before, after = f"{member.key}=", ""
                if not _is_name(member.key):
                    before, after = f"**{{{json.dumps(member.key)}: ", '"}"'
                value = _words(member, arguments) or arguments.values.expression(member.node)
                parts.append((f"{literal(before)} {value} {after}", member.required))
            ways.append(arguments.values.separated(parts))
        call = f'{rule}: {literal(f"{tool.name}(")} ({" | ".join(ways)}) ")"'
        return Written([call, *arguments.values.rules], tuple(arguments.meaning.losses))

    def _read_calls(self, reading: Reading, use: ToolUse) -> Steps[bool]:  # noqa: ARG002
        """Calls come when all of them are there."""
        text = yield from whole_until(reading, self._end.mark)
        for name, arguments in _calls(text or ""):
            reading.begin_call(name)
            reading.add_arguments(arguments)
            reading.end_call()
        if text is None:
            reading.take()
        return True


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


def _words(member: Member, arguments: Arguments) -> str | None:
    """The Lark expression of a value that Python has words for, and nothing else."""
    words: set[str] = set()
    for shape in arguments.meaning.shapes(member.node):
        if not isinstance(shape, Words):
            return None
        words.update(map(str, shape.values))
    return " | ".join(map(literal, sorted(words))).join("()")


def _calls(text: str) -> list[tuple[str, str]]:
    """Names of calls, and arguments as JSON; none if the text isn't a list of calls with plain values."""
    try:
        listed = ast.parse(text.strip(), mode="eval").body
        assert isinstance(listed, ast.List)
        calls = []
        for call in listed.elts:
            assert isinstance(call, ast.Call)
            arguments: dict[str, Any] = {}
            for each in call.keywords:
                value = ast.literal_eval(_Literals().visit(each.value))
                arguments |= value if each.arg is None else {each.arg: value}
            calls.append((ast.unparse(call.func), json.dumps(arguments, ensure_ascii=False)))
    except (AssertionError, SyntaxError, TypeError, ValueError, RecursionError, MemoryError):
        return []
    return calls


class _Literals(ast.NodeTransformer):
    """Makes Python's words of JSON's, and one character of the two escapes that JSON has for one beyond U+FFFF."""

    _WORDS: Mapping[str, bool | None] = {"true": True, "false": False, "null": None}

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(self._WORDS[node.id]) if node.id in self._WORDS else node

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        if isinstance(node.value, str):
            node.value = node.value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return node
