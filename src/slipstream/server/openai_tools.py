"""Tools and response formats as OpenAI's clients ask for them, and what they mean."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, PlainValidator, ValidationError

from slipstream.chat import Schema, Tool, ToolCall, ToolUse
from slipstream.fields import RESPONSE_SCHEMA
from slipstream.server.errors import missing

_NAME = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[^\x00-\x1f\"\\<>]+$")]


class FunctionDefinition(BaseModel):
    """A function that may be called. `strict` changes nothing: every call fits its schema."""

    name: _NAME
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


class AllowedTools(BaseModel):
    """Some of the tools, of which the answer may or must call one."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1)]


class AllowedToolsChoice(BaseModel):
    """`tool_choice` for some of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


def choice_validator(kinds: Mapping[str, type[BaseModel]]) -> PlainValidator:
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


ToolChoice = Annotated[
    Literal["none", "auto", "required"] | NamedTool | AllowedToolsChoice,
    choice_validator({"function": NamedTool, "allowed_tools": AllowedToolsChoice}),
]


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


def tool_use(tools: Sequence[ToolDefinition] | None, choice: ToolChoice | None, *, parallel: bool) -> ToolUse:
    """The tools and how they may be used, in no protocol's terms; raises `InvalidRequestError` naming the field."""
    known = tuple(
        Tool(tool.function.name, tool.function.description or "", tool.function.parameters or {})
        for tool in tools or ()
    )
    match choice:
        case NamedTool():
            return ToolUse(known, "required", frozenset({choice.function.name}), parallel=False)
        case AllowedToolsChoice(allowed_tools=allowed):
            names = frozenset(tool.function.name for tool in allowed.tools)
            return ToolUse(known, allowed.mode, names, parallel)
        case _:
            return ToolUse(known, choice or "auto", None, parallel)


def call_objects(calls: Sequence[ToolCall]) -> list[dict[str, Any]]:
    """The calls of a message as OpenAI's clients read them, and send them again."""
    return [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in calls
    ]


def response_schema(wanted: ResponseFormat | None) -> Schema | None:
    """The schema that an answer must fit, or None for text; raises `InvalidRequestError` if it's missing."""
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return {"type": "object"}
    if wanted.json_schema is None or wanted.json_schema.schema_ is None:
        raise missing(RESPONSE_SCHEMA)
    return wanted.json_schema.schema_
