"""OpenAI's Responses API: `/v1/responses` and what belongs to it; `/v1/conversations` are sessions here."""

import asyncio
import json
import secrets
import sqlite3
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Request, Response
from pydantic import BaseModel

from slipstream.chat import Message
from slipstream.errors import ContextLengthError, InvalidRequestError, StorageError
from slipstream.server.access import TenantName
from slipstream.server.compaction import summarising
from slipstream.server.errors import failure_of, unsupported
from slipstream.server.extension import in_session, names_session
from slipstream.server.openapi import WHOLE_OR_STREAM, Deleted
from slipstream.server.responses_compaction import CompactionAnswer
from slipstream.server.responses_items import InputItem, item_messages, resolved
from slipstream.server.responses_output import ResponseAnswer, head_of, refused_stream
from slipstream.server.responses_request import PromptRequest, ResponseRequest
from slipstream.server.responses_tools import Item
from slipstream.server.stream import respond
from slipstream.server.turn import TurnRunner
from slipstream.sessions import Database, SessionState, StoredResponse
from slipstream.turns import TurnRequest


class CreateConversation(BaseModel):
    """What a conversation begins with."""

    items: list[InputItem] | None = None
    metadata: dict[str, str] | None = None


class Conversation(BaseModel):
    """A conversation, which is a session here."""

    id: str
    object: Literal["conversation"] = "conversation"
    created_at: int
    metadata: dict[str, Any] = {}


def add_routes(app: FastAPI, runner: TurnRunner) -> None:
    """Add the routes of this protocol."""
    runtime = runner.runtime
    store, sessions = runtime.database, runtime.sessions

    @app.post("/v1/responses", responses=WHOLE_OR_STREAM)
    async def create_response(http: Request, body: ResponseRequest, tenant: TenantName) -> Response:
        model = runner.names.check(body.model)
        items, request = await asyncio.to_thread(_asked, body, store, tenant, in_session=names_session(http))
        head = head_of(request.params, body, model)
        try:
            turn = await runner.start(lambda: [in_session(request, http)], http)
        except ContextLengthError as error:
            if not body.stream:
                raise
            return refused_stream(head, failure_of(error, http.url.path))
        return await respond(http, ResponseAnswer(turn, body, items, head), stream=body.stream)

    @app.post("/v1/responses/input_tokens")
    def count_input_tokens(http: Request, body: PromptRequest, tenant: TenantName) -> Response:
        runner.names.check(body.model)
        _, request = _asked(body, store, tenant, in_session=names_session(http))
        count = runtime.turns.count(in_session(request, http))
        return _json({"object": "response.input_tokens", "input_tokens": count})

    @app.post("/v1/responses/compact")
    async def compact(http: Request, body: PromptRequest, tenant: TenantName) -> Response:
        runner.names.check(body.model)
        _, request = await asyncio.to_thread(_asked, body, store, tenant, in_session=False)
        turn = await runner.start(lambda: [summarising(runtime, request, most=body.max_output_tokens)], http)
        return await respond(http, CompactionAnswer(turn), stream=False)

    @app.get("/v1/responses/{response_id}")
    def retrieve_response(
        response_id: str, tenant: TenantName, *, stream: Annotated[bool, Query(include_in_schema=False)] = False
    ) -> Response:
        if stream:
            raise unsupported("stream", "is not supported: the events of a stored response are not kept; leave it out")
        return Response(_stored(store, tenant, response_id).response, media_type="application/json")

    @app.delete("/v1/responses/{response_id}")
    def delete_response(response_id: str, tenant: TenantName) -> Deleted:
        record = _stored(store, tenant, response_id)
        try:
            there = store.delete_response(tenant, response_id)
        except sqlite3.Error as error:
            raise StorageError(f"response {response_id!r}") from error
        if not there:
            raise _not_found(response_id)
        # The conversation that ends with it goes too, if a client never named that.
        session_id = json.loads(record.response)["slipstream"]["session_id"]
        sessions.forget_unnamed(tenant, session_id, record.history.head)
        return Deleted(id=response_id, object="response")

    @app.get("/v1/responses/{response_id}/input_items")
    def list_input_items(
        response_id: str,
        tenant: TenantName,
        order: Literal["asc", "desc"] = "desc",
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
    ) -> Response:
        items: list[Item] = json.loads(_stored(store, tenant, response_id).input_items)
        if order == "desc":
            items.reverse()
        return _json(_page(items, after, limit))

    @app.post("/v1/conversations")
    def create(body: CreateConversation, tenant: TenantName) -> Conversation:
        if body.metadata:
            raise unsupported("metadata", "is not kept: leave it out")
        messages = item_messages(body.items or [], "items", ())
        name = f"conv_{secrets.token_hex(12)}"
        return _conversation(sessions.create(tenant, name, messages))

    @app.get("/v1/conversations/{id}")
    def retrieve(id: str, tenant: TenantName) -> Conversation:
        return _conversation(sessions.get(tenant, id))

    @app.delete("/v1/conversations/{id}")
    def delete(id: str, tenant: TenantName) -> Deleted:
        sessions.delete(tenant, id)
        return Deleted(id=id, object="conversation.deleted")


def _asked(
    body: PromptRequest, store: Database, tenant: str, *, in_session: bool
) -> tuple[list[InputItem], TurnRequest]:
    """The items that a request brings, and what it asks for.

    Where a session holds what came before, that the body or something else names, its prompt is what is new. Raises
    `InvalidRequestError` naming the field.
    """
    body.check()
    earlier = _earlier(store, tenant, body.previous_response_id)
    items = resolved(body.input, partial(store.response, tenant))
    in_session = in_session or body.conversation is not None or body.switches()["session_id"] is not None
    calls = None if in_session else [call.id for message in earlier for call in message.tool_calls]
    return items, replace(body.turn((*earlier, *item_messages(items, "input", calls))), tenant=tenant)


def _conversation(state: SessionState) -> Conversation:
    return Conversation(id=state.id, created_at=int(state.created))


def _earlier(store: Database, tenant: str, response_id: str | None) -> tuple[Message, ...]:
    """The conversation up to the response that a request goes on from."""
    if response_id is None:
        return ()
    record = store.response(tenant, response_id)
    if record is None:
        message = f"previous_response_id is {response_id!r}, but no such response is stored (any more): "
        advice, param = "send the whole conversation as input", "previous_response_id"
        raise InvalidRequestError(message, advice, param=param, code="previous_response_not_found")
    return record.messages


def _stored(store: Database, tenant: str, response_id: str) -> StoredResponse:
    record = store.response(tenant, response_id)
    if record is None:
        raise _not_found(response_id)
    return record


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
    return Response(json.dumps(value), media_type="application/json")
