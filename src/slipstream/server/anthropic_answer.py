"""Answers as Anthropic's clients read them: whole, and as events."""

import json
import secrets
from typing import Literal, TypedDict

from pydantic import BaseModel
from pydantic_core import from_json

from slipstream.chat import AnswerDelta
from slipstream.engine import TurnCounters
from slipstream.server import anthropic_types as types
from slipstream.server.extension import TurnReport
from slipstream.server.turn import LiveTurn
from slipstream.turns import Choice

_PING = b'event: ping\ndata: {"type":"ping"}\n\n'

# Written without an object: between two steps of the model that takes the server a tenth of the time.
_DELTA = (
    b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,"delta":{"type":"%b","%b":%b}}\n\n'
)


class Head(TypedDict):
    """The fields that are known before there is an answer."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str


def new_head(model: str) -> Head:
    """The head of a new response."""
    return {"id": f"msg_{secrets.token_hex(12)}", "type": "message", "role": "assistant", "model": model}


def whole_message(head: Head, turn: LiveTurn) -> types.Message:
    """The response to a finished turn."""
    (choice,) = turn.choices
    return types.Message(
        **head,
        content=_content(choice),
        stop_reason=_stop_reason(choice),
        stop_sequence=choice.outputs[-1].stop_string,
        usage=types.Usage(**_usage(choice.counters)),
        slipstream=TurnReport.of(turn),
    )


def _content(choice: Choice) -> list[types.ContentBlock]:
    content: list[types.ContentBlock] = []
    message = choice.message
    if choice.reader.reasoning:
        content.append(types.ThinkingBlock(type="thinking", thinking=choice.reader.reasoning, signature=""))
    if message.text:
        content.append(types.TextBlock(type="text", text=message.text))
    for call in message.tool_calls:
        # Arguments that were cut short are read as far as they go, as the official client does with those of a stream.
        arguments = from_json(call.arguments or "{}", allow_partial=True)
        content.append(types.ToolUseBlock(type="tool_use", id=call.id, name=call.name, input=arguments))
    return content


def _stop_reason(choice: Choice) -> types.StopReason:
    last = choice.outputs[-1]
    if last.stop_string is not None:
        return "stop_sequence"
    if last.finish_reason == "length":
        return "max_tokens"
    return "tool_use" if choice.reader.calls_to_run else "end_turn"


class _Usage(TypedDict):
    input_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int
    output_tokens: int


def _usage(counters: TurnCounters) -> _Usage:
    """What was read from memory is not among the input tokens; nothing is charged for keeping the rest."""
    return {
        "input_tokens": counters.delta_tokens,
        "cache_read_input_tokens": counters.reused_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": counters.completion_tokens,
    }


class EventWriter:
    """Writes the events of one stream."""

    def __init__(self, head: Head) -> None:
        self._head = head
        self._index = -1
        self._kind = ""
        """The type of the block that is open."""

    def message_start(self, choice: Choice) -> bytes:
        """The message without content, and what its prompt cost."""
        counters = choice.counters if choice.active is None else choice.active.counters
        usage = types.Usage(**_usage(counters))
        usage.output_tokens = 0
        message = types.Message(**self._head, content=[], stop_reason=None, stop_sequence=None, usage=usage)
        return _event("message_start", types.MessageStart(type="message_start", message=message)) + _PING

    def piece(self, piece: AnswerDelta) -> bytes:
        """A piece of a block, which is opened if it's the first."""
        if piece.id is not None:
            block = types.ToolUseBlock(type="tool_use", id=piece.id, name=piece.name or "", input={})
            return self._open(block)
        if piece.arguments:
            return self._delta(b"input_json_delta", b"partial_json", piece.arguments)
        if piece.text:
            opening = b"" if self._kind == "text" else self._open(types.TextBlock(type="text", text=""))
            return opening + self._delta(b"text_delta", b"text", piece.text)
        thinking = types.ThinkingBlock(type="thinking", thinking="", signature="")
        opening = b"" if self._kind == "thinking" else self._open(thinking)
        return opening + self._delta(b"thinking_delta", b"thinking", piece.reasoning)

    def end(self, turn: LiveTurn) -> bytes:
        """The end of a finished turn: why, and what it cost."""
        (choice,) = turn.choices
        delta = types.Ending(stop_reason=_stop_reason(choice), stop_sequence=choice.outputs[-1].stop_string)
        usage = types.Usage(**_usage(choice.counters))
        ending = types.MessageDelta(type="message_delta", delta=delta, usage=usage, slipstream=TurnReport.of(turn))
        stop = types.MessageStop(type="message_stop")
        return self._close() + _event("message_delta", ending) + _event("message_stop", stop)

    def _open(self, block: types.ContentBlock) -> bytes:
        closing = self._close()
        self._index += 1
        self._kind = block.type
        start = types.BlockStart(type="content_block_start", index=self._index, content_block=block)
        return closing + _event("content_block_start", start)

    def _close(self) -> bytes:
        if not self._kind:
            return b""
        stop = types.BlockStop(type="content_block_stop", index=self._index)
        return _event("content_block_stop", stop)

    def _delta(self, kind: bytes, field: bytes, text: str) -> bytes:
        return _DELTA % (self._index, kind, field, json.dumps(text).encode())


def _event(name: str, event: BaseModel) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), event.model_dump_json(exclude_unset=True).encode())
