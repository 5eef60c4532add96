"""The output of the Responses API: the items of an answer, whole and as a stream of events."""

import json
from collections.abc import Callable, Mapping
from itertools import count
from typing import Any

from slipstream.chat import AnswerDelta, ToolCall
from slipstream.server.custom_tools import InputReader
from slipstream.server.errors import OVERFLOW, Failure
from slipstream.server.responses_items import item_id
from slipstream.server.responses_tools import Item, Toolbox
from slipstream.turns import Choice

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


class EventWriter:
    """Writes the events of one stream, in the protocol's order.

    `response` is the response while it is in progress, `items` gives what the answer consists of so far, and `toolbox`
    knows the tools that it may call.

    One item is open at a time: it's closed when the next one begins.
    """

    def __init__(
        self, response: dict[str, Any], items: Callable[[], list[Item]] = list, toolbox: Toolbox | None = None
    ) -> None:
        self._response = response
        self._items = items
        self._toolbox = toolbox or Toolbox(())
        self._input = InputReader()
        """Of the call that is open."""
        self._numbers = count()
        self._place = -1
        self._open: Item | None = None

    def created(self) -> bytes:
        """The events before any output."""
        created = self._event("response.created", response=self._response)
        return created + self._event("response.in_progress", response=self._response)

    def alive(self, progress: dict[str, Any]) -> bytes:
        """A sign of life between other events."""
        return self._event("response.in_progress", response=self._response, **progress)

    def piece(self, delta: AnswerDelta) -> bytes:
        """The events of a piece of an answer, which may begin another item."""
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

    def end(self, response: dict[str, Any]) -> bytes:
        """The last events, with the finished response."""
        events = self._close()
        if self._place + 1 < len(response["output"]):  # a text that is empty
            events += self._begin("message") + self._close()
        return events + self._event(f"response.{response['status']}", response=response)

    def failed(self, failure: Failure) -> bytes:
        """The last event of a stream that breaks off."""
        code = "invalid_prompt" if failure.type == "invalid_request_error" else "server_error"
        if failure.code == OVERFLOW:
            code = OVERFLOW  # by which clients notice that they have to compact
        problem = {"code": code, "message": failure.message}
        return self._event("response.failed", response=self._response | {"status": "failed", "error": problem})

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
        item = self._items()[self._place]
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
        """An event, from a plain dictionary: between two steps of the model there is no time for more."""
        data = json.dumps({"type": kind, "sequence_number": next(self._numbers), **fields})
        return f"event: {kind}\ndata: {data}\n\n".encode()


def _part(kind: str, text: str) -> dict[str, Any]:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
