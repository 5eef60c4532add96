"""Blocks of Anthropic's messages that are text, or that a text stands for."""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from slipstream.chat import Tool
from slipstream.errors import InvalidRequestError
from slipstream.server.by_type import Unknown
from slipstream.server.errors import not_read, unreadable

# LiteLLM puts it where an answer has no text beside its calls; there was none.
_STAND_INS = frozenset({"[System: Empty message content sanitised to satisfy protocol]"})


class TextBlock(BaseModel):
    """A text; `cache_control` and `citations` are ignored."""

    type: Literal["text"]
    text: str

    @property
    def stands_in(self) -> bool:
        """Whether the client put it where a message has no text."""
        return self.text in _STAND_INS


class DocumentSource(BaseModel):
    """What a document is: text in `data`, blocks in `content`, or something that can't be read."""

    type: str | None = None
    media_type: str | None = None
    data: str | None = None
    content: str | list[dict[str, Any]] | None = None


class DocumentBlock(BaseModel):
    """A document."""

    type: Literal["document"]
    source: DocumentSource
    title: str | None = None
    context: str | None = None


class SearchResultBlock(BaseModel):
    """A result of a client's own search."""

    type: Literal["search_result"]
    source: str
    title: str
    content: list[TextBlock]


class ToolReferenceBlock(BaseModel):
    """A tool that the model may call from now on, one of those with `defer_loading`."""

    type: Literal["tool_reference"]
    tool_name: str


class ToolChange(BaseModel):
    """The tool that a message adds or removes."""

    model_config = ConfigDict(extra="allow")

    type: str
    name: str | None = None


class ToolChangeBlock(BaseModel):
    """A tool that is there from now on, or no longer."""

    type: Literal["tool_addition", "tool_removal"]
    tool: ToolChange


class CompactionBlock(BaseModel):
    """The summary of all before it, which the model doesn't read; without content it failed, and says nothing."""

    type: Literal["compaction"] = "compaction"
    content: Annotated[str, Field(min_length=1)] | None = None
    tool_changes: list[ToolChangeBlock] | None = None
    """What had become of the tools by then."""


Readable = TextBlock | DocumentBlock | SearchResultBlock | ToolReferenceBlock | ToolChangeBlock | Unknown


def block_text(block: Readable, param: str, tools: Mapping[str, Tool], *, in_result: bool = False) -> str:
    """The text of a block; raises `InvalidRequestError` naming the field if it has none.

    In a call's result a text stands for what can't be read. The client keeps it in its history, so a refusal would
    end the conversation for ever.
    """
    match block:
        case TextBlock():
            text = block.text
        case DocumentBlock() if (document := _document_text(block.source)) is not None:
            text = document and "\n".join(part for part in (block.title, block.context, document) if part)
        case SearchResultBlock():
            text = "\n".join((f"{block.title} ({block.source})", *(part.text for part in block.content)))
        case ToolReferenceBlock():
            text = _described(block.tool_name, f"{param}.tool_name", tools)
        case ToolChangeBlock(type="tool_addition"):
            text = _described(block.tool.name, f"{param}.tool.name", tools)
        case ToolChangeBlock():
            text = f"The tool {block.tool.name} is no longer available."
        case _ if in_result:
            source = getattr(block, "source", None)
            media_type = source.get("media_type") if isinstance(source, dict) else getattr(source, "media_type", None)
            text = not_read(str(media_type or block.type))
        case _:
            raise unreadable(param, block.type)
    return text


def _document_text(source: DocumentSource) -> str | None:
    if source.type == "text":
        return source.data
    if source.type == "content" and isinstance(source.content, str):
        return source.content
    if source.type == "content" and isinstance(source.content, list):
        texts: Sequence[Any] = [part.get("text") or not_read(str(part.get("type"))) for part in source.content]
        return "\n".join(map(str, texts))
    return None


def _described(name: str | None, param: str, tools: Mapping[str, Tool]) -> str:
    """A tool in words, where a message brings it up; one that was described before all messages, by its name."""
    tool = tools.get(name or "")
    if tool is None:
        raise InvalidRequestError(f"{param} is {name!r}, but tools has none of that name", param=param)
    if not tool.deferred:
        return f"The tool {name} is available."
    described = json.dumps(tool.as_dict()["function"], ensure_ascii=False)
    return f"The tool {name} is available from now on:\n{described}"
