"""Tools and response formats as OpenAI's clients ask for them, and what they mean."""

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, Field, PlainValidator

from slipstream import fields
from slipstream.chat import Schema, Tool, ToolCall, ToolUse
from slipstream.chat.setting import TextGrammar
from slipstream.server.by_type import ByType
from slipstream.server.custom_tools import custom_tool, input_of
from slipstream.server.errors import given
from slipstream.server.field_names import CHAT

ToolName = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[^\x00-\x1f\"\\<>]+$")]


class FunctionDefinition(BaseModel):
    """A function that may be called. Its calls fit its schema; `strict` refuses one that can't be enforced."""

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class GrammarDefinition(BaseModel):
    """A grammar of text."""

    syntax: Literal["lark", "regex"]
    definition: str


class CustomFormat(BaseModel):
    """What the input of a custom tool must fit: anything, or a grammar."""

    type: Literal["text", "grammar"] = "text"
    grammar: GrammarDefinition | None = None


class CustomDefinition(BaseModel):
    """A tool whose input is text."""

    name: ToolName
    description: str | None = None
    format: CustomFormat | None = None


class ToolDefinition(BaseModel):
    """A tool: under its type, what it is."""

    type: Literal["function", "custom"]
    function: FunctionDefinition | None = None
    custom: CustomDefinition | None = None


class ItsName(BaseModel):
    """The name of a tool."""

    name: str


class NamedTool(BaseModel):
    """A tool by its name."""

    type: Literal["function", "custom"]
    function: ItsName | None = None
    custom: ItsName | None = None

    @property
    def name(self) -> str:
        """The tool's; raises `InvalidRequestError` if it isn't there."""
        named = self.function if self.type == "function" else self.custom
        return given(named, f"{fields.ALLOWED_TOOLS.named(CHAT)}.{self.type}").name


class NamedFunction(BaseModel):
    """A tool by its name, in the Responses API; one of a namespace may be named with it."""

    type: Literal["function", "custom", "local_shell"]
    name: str = "local_shell"
    namespace: str | None = None


Named = TypeVar("Named", NamedTool, NamedFunction)


class AllowedTools(BaseModel, Generic[Named]):
    """Some of the tools, of which the answer may or must call one."""

    type: Literal["allowed_tools"] = "allowed_tools"
    mode: Literal["auto", "required"]
    tools: Annotated[list[Named], Field(min_length=1)]


class AllowedToolsChoice(BaseModel):
    """`tool_choice` for some of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools[NamedTool]


_Word = Literal["none", "auto", "required"]


def _word_or(*kinds: str) -> PlainValidator:
    """Reads a word, where an object of one of these types may be, too."""

    def read(value: object) -> object:
        if value not in ("none", "auto", "required"):
            raise ValueError(f"it must be none, auto, required, or an object of type {' or '.join(kinds)}")
        return value

    return PlainValidator(read, json_schema_input_type=_Word)


_AnyWord = Annotated[_Word, _word_or("function", "custom", "allowed_tools")]
_AnyWordOrShell = Annotated[_Word, _word_or("function", "custom", "local_shell", "allowed_tools")]
ToolChoice = Annotated[NamedTool | AllowedToolsChoice | _AnyWord, ByType()]
FunctionChoice = Annotated[NamedFunction | AllowedTools[NamedFunction] | _AnyWordOrShell, ByType()]
"""The same in the Responses API."""


class JSONSchemaFormat(BaseModel):
    """What the schema of an answer is called, and the schema."""

    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """`response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchemaFormat | None = None


def function_tool(function: FunctionDefinition, name: str | None = None) -> Tool:
    """A function in no protocol's terms, by another name if the model is to know it by one."""
    parameters, strict = function.parameters or {}, bool(function.strict)
    return Tool(name or function.name, function.description or "", parameters, strict)


def chat_tools(tools: Sequence[ToolDefinition] | None) -> tuple[Tool, ...]:
    """The tools in no protocol's terms; raises `InvalidRequestError` naming the field."""
    return tuple(_tool(tool, f"tools[{index}].{tool.type}") for index, tool in enumerate(tools or ()))


def _tool(tool: ToolDefinition, param: str) -> Tool:
    if tool.type == "function":
        return function_tool(given(tool.function, param))
    custom = given(tool.custom, param)
    text = TextGrammar()
    if custom.format is not None and custom.format.type == "grammar":
        grammar = given(custom.format.grammar, f"{param}.format.grammar")
        text = TextGrammar(grammar.syntax, grammar.definition)
    return custom_tool(custom.name, custom.description, text, f"{param}.format.grammar.definition")


def tool_use(
    known: tuple[Tool, ...], choice: ToolChoice | FunctionChoice | None = None, *, parallel: bool = True
) -> ToolUse:
    """Tools and how they may be used, in no protocol's terms; raises `InvalidRequestError` naming the field."""
    wanted = choice.allowed_tools if isinstance(choice, AllowedToolsChoice) else choice
    if wanted is None or isinstance(wanted, str):
        return ToolUse(known, wanted or "auto", None, parallel)
    if isinstance(wanted, AllowedTools):
        return ToolUse(known, wanted.mode, frozenset(map(_flat_name, wanted.tools)), parallel)
    return ToolUse(known, "required", frozenset({_flat_name(wanted)}), parallel=False)


def flat_name(namespace: str | None, name: str) -> str:
    """The name by which the model knows a tool of a namespace."""
    if namespace is None:
        return name
    return f"{namespace}{name}" if namespace.endswith("__") else f"{namespace}__{name}"


def _flat_name(tool: NamedTool | NamedFunction) -> str:
    return flat_name(tool.namespace if isinstance(tool, NamedFunction) else None, tool.name)


def call_objects(calls: Iterable[ToolCall], tools: Iterable[Tool]) -> list[dict[str, Any]]:
    """The calls of a message as OpenAI's clients read them, and send them again, by the tools that there are."""
    custom = {tool.name for tool in tools if tool.text is not None}
    return [
        {"id": call.id, "type": "custom", "custom": {"name": call.name, "input": input_of(call.arguments)}}
        if call.name in custom
        else {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in calls
    ]


def tool_object(tool: Tool) -> dict[str, Any]:
    """A tool in the form in which it can be sent again."""
    if tool.text is None:
        return tool.as_dict()
    form: dict[str, Any] = {"type": "text"}
    if tool.text.syntax != "text":
        form = {"type": "grammar", "grammar": {"syntax": tool.text.syntax, "definition": tool.text.definition}}
    return {"type": "custom", "custom": {"name": tool.name, "description": tool.description, "format": form}}


def response_schema(kind: str, wanted: JSONSchemaFormat | None) -> Schema | None:
    """The schema that an answer must fit, or None for text; raises `InvalidRequestError` if it's missing."""
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    return given(wanted.schema_ if wanted is not None else None, fields.RESPONSE_SCHEMA)
