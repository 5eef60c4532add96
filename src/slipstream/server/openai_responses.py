"""OpenAI's Responses API: `/v1/responses`."""

import json
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response

from slipstream.chat import Message
from slipstream.embedded import Engine
from slipstream.errors import InvalidRequestError
from slipstream.server.errors import unsupported
from slipstream.server.extension import SESSION_HEADER, TurnReport, in_session
from slipstream.server.responses_items import (
    InputItem,
    Item,
    item_messages,
    listed,
    resolved,
    response_of,
    stored_item,
)
from slipstream.server.responses_output import EventWriter, cut_short, output_items
from slipstream.server.responses_request import ResponseRequest
from slipstream.server.responses_store import ResponseStore, StoredResponse
from slipstream.server.stream import EventStream, finish
from slipstream.server.turn import TENANT, Turn, TurnRunner


def router(runner: TurnRunner) -> APIRouter:
    """The routes of this protocol."""
    routes = APIRouter()
    engine = runner.engine
    store = ResponseStore(engine.database)

    @routes.post("/v1/responses")
    async def create_response(http: Request, body: ResponseRequest) -> Response:
        exchange = _Exchange.of(body, store, in_session=SESSION_HEADER in http.headers)
        request = in_session(body.turn(engine, exchange.messages), http)
        turn = await runner.start([request])
        params = {"temperature": request.params.temperature, "top_p": request.params.top_p}
        response = _in_progress(engine, exchange.id) | params | body.echo()

        def completed() -> dict[str, Any]:
            whole = response | _outcome(engine, turn, exchange.id)
            if body.store is not False:
                store.put(TENANT, exchange.record(whole, turn))
            return whole

        if body.stream:
            writer = EventWriter(response, turn.choices[0])
            return EventStream(turn, _stream(turn, writer, completed), writer.failed)
        await finish(http, turn)
        return _json(completed())

    @routes.get("/v1/responses/{response_id}")
    async def retrieve_response(response_id: str, *, stream: bool = False) -> Response:
        if stream:
            raise unsupported("stream", "is not supported: the events of a stored response are not kept; leave it out")
        return _json_text(_stored(store, response_id).response)

    @routes.delete("/v1/responses/{response_id}")
    async def delete_response(response_id: str) -> Response:
        if not store.delete(TENANT, response_id):
            raise _not_found(response_id)
        return _json({"id": response_id, "object": "response", "deleted": True})

    @routes.get("/v1/responses/{response_id}/input_items")
    async def list_input_items(
        response_id: str,
        order: Literal["asc", "desc"] = "desc",
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
    ) -> Response:
        items: list[Item] = json.loads(_stored(store, response_id).input_items)
        if order == "desc":
            items.reverse()
        return _json(_page(items, after, limit))

    return routes


@dataclass(frozen=True, slots=True, kw_only=True)
class _Exchange:
    """What a request brings and goes on from."""

    id: str
    """The id that its response gets."""
    items: list[InputItem]
    messages: tuple[Message, ...]
    """The conversation without instructions, or where a session holds what came before, what is new."""

    @classmethod
    def of(cls, body: ResponseRequest, store: ResponseStore, *, in_session: bool) -> "_Exchange":
        """What `body` brings, for a session that the body or something else names.

        Raises `InvalidRequestError` naming the field.
        """
        body.check()
        earlier = _earlier(store, body.previous_response_id)
        items = resolved(body.input, lambda item_id: _stored_item(store, item_id))
        in_session = in_session or body.conversation is not None or body.switches()["session_id"] is not None
        calls = None if in_session else [call.id for message in earlier for call in message.tool_calls]
        return cls(
            id=f"resp_{secrets.token_hex(12)}",
            items=items,
            messages=(*earlier, *item_messages(items, "input", calls)),
        )

    def record(self, response: dict[str, Any], turn: Turn) -> StoredResponse:
        """What is kept of it and its response."""
        (choice,) = turn.choices
        assert choice.session_turn is not None
        asked = choice.session_turn.messages[choice.request.system is not None :]
        return StoredResponse(
            id=self.id,
            response=json.dumps(response),
            input_items=json.dumps(listed(self.items, self.id)),
            messages=(*asked, choice.message),
        )


def _in_progress(engine: Engine, response_id: str) -> dict[str, Any]:
    """The fields of a response object that the request does not decide, as long as there is no answer."""
    return {
        "id": response_id,
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "completed_at": None,
        "background": False,
        "error": None,
        "incomplete_details": None,
        "model": engine.model.name,
        "output": [],
        "service_tier": "default",
        "truncation": "disabled",
        "usage": None,
    }


def _outcome(engine: Engine, turn: Turn, response_id: str) -> dict[str, Any]:
    """The fields that a finished turn decides."""
    (choice,) = turn.choices
    report = TurnReport.of(turn)
    cut = cut_short(choice)
    return {
        "status": "incomplete" if cut else "completed",
        "completed_at": None if cut else int(time.time()),
        "incomplete_details": cut,
        "output": output_items(choice, response_id),
        "usage": {
            "input_tokens": report.prompt_tokens,
            "input_tokens_details": {
                "cached_tokens": report.reused_tokens,
                "cache_write_tokens": report.delta_tokens,
            },
            "output_tokens": report.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": len(engine.tokenizer.encode(choice.reader.reasoning))},
            "total_tokens": report.prompt_tokens + report.completion_tokens,
        },
        "slipstream": report.model_dump(),
    }


async def _stream(turn: Turn, writer: EventWriter, completed: Callable[[], dict[str, Any]]) -> AsyncIterator[bytes]:
    yield writer.begin()
    async for batch in turn.batches():
        if events := [writer.piece(delta) for arrival in batch for delta in arrival.deltas]:
            yield b"".join(events)
    yield writer.end(completed())


def _earlier(store: ResponseStore, response_id: str | None) -> tuple[Message, ...]:
    """The conversation up to the response that a request goes on from."""
    if response_id is None:
        return ()
    record = store.get(TENANT, response_id)
    if record is None:
        message = f"previous_response_id is {response_id!r}, but no such response is stored (any more): "
        advice, param = "send the whole conversation as input", "previous_response_id"
        raise InvalidRequestError(message, advice, param=param, code="previous_response_not_found")
    return record.messages


def _stored(store: ResponseStore, response_id: str) -> StoredResponse:
    record = store.get(TENANT, response_id)
    if record is None:
        raise _not_found(response_id)
    return record


def _stored_item(store: ResponseStore, item_id: str) -> Item | None:
    response_id = response_of(item_id)
    record = store.get(TENANT, response_id) if response_id else None
    return stored_item(record.response, record.input_items, item_id) if record else None


def _not_found(response_id: str) -> InvalidRequestError:
    message = f"no response {response_id!r} is stored (any more): was it created with store, and not deleted?"
    return InvalidRequestError(message, param="response_id", code="response_not_found")


def _page(items: list[Item], after: str | None, limit: int) -> dict[str, Any]:
    """Some of the items, as the protocol lists them."""
    ids = [item["id"] for item in items]
    if after is not None and after not in ids:
        raise InvalidRequestError(f"after is {after!r}, but no item has that id", param="after", code="item_not_found")
    begin = 0 if after is None else ids.index(after) + 1
    page = ids[begin : begin + limit]
    return {
        "object": "list",
        "data": items[begin : begin + limit],
        "first_id": page[0] if page else None,
        "last_id": page[-1] if page else None,
        "has_more": begin + limit < len(items),
    }


def _json(value: dict[str, Any]) -> Response:
    return _json_text(json.dumps(value))


def _json_text(text: str) -> Response:
    return Response(text, media_type="application/json")
