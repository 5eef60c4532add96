"""Answers as Anthropic's clients read them: whole, and as events."""

import secrets
from collections.abc import Iterator
from typing import Any

from pydantic_core import from_json, to_json

from slipstream.chat import AnswerDelta
from slipstream.server.errors import Failure, anthropic_body
from slipstream.server.extension import report_of
from slipstream.server.stream import Answer, event
from slipstream.server.turn import LiveTurn
from slipstream.turns import Choice, Piece


class MessageAnswer(Answer):
    """A message with blocks of content. In a stream one block is open at a time: it's closed when the next begins."""

    def __init__(
        self, model: str, turn: LiveTurn, *, shows_thinking: bool, edits: list[dict[str, Any]] | None = None
    ) -> None:
        """`edits` are those that were made to the conversation, if the client asked for some."""
        super().__init__(turn)
        self._edits = {} if edits is None else {"context_management": {"applied_edits": edits}}
        self._shows_thinking = shows_thinking
        self._head = {"id": f"msg_{secrets.token_hex(12)}", "type": "message", "role": "assistant", "model": model}
        self._index = -1
        self._kind: str | None = None
        """The type of the block that is open."""

    async def whole(self) -> bytes:
        """The message, and what it cost."""
        (choice,) = self.turn.choices
        body = {"content": self._content(choice), **self._ending(choice), "usage": self._usage(choice)}
        return to_json(self._head | body | self._edits | {"slipstream": self._report()}, inf_nan_mode="null")

    def events(self, piece: Piece) -> Iterator[bytes]:
        """The message without content first, and then the pieces of its blocks."""
        if piece.output is piece.choice.outputs[0]:
            yield self._start(piece.choice)
        for delta in piece.deltas:
            yield self._piece(delta)

    async def end(self) -> bytes:
        """Why the message ends, and what it cost."""
        (choice,) = self.turn.choices
        closed, report = self._close(), self._report()
        delta, usage = self._ending(choice), self._usage(choice)
        ending = _event("message_delta", delta=delta, usage=usage, **self._edits, slipstream=report)
        return closed + ending + _event("message_stop")

    def alive(self) -> bytes:
        """A ping."""
        return _event("ping", **self.progress())

    def failed(self, failure: Failure) -> bytes:
        """The last event of a stream that breaks off."""
        return b"event: error\ndata: " + anthropic_body(failure) + b"\n\n"

    def _content(self, choice: Choice) -> list[dict[str, Any]]:
        content: list[dict[str, Any]] = []
        message = choice.reader.message
        if thought := choice.reader.reasoning:
            content.append({"type": "thinking", "thinking": thought if self._shows_thinking else "", "signature": ""})
        if message.text:
            content.append({"type": "text", "text": message.text})
        for call in message.tool_calls:
            # Arguments that were cut short are read as far as they go, as the official client does with a stream's.
            arguments = from_json(call.arguments or "{}", allow_partial=True)
            content.append({"type": "tool_use", "id": call.id, "name": call.name, "input": arguments})
        return content

    def _ending(self, choice: Choice) -> dict[str, str | None]:
        if not choice.request.answers:
            return {"stop_reason": "max_tokens", "stop_sequence": None}
        last = choice.outputs[-1]
        reason = "tool_use" if choice.reader.calls_to_run else "end_turn"
        if last.stop_string is not None:
            reason = "stop_sequence"
        elif last.finish_reason == "length":
            reason = "max_tokens"
        return {"stop_reason": reason, "stop_sequence": last.stop_string}

    def _usage(self, choice: Choice) -> dict[str, Any]:
        return usage_of(choice)

    def _report(self) -> dict[str, Any]:
        return report_of(self.turn)

    def _start(self, choice: Choice) -> bytes:
        """The message without content, and what its prompt cost."""
        usage = usage_of(choice) | {"output_tokens": 0}
        empty: dict[str, Any] = {"content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
        return _event("message_start", message=self._head | empty) + _event("ping")

    def _piece(self, piece: AnswerDelta) -> bytes:
        """A piece of a block, which is opened if it's the first."""
        if piece.id is not None:
            return self._open({"type": "tool_use", "id": piece.id, "name": piece.name, "input": {}})
        if piece.arguments:
            return self._delta({"type": "input_json_delta", "partial_json": piece.arguments})
        if piece.text:
            opening = b"" if self._kind == "text" else self._open({"type": "text", "text": ""})
            return opening + self._delta({"type": "text_delta", "text": piece.text})
        thinking = {"type": "thinking", "thinking": "", "signature": ""}
        opening = b"" if self._kind == "thinking" else self._open(thinking)
        if not self._shows_thinking:
            return opening
        return opening + self._delta({"type": "thinking_delta", "thinking": piece.reasoning})

    def _open(self, block: dict[str, Any]) -> bytes:
        closing = self._close()
        self._index += 1
        self._kind = block["type"]
        return closing + _event("content_block_start", index=self._index, content_block=block)

    def _close(self) -> bytes:
        return b"" if self._kind is None else _event("content_block_stop", index=self._index)

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _event("content_block_delta", index=self._index, delta=delta)


def _event(kind: str, **fields: Any) -> bytes:
    return event({"type": kind, **fields}, kind)


def usage_of(choice: Choice) -> dict[str, int]:
    """The tokens of a turn; clients add up the first three for those of the prompt.

    What was computed is kept, so it counts as written to the cache, unless the request keeps nothing.
    """
    kept, counters = choice.request.reuse, choice.counters
    return {
        "input_tokens": 0 if kept else counters.delta_tokens,
        "cache_read_input_tokens": counters.reused_tokens,
        "cache_creation_input_tokens": counters.delta_tokens if kept else 0,
        "output_tokens": counters.completion_tokens if choice.request.answers else 0,
    }
