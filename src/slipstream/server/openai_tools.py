"""Tools and response formats as OpenAI's clients ask for them, and what they mean."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, Field, PlainValidator, ValidationError

from slipstream.chat import Schema, Tool, ToolCall, ToolUse
from slipstream.fields import RESPONSE_SCHEMA
from slipstream.server.errors import missing

ToolName = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[^\x00-\x1f\"\\<>]+$")]


class FunctionDefinition(BaseModel):
    """A function that may be called. Its calls fit its schema; `strict` refuses one that can't be enforced."""

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolDefinition(BaseModel):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(BaseModel):
    """The name of a function."""

    name: str


class NamedTool(BaseModel):
    """A tool by its name."""

    type: Literal["function"]
    function: FunctionName

    @property
    def name(self) -> str:
        """The function's."""
        return self.function.name


class NamedFunction(FunctionName):
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


def _choice_validator(kinds: Mapping[str, type[BaseModel]]) -> PlainValidator:
    """Reads a `tool_choice`: a word, or an object of one of the kinds."""

    def read(value: object) -> object:
        if value in ("none", "auto", "required"):
            return value
        kind = kinds.get(str(value.get("type"))) if isinstance(value, dict) else None
        if kind is None:
            raise ValueError(f"it must be none, auto, required, or an object of type {' or '.join(kinds)}")
        try:
            return kind.model_validate(value)
        except ValidationError as error:
            (first, *_) = error.errors()
            where = ".".join(map(str, first["loc"]))
            raise ValueError(f"{where}: {first['msg'].lower()}") from None

    return PlainValidator(read)


_Word = Literal["none", "auto", "required"]
ToolChoice = Annotated[
    _Word | NamedTool | AllowedToolsChoice,
    _choice_validator({"function": NamedTool, "allowed_tools": AllowedToolsChoice}),
]
FunctionChoice = Annotated[
    _Word | NamedFunction | AllowedTools[NamedFunction],
    _choice_validator(
        {
            **dict.fromkeys(("function", "custom", "local_shell"), NamedFunction),
            "allowed_tools": AllowedTools[NamedFunction],
        }
    ),
]
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


def function_tools(functions: Iterable[FunctionDefinition]) -> tuple[Tool, ...]:
    """Functions in no protocol's terms."""
    return tuple(
        Tool(each.name, each.description or "", each.parameters or {}, bool(each.strict)) for each in functions
    )


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


def call_objects(calls: Sequence[ToolCall]) -> list[dict[str, Any]]:
    """The calls of a message as OpenAI's clients read them, and send them again."""
    return [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in calls
    ]


def response_schema(kind: str, wanted: JSONSchemaFormat | None) -> Schema | None:
    """The schema that an answer must fit, or None for text; raises `InvalidRequestError` if it's missing."""
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    if wanted is None or wanted.schema_ is None:
        raise missing(RESPONSE_SCHEMA)
    return wanted.schema_
