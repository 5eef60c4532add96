"""What Anthropic's endpoints answer with, as far as this server fills it in.

The official package has all of it, and takes three seconds to import; tests hold these to its types.
"""

from typing import Any, Literal

from pydantic import BaseModel

from slipstream.server.extension import TurnReport

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class TextBlock(BaseModel):
    """Text of an answer."""

    type: Literal["text"]
    text: str


class ThinkingBlock(BaseModel):
    """What the model thought before it."""

    type: Literal["thinking"]
    thinking: str
    signature: str


class ToolUseBlock(BaseModel):
    """A call of a tool."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: Any


ContentBlock = TextBlock | ThinkingBlock | ToolUseBlock


class Usage(BaseModel):
    """What a message cost, in tokens: what was read from memory is not among the input."""

    input_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int
    output_tokens: int


class Message(BaseModel):
    """An answer; without `slipstream` it's the one that begins a stream."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[ContentBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: Usage
    slipstream: TurnReport | None = None


class MessageStart(BaseModel):
    """The first event of a stream."""

    type: Literal["message_start"]
    message: Message


class BlockStart(BaseModel):
    """A block begins."""

    type: Literal["content_block_start"]
    index: int
    content_block: ContentBlock


class BlockStop(BaseModel):
    """A block ends."""

    type: Literal["content_block_stop"]
    index: int


class Ending(BaseModel):
    """How an answer ended."""

    stop_reason: StopReason | None
    stop_sequence: str | None


class MessageDelta(BaseModel):
    """The last event but one of a stream, with what the turn cost."""

    type: Literal["message_delta"]
    delta: Ending
    usage: Usage
    slipstream: TurnReport


class MessageStop(BaseModel):
    """The last event of a stream."""

    type: Literal["message_stop"]


class TokenCount(BaseModel):
    """How many tokens a prompt has."""

    input_tokens: int
