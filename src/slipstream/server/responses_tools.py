"""Tools of the Responses API, whatever their type: to the model all of them are functions.

Functions in a namespace go by one name for both; a custom tool, whose input is text, and the local shell are functions
whose arguments hold the input or the action. What other servers run themselves is left out.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel

from slipstream.chat import Tool, ToolCall
from slipstream.chat.setting import TextGrammar
from slipstream.server.by_type import ByType
from slipstream.server.custom_tools import custom_tool, input_of, members_of
from slipstream.server.errors import given
from slipstream.server.hosted_tools import HostedTool, left_out
from slipstream.server.openai_tools import FunctionDefinition, ToolName, flat_name, function_tool

Item = dict[str, Any]
"""An item as JSON has it."""

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


class InputFormat(BaseModel):
    """What the input of a custom tool must fit: anything, or a grammar."""

    type: Literal["text", "grammar"] = "text"
    syntax: Literal["lark", "regex"] | None = None
    definition: str | None = None


class CustomTool(BaseModel):
    """A tool whose input is text."""

    type: Literal["custom"]
    name: ToolName
    description: str | None = None
    format: InputFormat | None = None


class NamespaceTool(BaseModel):
    """A group of tools that the client runs."""

    type: Literal["namespace"]
    name: ToolName
    description: str | None = None
    tools: list[Annotated[CustomTool | FunctionTool, ByType()]]


class LocalShellTool(BaseModel):
    """The client's shell."""

    type: Literal["local_shell"]


AnyTool = Annotated[FunctionTool | CustomTool | NamespaceTool | LocalShellTool | HostedTool, ByType()]


ClientTool = FunctionTool | CustomTool | LocalShellTool


@dataclass(frozen=True, slots=True)
class _Known:
    """A tool as the model knows it, and as the client does."""

    tool: Tool
    told: ClientTool
    namespace: str | None


class Toolbox:
    """The tools of a request; raises `InvalidRequestError` for grammars that are none."""

    def __init__(self, tools: Sequence[Any]) -> None:
        known = list(_all(tools))
        self._known = {each.tool.name: each for each in known}
        self.tools = tuple(each.tool for each in known)
        """In no protocol's terms."""
        self.warnings = left_out(tools)

    def call_item(self, call: ToolCall) -> Item:
        """A call as an item of the output, without its id and status."""
        known = self._known.get(call.name)
        told = known.told if known is not None else None
        if isinstance(told, LocalShellTool):
            action = {"type": "exec", "env": {}, **members_of(call.arguments)}
            return {"type": "local_shell_call", "call_id": call.id, "action": action}
        item = {"type": "function_call", "call_id": call.id, "name": call.name, "arguments": call.arguments}
        if isinstance(told, CustomTool):
            input = input_of(call.arguments)
            item = {"type": "custom_tool_call", "call_id": call.id, "name": call.name, "input": input}
        if known is not None and told is not None:
            item["name"] = told.name
            if known.namespace is not None:
                item["namespace"] = known.namespace
        return item


def shell_arguments(action: Mapping[str, Any]) -> str:
    """The arguments of a call of the shell, by its action."""
    given = {name: action[name] for name in _SHELL_PARAMETERS["properties"] if action.get(name) is not None}
    return json.dumps(given, ensure_ascii=False)


def _all(tools: Sequence[Any]) -> Iterator[_Known]:
    for index, tool in enumerate(tools):
        if isinstance(tool, NamespaceTool):
            for inner, each in enumerate(tool.tools):
                yield _known(each, f"{index}].tools[{inner}", tool.name)
        elif not isinstance(tool, HostedTool):
            yield _known(tool, str(index), None)


def _known(told: ClientTool, place: str, namespace: str | None) -> _Known:
    return _Known(replace(_tool(told, f"tools[{place}]", namespace), place=place), told, namespace)


def _tool(told: ClientTool, param: str, namespace: str | None) -> Tool:
    if isinstance(told, LocalShellTool):
        return Tool(SHELL_NAME, "Runs a command in the user's shell.", _SHELL_PARAMETERS)
    name = flat_name(namespace, told.name)
    if isinstance(told, FunctionTool):
        return function_tool(told, name)
    form, text = told.format, TextGrammar()
    if form is not None and form.type == "grammar":
        definition = given(form.definition, f"{param}.format.definition")
        text = TextGrammar(given(form.syntax, f"{param}.format.syntax"), definition)
    return custom_tool(name, told.description, text, f"{param}.format.definition")
