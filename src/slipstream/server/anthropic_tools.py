"""Tools and the form of answers as Anthropic's clients ask for them, and what they mean."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field

from slipstream.chat import NO_TOOLS, Schema, Tool, ToolUse
from slipstream.server.errors import missing

_MODES: dict[str, Literal["none", "auto", "required"]] = {
    "none": "none",
    "auto": "auto",
    "any": "required",
    "tool": "required",
}


def _custom(kind: str | None) -> str | None:
    if kind not in (None, "custom"):
        raise ValueError("it must be 'custom', a tool that is described by its input_schema and run by the client")
    return kind


def _of_object(schema: dict[str, Any]) -> dict[str, Any]:
    if schema.get("type") != "object":
        raise ValueError("its type must be 'object'")
    return schema


class ToolDefinition(BaseModel):
    """A tool that the client runs. `strict` changes nothing: every call fits its schema."""

    type: Annotated[str | None, AfterValidator(_custom)] = None  # first, for tools of other types lack the rest
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,128}$")]
    description: str | None = None
    input_schema: Annotated[dict[str, Any], AfterValidator(_of_object)]


class ToolChoice(BaseModel):
    """`tool_choice`."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class OutputFormat(BaseModel):
    """What an answer must fit."""

    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(BaseModel):
    """`output_config`."""

    effort: str | None = None
    format: OutputFormat | None = None


def tool_use(tools: Sequence[ToolDefinition] | None, choice: ToolChoice | None) -> ToolUse:
    """The tools and how they may be used, in no protocol's terms; raises `InvalidRequestError` naming the field.

    A tool that is named by the choice is called once.
    """
    known = tuple(Tool(tool.name, tool.description or "", tool.input_schema) for tool in tools or ())
    if choice is None:
        return ToolUse(known) if known else NO_TOOLS
    named = choice.type == "tool"
    if named and choice.name is None:
        raise missing("tool_choice.name")
    return ToolUse(
        known,
        _MODES[choice.type],
        frozenset({choice.name or ""}) if named else None,
        parallel=not (named or choice.disable_parallel_tool_use),
    )


def response_schema(config: OutputConfig | None, output_format: OutputFormat | None) -> Schema | None:
    """The schema that an answer must fit, from `output_config` or, as older clients send it, `output_format`."""
    wanted = (config and config.format) or output_format
    return wanted.schema_ if wanted is not None else None
