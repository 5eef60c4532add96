"""System prompts and messages as Anthropic's clients send them, and what they mean."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator

from slipstream.chat import Message, Tool, ToolCall
from slipstream.server.anthropic_blocks import CompactionBlock, Readable, TextBlock, block_text
from slipstream.server.by_type import ByType
from slipstream.server.compaction import introduced
from slipstream.server.errors import unsupported

# Claude Code begins the system prompt with a line for Anthropic's accounts. It differs from request to request, so that
# nothing after it would ever be found again.
_BILLING_LINE = re.compile(r"\Ax-anthropic-billing-header:[^\n]*\n?")


class ToolUseBlock(BaseModel):
    """A call in an assistant's message."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class ThinkingBlock(BaseModel):
    """Reasoning of an earlier answer, for chat templates that want it."""

    type: Literal["thinking", "redacted_thinking"]
    thinking: str = ""


def _as_blocks(content: object) -> object:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


TextContent = Annotated[list[Annotated[Readable, ByType()]], BeforeValidator(_as_blocks)]
"""Where nothing but text is read: the system prompt, and the result of a call."""


class ToolResultBlock(BaseModel):
    """What a call brought, in a user's message."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: TextContent | None = None
    is_error: bool | None = None


Block = ToolUseBlock | ToolResultBlock | ThinkingBlock | CompactionBlock | Readable


class InputMessage(BaseModel):
    """A message of a conversation."""

    role: Literal["user", "assistant", "system"]
    content: Annotated[list[Annotated[Block, ByType()]], BeforeValidator(_as_blocks)]


def conversation(
    system: Sequence[Readable] | None,
    messages: Sequence[InputMessage],
    tools: Iterable[Tool] = (),
    *,
    may_be_answered: bool = False,
) -> tuple[Message, ...]:
    """The conversation in no protocol's terms; `tools` are those that messages may bring up.

    It waits for an answer, or `may_be_answered`.

    What one side says in several blocks, or messages in a row, is one message: an assistant's text as it was cut, any
    other with line ends between. Results of calls are messages of their own. Raises `InvalidRequestError` naming the
    field.
    """
    known = {tool.name: tool for tool in tools}
    parts = []
    if instructions := _BILLING_LINE.sub("", _text(system or (), "system", known)):
        parts.append(Message("system", instructions))
    for index, message in enumerate(messages):
        parts += _parts(message, f"messages[{index}]", known)
    if parts and parts[-1].role == "assistant" and not may_be_answered:
        param = f"messages[{len(messages) - 1}]"
        raise unsupported(param, "is the assistant's, but answers can't be begun for it: end with a user's message")
    joined: list[Message] = []
    for role, group in groupby(parts, lambda part: part.role):
        together = tuple(group)
        joined += together if role == "tool" or len(together) == 1 else (_joined(role, together),)
    return tuple(joined)


def since_compaction(messages: Sequence[InputMessage]) -> list[InputMessage]:
    """The messages from the last summary on. Those before it are left without content, so that each keeps its index."""
    for at, message in reversed(list(enumerate(messages))):
        for place, block in reversed(list(enumerate(message.content))):
            if isinstance(block, CompactionBlock) and block.content is not None:
                rest = message.model_copy(update={"content": message.content[place:]})
                return [*[InputMessage(role="user", content=[])] * at, rest, *messages[at + 1 :]]
    return list(messages)


def _joined(role: str, parts: Sequence[Message]) -> Message:
    between = "" if role == "assistant" else "\n"
    calls = tuple(call for part in parts for call in part.tool_calls)
    reasoning = "".join(part.reasoning for part in parts)
    return Message(role, between.join(part.text for part in parts), calls, reasoning=reasoning)


def _parts(message: InputMessage, param: str, tools: Mapping[str, Tool]) -> Iterator[Message]:
    """A message for each block that says something."""
    calls = any(isinstance(block, ToolUseBlock) for block in message.content)
    compacted = any(isinstance(block, CompactionBlock) for block in message.content)
    if message.role == "assistant" and not compacted:
        yield Message("assistant")  # also when it has no blocks: so may an answer be
    for index, block in enumerate(message.content):
        if isinstance(block, CompactionBlock):
            yield from _summary(block, f"{param}.content[{index}]", tools)
        elif not (calls and isinstance(block, TextBlock) and block.stands_in):
            yield _part(message.role, block, f"{param}.content[{index}]", tools)


def _text(blocks: Sequence[Readable], param: str, tools: Mapping[str, Tool], *, in_result: bool = False) -> str:
    places = enumerate(blocks)
    return "\n".join(block_text(block, f"{param}[{index}]", tools, in_result=in_result) for index, block in places)


def _summary(block: CompactionBlock, param: str, tools: Mapping[str, Tool]) -> Iterator[Message]:
    """The user's, whoever sends it: the assistant goes on from there."""
    if block.content is not None:
        changes = _text(block.tool_changes or (), f"{param}.tool_changes", tools)
        yield Message("user", "\n".join(filter(None, (introduced(block.content), changes))))


def _part(
    role: str, block: Readable | ToolUseBlock | ToolResultBlock | ThinkingBlock, param: str, tools: Mapping[str, Tool]
) -> Message:
    match role, block:
        case "assistant", ThinkingBlock():
            return Message("assistant", reasoning=block.thinking)
        case "assistant", ToolUseBlock():
            call = ToolCall(block.id, block.name, json.dumps(block.input, ensure_ascii=False))
            return Message("assistant", tool_calls=(call,))
        case "user", ToolResultBlock():
            result = _text(block.content or (), f"{param}.content", tools, in_result=True)
            said = f"Error: {result}" if block.is_error else result
            return Message("tool", said, tool_call_id=block.tool_use_id)
    if isinstance(block, ToolUseBlock | ToolResultBlock | ThinkingBlock):
        raise unsupported(param, f"is of type {block.type!r}, which no {role}'s message can hold")
    return Message(role, block_text(block, param, tools))
