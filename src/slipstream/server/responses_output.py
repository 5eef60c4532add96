"""The output of the Responses API: the items of an answer, whole and as a stream of events."""

import asyncio
import json
import logging
import secrets
import sqlite3
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from typing import Any

from fastapi import Response

from slipstream.chat import AnswerDelta, ToolCall
from slipstream.engine import SamplingParams
from slipstream.server.custom_tools import InputReader
from slipstream.server.errors import OVERFLOW, Failure
from slipstream.server.extension import report_of
from slipstream.server.responses_compaction import response_usage
from slipstream.server.responses_items import InputItem, item_id, listed
from slipstream.server.responses_request import ResponseRequest
from slipstream.server.responses_tools import Item, Toolbox
from slipstream.server.stream import Answer
from slipstream.server.turn import LiveTurn
from slipstream.sessions import StoredResponse
from slipstream.turns import Choice, Piece

logger = logging.getLogger(__name__)

_TEXT_EVENTS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "message": ("response.output_text", {"logprobs": []}),
    "reasoning": ("response.reasoning_text", {}),
}
"""By the type of an item: what the events of its text are called, and what they have besides."""

_INPUT_EVENTS = {
    "function_call": ("response.function_call_arguments", "arguments"),
    "custom_tool_call": ("response.custom_tool_call_input", "input"),
}
"""By the type of a call: what the events of its arguments are called, and the field that holds them."""


def output_items(choice: Choice, response_id: str, toolbox: Toolbox) -> list[Item]:
    """What an answer consists of so far: reasoning, text, calls. An answer that says nothing is an empty text.

    What is not there yet comes after what is, so an item's place does not change.
    """
    message = choice.reader.message
    items: list[Item] = []
    if reasoning := choice.reader.reasoning:
        items.append({"type": "reasoning", "summary": [], "content": [_part("reasoning", reasoning)]})
    if message.text or not message.tool_calls:
        items.append({"type": "message", "role": "assistant", "content": [_part("message", message.text)]})
    items += map(toolbox.call_item, message.tool_calls)
    items = [
        {"id": item_id(response_id, item["type"], place), **item, "status": "completed"}
        for place, item in enumerate(items)
    ]
    cut = choice.outputs[-1].finish_reason == "length"
    if not choice.reader.calls_to_run if message.tool_calls else cut:
        items[-1]["status"] = "incomplete"
    return items


def cut_short(choice: Choice) -> dict[str, Any] | None:
    """Why a finished answer is not all there, as the protocol puts it; None if it is. A stop string has no word."""
    if choice.answer.finish_reason == "length":
        return {"reason": "max_output_tokens"}
    return {"reason": None} if choice.reader.message.tool_calls and not choice.reader.calls_to_run else None


