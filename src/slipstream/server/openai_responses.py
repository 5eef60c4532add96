"""OpenAI's Responses API: `/v1/responses` and what belongs to it; `/v1/conversations` are sessions here."""

import asyncio
import json
import logging
import secrets
import sqlite3
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel

from slipstream.chat import Message
from slipstream.engine import SamplingParams
from slipstream.errors import ContextLengthError, InvalidRequestError, StorageError
from slipstream.runtime import Runtime
from slipstream.server.access import TenantName
from slipstream.server.bodies import BodyRoute
from slipstream.server.compaction import summarising
from slipstream.server.errors import Failure, failure_of, unsupported
from slipstream.server.extension import in_session, names_session, report_of
from slipstream.server.openapi import WHOLE_OR_STREAM
from slipstream.server.responses_compaction import CompactionAnswer, response_usage
from slipstream.server.responses_items import InputItem, item_messages, listed, resolved
from slipstream.server.responses_output import EventWriter, cut_short, output_items
from slipstream.server.responses_request import PromptRequest, ResponseRequest
from slipstream.server.responses_tools import Item
from slipstream.server.stream import Answer, respond
from slipstream.server.turn import LiveTurn, TurnRunner
from slipstream.sessions import Database, Sessions, SessionState, StoredResponse
from slipstream.turns import Piece, TurnRequest

logger = logging.getLogger(__name__)


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


class DeletedConversation(BaseModel):
    """What is left of one."""

    id: str
    object: Literal["conversation.deleted"] = "conversation.deleted"
    deleted: Literal[True] = True


def router(runner: TurnRunner) -> APIRouter:
    """The routes of this protocol."""
    routes = APIRouter(route_class=BodyRoute)
    runtime = runner.runtime
    store = runtime.database

    @routes.post("/v1/responses", responses=WHOLE_OR_STREAM)
    async def create_response(http: Request, body: ResponseRequest, tenant: TenantName) -> Response:
        named = names_session(http)
        items, messages = await asyncio.to_thread(_brought, body, store, tenant, in_session=named)
        model = runner.names.check(body.model)
        request = await asyncio.to_thread(lambda: in_session(body.turn(messages), http))
        try:
            turn = await runner.start(lambda: [request], http)
        except ContextLengthError as error:
            if not body.stream:
                raise
            return _refused_stream(_head(request.params, body, model), failure_of(error, http.url.path))
        return await respond(http, _ResponseAnswer(runner, turn, body, items, model), stream=body.stream)

    @routes.post("/v1/responses/input_tokens")
    async def count_input_tokens(http: Request, body: PromptRequest, tenant: TenantName) -> Response:
        runner.names.check(body.model)
        _, messages = await asyncio.to_thread(_brought, body, store, tenant, in_session=names_session(http))
        count = await asyncio.to_thread(
            lambda: runtime.turns.count(replace(in_session(body.turn(messages), http), tenant=tenant))
        )
        return _json({"object": "response.input_tokens", "input_tokens": count})

    @routes.post("/v1/responses/compact")
    async def compact(http: Request, body: PromptRequest, tenant: TenantName) -> Response:
        runner.names.check(body.model)
        _, messages = await asyncio.to_thread(_brought, body, store, tenant, in_session=False)

        def summary() -> TurnRequest:
            request = replace(body.turn(messages), tenant=tenant)
            return summarising(runtime, request, most=body.max_output_tokens)

        turn = await runner.start(lambda: [summary()], http)
        return await respond(http, CompactionAnswer(turn, messages), stream=False)

    @routes.get("/v1/responses/{response_id}")
    async def retrieve_response(
        response_id: str, tenant: TenantName, *, stream: Annotated[bool, Query(include_in_schema=False)] = False
    ) -> Response:
        if stream:
            raise unsupported("stream", "is not supported: the events of a stored response are not kept; leave it out")
        record = await _stored(store, tenant, response_id)
        return Response(record.response, media_type="application/json")

    @routes.delete("/v1/responses/{response_id}")
    async def delete_response(response_id: str, tenant: TenantName) -> Response:
        await asyncio.to_thread(_delete, runtime, tenant, response_id)
        return _json({"id": response_id, "object": "response", "deleted": True})

    @routes.get("/v1/responses/{response_id}/input_items")
    async def list_input_items(
        response_id: str,
        tenant: TenantName,
        order: Literal["asc", "desc"] = "desc",
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
    ) -> Response:
        items: list[Item] = json.loads((await _stored(store, tenant, response_id)).input_items)
        if order == "desc":
            items.reverse()
        return _json(_page(items, after, limit))

    return routes


def conversations(sessions: Sessions) -> APIRouter:
    """The routes of conversations, to go on with through the others."""
    routes = APIRouter(prefix="/v1/conversations", route_class=BodyRoute)

    @routes.post("")
    async def create(body: CreateConversation, tenant: TenantName) -> Conversation:
        if body.metadata:
            raise unsupported("metadata", "is not kept: leave it out")
        messages = item_messages(body.items or [], "items", ())
        name = f"conv_{secrets.token_hex(12)}"
        return _conversation(await asyncio.to_thread(sessions.create, tenant, name, messages))

    @routes.get("/{id}")
    async def retrieve(id: str, tenant: TenantName) -> Conversation:
        return _conversation(await asyncio.to_thread(sessions.get, tenant, id))

    @routes.delete("/{id}")
    async def delete(id: str, tenant: TenantName) -> DeletedConversation:
        await asyncio.to_thread(sessions.delete, tenant, id)
        return DeletedConversation(id=id)

    return routes


