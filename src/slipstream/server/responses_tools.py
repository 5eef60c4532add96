"""Tools of the Responses API, whatever their type: to the model all of them are functions.

Functions in a namespace go by one name for both; a custom tool, whose input is text, and the local shell are functions
whose arguments hold the input or the action. What other servers run themselves is left out.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, Tag
from pydantic_core import from_json

from slipstream.chat import Tool, ToolCall
from slipstream.chat.setting import TextGrammar
from slipstream.chat.text_grammar import text_rules
from slipstream.errors import InvalidRequestError
from slipstream.server.hosted_tools import HostedTool, left_out
from slipstream.server.openai_tools import FunctionDefinition, ToolName, flat_name

Item = dict[str, Any]
"""An item as JSON has it."""

INPUT = "input"
"""The one parameter of a custom tool."""
SHELL_NAME = "local_shell"
_SHELL_PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "command": {"type": "array", "items": {"type": "string"}, "minItems": 1, "description": "Program, arguments"},
        "timeout_ms": {"type": "integer", "minimum": 1},
        "working_directory": {"type": "string"},
    },
    "required": ["command"],
    "additionalProperties": False,
}


class FunctionTool(FunctionDefinition):
    """A function that the client runs."""

    type: Literal["function"]


class CustomFormat(BaseModel):
    """What the input of a custom tool must fit: anything, or a grammar."""

    type: Literal["text", "grammar"] = "text"
    syntax: Literal["lark", "regex"] | None = None
    definition: str | None = None


class CustomTool(BaseModel):
    """A tool whose input is text."""

    type: Literal["custom"]
    name: ToolName
    description: str | None = None
    format: CustomFormat | None = None


class NamespaceTool(BaseModel):
    """A group of tools that the client runs."""

    type: Literal["namespace"]
    name: ToolName
    description: str | None = None
    tools: list[Annotated[FunctionTool | CustomTool, Field(discriminator="type")]]


class LocalShellTool(BaseModel):
    """The client's shell."""

    type: Literal["local_shell"]


def _kind(tool: object) -> str:
    kind = tool.get("type") if isinstance(tool, dict) else getattr(tool, "type", None)
    known = ("function", "custom", "namespace", "local_shell")
    return f"[{kind}]" if kind in known else "[function]" if kind is None else "[hosted]"


AnyTool = Annotated[
    Annotated[FunctionTool, Tag("[function]")]
    | Annotated[CustomTool, Tag("[custom]")]
    | Annotated[NamespaceTool, Tag("[namespace]")]
    | Annotated[LocalShellTool, Tag("[local_shell]")]
    | Annotated[HostedTool, Tag("[hosted]")],
    Discriminator(_kind),
]


@dataclass(frozen=True, slots=True)
class _Known:
    """A tool as the model knows it, and as the client does."""

    tool: Tool
    kind: Literal["function", "custom", "local_shell"]
    name: str
    namespace: str | None = None
    loosened: str = ""
    """What is not enforced of it."""


class Toolbox:
    """The tools of a request; raises `InvalidRequestError` for grammars that lack their definition."""

    def __init__(self, tools: Sequence[Any]) -> None:
        known = list(_all(tools))
        self._known = {each.tool.name: each for each in known}
        self.tools = tuple(each.tool for each in known)
        """In no protocol's terms."""
        self.warnings = (
            *left_out(tools),
            *(each.loosened for each in known if each.loosened),
        )

    def call_item(self, call: ToolCall) -> Item:
        """A call as an item of the output, without its id and status."""
        known = self._known.get(call.name)
        if known is None or known.kind == "function":
            item = {"type": "function_call", "call_id": call.id, "name": call.name, "arguments": call.arguments}
        elif known.kind == "custom":
            item = {
                "type": "custom_tool_call",
                "call_id": call.id,
                "name": call.name,
                "input": input_of(call.arguments),
            }
        else:
            action = {"type": "exec", "env": {}, **_object(call.arguments)}
            return {"type": "local_shell_call", "call_id": call.id, "action": action}
        if known is not None:
            item["name"] = known.name
            if known.namespace is not None:
                item["namespace"] = known.namespace
        return item


def custom_arguments(text: str) -> str:
    """The arguments of a custom tool's call, by its input."""
    return json.dumps({INPUT: text}, ensure_ascii=False)


def shell_arguments(action: Mapping[str, Any]) -> str:
    """The arguments of a call of the shell, by its action."""
    given = {name: action[name] for name in _SHELL_PARAMETERS["properties"] if action.get(name) is not None}
    return json.dumps(given, ensure_ascii=False)


def input_of(arguments: str) -> str:
    """The input in a custom tool's arguments, as far as they go."""
    text = _object(arguments).get(INPUT, "")
    return text if isinstance(text, str) else ""


def _object(arguments: str) -> dict[str, Any]:
    try:
        value = from_json(arguments or "{}", allow_partial="trailing-strings")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _all(tools: Sequence[Any]) -> Iterator[_Known]:
    for index, tool in enumerate(tools):
        if isinstance(tool, NamespaceTool):
            for inner, each in enumerate(tool.tools):
                yield _known(each, f"tools[{index}].tools[{inner}]", tool)
        elif not isinstance(tool, HostedTool):
            yield _known(tool, f"tools[{index}]", None)


def _known(tool: FunctionTool | CustomTool | LocalShellTool, param: str, group: NamespaceTool | None) -> _Known:
    if isinstance(tool, LocalShellTool):
        return _Known(
            Tool(SHELL_NAME, "Runs a command in the user's shell.", _SHELL_PARAMETERS), "local_shell", SHELL_NAME
        )
    namespace = group.name if group is not None else None
    name, description = flat_name(namespace, tool.name), tool.description or ""
    if isinstance(tool, FunctionTool):
        return _Known(
            Tool(name, description, tool.parameters or {}, bool(tool.strict)), "function", tool.name, namespace
        )
    form = tool.format or CustomFormat()
    text: dict[str, Any] = {"type": "string"}
    grammar, loosened = None, ""
    if form.type == "grammar":
        if form.definition is None or form.syntax is None:
            field = "definition" if form.definition is None else "syntax"
            raise InvalidRequestError(f"{param}.format.{field} is required", param=f"{param}.format.{field}")
        grammar = TextGrammar(form.syntax, form.definition)
        try:
            text_rules(grammar, "")
        except ValueError as error:
            grammar, loosened = None, f"{param}.format.definition is not enforced: {error}"
        text["description"] = f"Must fit this {form.syntax} grammar:\n{form.definition}"
    schema = {"type": "object", "properties": {INPUT: text}, "required": [INPUT], "additionalProperties": False}
    return _Known(Tool(name, description, schema, text=grammar), "custom", tool.name, namespace, loosened)