class ResponseAnswer(Answer):
    """A response object, which is stored once it's finished unless the request says otherwise.

    In a stream one item is open at a time: it's closed when the next one begins.
    """

    def __init__(self, turn: LiveTurn, body: ResponseRequest, items: Sequence[InputItem], head: dict[str, Any]) -> None:
        """`items` are those of the input, `head` is the response while it's in progress."""
        super().__init__(turn)
        (self._choice,) = turn.choices
        self._items = items
        self._kept = body.store is not False
        self._response = head
        self._toolbox = body.toolbox
        self._input = InputReader()
        """Of the call that is open."""
        self._numbers = count()
        self._place = -1
        self._open: Item | None = None

    async def whole(self) -> bytes:
        """The response."""
        return json.dumps(await self._completed()).encode()

    def begin(self) -> bytes:
        """The events before any output."""
        created = self._event("response.created", response=self._response)
        return created + self._event("response.in_progress", response=self._response)

    def events(self, piece: Piece) -> Iterable[bytes]:
        """The events of a piece of the answer, which may begin another item."""
        return map(self._said, piece.deltas)

    async def end(self) -> bytes:
        """The last events, with the response."""
        response = await self._completed()
        events = self._close()
        if self._place + 1 < len(response["output"]):  # a text that is empty
            events += self._begin("message") + self._close()
        return events + self._event(f"response.{response['status']}", response=response)

    def alive(self) -> bytes:
        """That the response is in progress, once more: Codex counts events, comments it doesn't see."""
        return self._event("response.in_progress", response=self._response, **self.progress())

    def failed(self, failure: Failure) -> bytes:
        """The last event of a stream that breaks off."""
        return self._event("response.failed", response=_failed(self._response, failure))

    async def _completed(self) -> dict[str, Any]:
        """The response of a finished turn, which decides these fields."""
        choice, report = self._choice, report_of(self.turn)
        cut = cut_short(choice)
        reasoning = self.turn.runner.runtime.tokenizer.encode(choice.reader.reasoning)
        response = self._response | {
            "status": "incomplete" if cut else "completed",
            "completed_at": None if cut else int(time.time()),
            "incomplete_details": cut,
            "output": output_items(choice, self._response["id"], self._toolbox),
            "usage": response_usage(report, kept=choice.request.reuse, reasoning=len(reasoning)),
            "slipstream": report,
        }
        if self._kept:
            await asyncio.to_thread(self._store, response)
        return response

    def _store(self, response: dict[str, Any]) -> None:
        session_turn, runner = self._choice.session_turn, self.turn.runner
        assert session_turn is not None
        assert session_turn.history is not None
        items = json.dumps(listed(self._items, response["id"]))
        unsaid = int(self._choice.request.system is not None)
        stored = StoredResponse(json.dumps(response), items, session_turn.history, unsaid)
        most = runner.config.limits.max_stored_responses
        try:
            runner.runtime.database.save_response(session_turn.tenant, response["id"], stored, max_bytes=most)
        except sqlite3.Error as error:  # such as a full disk: it costs nobody an answer
            logger.warning("response %s can't be kept: %s", response["id"], error)

    def _said(self, delta: AnswerDelta) -> bytes:
        kind = "message" if delta.text else "reasoning" if delta.reasoning else "call"
        begun = b""
        if delta.id is not None:
            self._input = InputReader()
            call = ToolCall(delta.id, delta.name or "", "")
            begun = self._close() + self._added(self._toolbox.call_item(call))
        elif kind != "call" and (self._open is None or self._open["type"] != kind):
            begun = self._close() + self._begin(kind)
        if kind == "call":
            return begun + self._call_piece(delta.arguments)
        name, rest = _TEXT_EVENTS[kind]
        return begun + self._part_event(f"{name}.delta", delta=delta.text or delta.reasoning, **rest)

    def _call_piece(self, arguments: str) -> bytes:
        """The event of a piece of a call's arguments, if its type has one and it says something."""
        assert self._open is not None
        name, _ = _INPUT_EVENTS.get(self._open["type"], (None, None))
        if self._open["type"] == "custom_tool_call":
            arguments = self._input.feed(arguments)
        return self._item_event(f"{name}.delta", delta=arguments) if name and arguments else b""

    def _begin(self, kind: str) -> bytes:
        begun: Item = {"role": "assistant", "content": []} if kind == "message" else {"summary": [], "content": []}
        added = self._added({"type": kind, **begun})
        return added + self._part_event("response.content_part.added", part=_part(kind, ""))

    def _added(self, item: Item) -> bytes:
        self._place += 1
        id = item_id(self._response["id"], item["type"], self._place)
        self._open = {"id": id, "type": item["type"], "status": "in_progress"}
        return self._event("response.output_item.added", output_index=self._place, item=self._open | item)

    def _close(self) -> bytes:
        if self._open is None:
            return b""
        item = output_items(self._choice, self._response["id"], self._toolbox)[self._place]
        kind, done = item["type"], b""
        if kind in _INPUT_EVENTS:
            name, field = _INPUT_EVENTS[kind]
            done = self._item_event(f"{name}.done", **{"name": item["name"], field: item[field]})
        elif kind in _TEXT_EVENTS:
            (part,) = item["content"]
            name, rest = _TEXT_EVENTS[kind]
            done = self._part_event(f"{name}.done", text=part["text"], **rest)
            done += self._part_event("response.content_part.done", part=part)
        self._open = None
        return done + self._event("response.output_item.done", output_index=self._place, item=item)

    def _part_event(self, kind: str, **fields: Any) -> bytes:
        return self._item_event(kind, content_index=0, **fields)

    def _item_event(self, kind: str, **fields: Any) -> bytes:
        assert self._open is not None
        return self._event(kind, output_index=self._place, item_id=self._open["id"], **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        return _event(next(self._numbers), kind, **fields)


def refused_stream(head: dict[str, Any], failure: Failure) -> Response:
    """The events of a response whose prompt is too long: Codex compacts the conversation by them, not by a status."""
    states = (("created", head), ("in_progress", head), ("failed", _failed(head, failure)))
    events = (_event(number, f"response.{kind}", response=state) for number, (kind, state) in enumerate(states))
    return Response(b"".join(events), media_type="text/event-stream")


def head_of(params: SamplingParams, body: ResponseRequest, model: str) -> dict[str, Any]:
    """A response before there is anything in it."""
    return {
        "id": f"resp_{secrets.token_hex(12)}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "completed_at": None,
        "background": False,
        "error": None,
        "incomplete_details": None,
        "model": model,
        "output": [],
        "service_tier": body.service_tier if body.service_tier in ("flex", "priority") else "default",
        "truncation": "disabled",
        "usage": None,
        "temperature": params.temperature,
        "top_p": params.top_p,
        **body.echo(),
    }


def _failed(response: dict[str, Any], failure: Failure) -> dict[str, Any]:
    """A response that breaks off."""
    code = "invalid_prompt" if failure.type == "invalid_request_error" else "server_error"
    if failure.code == OVERFLOW:
        code = OVERFLOW  # by which clients notice that they have to compact
    return response | {"status": "failed", "error": {"code": code, "message": failure.message}}


def _event(number: int, kind: str, **fields: Any) -> bytes:
    # A response repeats the request's schemas, which may be deeper than `stream.event` writes.
    data = json.dumps({"type": kind, "sequence_number": number, **fields})
    return f"event: {kind}\ndata: {data}\n\n".encode()


def _part(kind: str, text: str) -> dict[str, Any]:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