def _brought(
    body: PromptRequest, store: Database, tenant: str, *, in_session: bool
) -> tuple[list[InputItem], tuple[Message, ...]]:
    """The items that a request brings, and the conversation without instructions.

    Where a session holds what came before, that the body or something else names, it's what is new. Raises
    `InvalidRequestError` naming the field.
    """
    body.check()
    earlier = _earlier(store, tenant, body.previous_response_id)
    items = resolved(body.input, partial(store.response, tenant))
    in_session = in_session or body.conversation is not None or body.switches()["session_id"] is not None
    calls = None if in_session else [call.id for message in earlier for call in message.tool_calls]
    return items, (*earlier, *item_messages(items, "input", calls))


class _ResponseAnswer(Answer):
    """A response object, which is stored once it's finished unless the request says otherwise."""

    def __init__(
        self, runner: TurnRunner, turn: LiveTurn, body: ResponseRequest, items: Sequence[InputItem], model: str
    ) -> None:
        super().__init__(turn)
        (self._choice,) = turn.choices
        self._runtime = runner.runtime
        self._most = runner.config.limits.max_stored_responses
        self._items = items
        self._kept = body.store is not False
        self._response = _head(self._choice.request.params, body, model)
        self._toolbox = body.toolbox
        self._writer = EventWriter(
            self._response, partial(output_items, self._choice, self._response["id"], self._toolbox), self._toolbox
        )

    async def whole(self) -> bytes:
        """The response."""
        return json.dumps(await self._completed()).encode()

    def begin(self) -> bytes:
        """The events before any output."""
        return self._writer.created()

    def events(self, piece: Piece) -> Iterable[bytes]:
        """The events of a piece of the answer."""
        return map(self._writer.piece, piece.deltas)

    async def end(self) -> bytes:
        """The last events, with the response."""
        return self._writer.end(await self._completed())

    def alive(self) -> bytes:
        """That the response is in progress, once more: Codex counts events, comments it doesn't see."""
        return self._writer.alive(self.progress())

    def failed(self, failure: Failure) -> bytes:
        """The last event of a stream that breaks off."""
        return self._writer.failed(failure)

    async def _completed(self) -> dict[str, Any]:
        response = self._response | self._outcome()
        if self._kept:
            await asyncio.to_thread(self._store, response)
        return response

    def _store(self, response: dict[str, Any]) -> None:
        session_turn = self._choice.session_turn
        assert session_turn is not None
        assert session_turn.history is not None
        items = json.dumps(listed(self._items, response["id"]))
        unsaid = int(self._choice.request.system is not None)
        stored = StoredResponse(json.dumps(response), items, session_turn.history, unsaid)
        try:
            self._runtime.database.save_response(session_turn.tenant, response["id"], stored, max_bytes=self._most)
        except sqlite3.Error as error:  # such as a full disk: it costs nobody an answer
            logger.warning("response %s can't be kept: %s", response["id"], error)

    def _outcome(self) -> dict[str, Any]:
        """The fields that a finished turn decides."""
        choice, report = self._choice, report_of(self.turn)
        cut = cut_short(choice)
        reasoning = self._runtime.tokenizer.encode(choice.reader.reasoning)
        return {
            "status": "incomplete" if cut else "completed",
            "completed_at": None if cut else int(time.time()),
            "incomplete_details": cut,
            "output": output_items(choice, self._response["id"], self._toolbox),
            "usage": response_usage(report, kept=choice.request.reuse, reasoning=len(reasoning)),
            "slipstream": report,
        }


def _head(params: SamplingParams, body: ResponseRequest, model: str) -> dict[str, Any]:
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


def _refused_stream(response: dict[str, Any], failure: Failure) -> Response:
    """The events of a response whose prompt is too long: Codex compacts the conversation by them, not by a status."""
    writer = EventWriter(response)
    return Response(writer.created() + writer.failed(failure), media_type="text/event-stream")


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


def _delete(runtime: Runtime, tenant: str, response_id: str) -> None:
    """Delete a response, and the conversation that ends with it if a client never named that."""
    record = runtime.database.response(tenant, response_id)
    try:
        there = runtime.database.delete_response(tenant, response_id)
    except sqlite3.Error as error:
        raise StorageError(f"response {response_id!r}") from error
    if record is None or not there:
        raise _not_found(response_id)
    session_id = json.loads(record.response)["slipstream"]["session_id"]
    runtime.sessions.forget_unnamed(tenant, session_id, record.history.head)


async def _stored(store: Database, tenant: str, response_id: str) -> StoredResponse:
    record = await asyncio.to_thread(store.response, tenant, response_id)
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
