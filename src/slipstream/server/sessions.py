"""Sessions over HTTP: `/v1/sessions`. Messages and tools have the form that chat completions give them."""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, FastAPI, Query, Response
from pydantic import BaseModel, ConfigDict, Field

from slipstream.chat import Message, Setting, Tool
from slipstream.errors import SessionNotFoundError
from slipstream.server.access import TenantName
from slipstream.server.bodies import BodyRoute
from slipstream.server.extension import SessionId
from slipstream.server.openai_messages import ChatMessage, chat_messages
from slipstream.server.openai_tools import ToolDefinition, call_objects, chat_tools, tool_object, tool_use
from slipstream.server.openapi import Deleted
from slipstream.server.turn import TurnRunner
from slipstream.sessions import SessionInfo, SessionState

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Body(BaseModel):
    """A request's body; fields that don't exist are refused, and values of other types: false is no number."""

    model_config = ConfigDict(extra="forbid", strict=True)


class CreateSession(Body):
    """What a session begins with. Its prompt is computed as soon as nothing else is."""

    id: SessionId | None = None
    messages: list[ChatMessage] = []
    tools: list[ToolDefinition] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    pinned: bool = False
    ttl_seconds: Seconds | None = None


class AppendMessages(Body):
    """Messages to add without an answer."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]


class ForkSession(Body):
    """Which messages the new session begins with: the first `keep`, or all."""

    id: SessionId | None = None
    keep: Annotated[int | None, Field(ge=0)] = None


class RollbackSession(Body):
    """Which messages stay: the first `keep`."""

    keep: Annotated[int, Field(ge=0)]


class ChangeSession(Body):
    """What is to be changed."""

    pinned: bool | None = None
    ttl_seconds: Seconds | None = None


class SessionObject(BaseModel):
    """A session. Times are Unix seconds; `tokens` is its length, `kv_tokens` how much of it is in memory."""

    id: str
    object: Literal["session"] = "session"
    created_at: float
    last_used_at: float
    expires_at: float | None
    ttl_seconds: float
    pinned: bool
    parent: str | None
    message_count: int
    tokens: int
    kv_tokens: int
    kv_bytes: int
    saved_bytes: int
    busy: bool


class WholeSession(SessionObject):
    """A session with what was said in it."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    chat_template_kwargs: dict[str, Any]


class SessionList(BaseModel):
    """Sessions, most recently used first."""

    object: Literal["list"] = "list"
    data: list[SessionObject]
    has_more: bool


def add_routes(app: FastAPI, runner: TurnRunner) -> None:
    """Add the routes, answered on other threads than the event loop's: sessions wait for the engine and the disk."""
    sessions = runner.runtime.sessions
    routes = APIRouter(prefix="/v1/sessions", tags=["sessions"], route_class=BodyRoute)

    def told(state: SessionState) -> SessionObject:
        return _object(*sessions.infos([state]))

    @routes.post("", status_code=201)
    def create(body: CreateSession, tenant: TenantName) -> SessionObject:
        messages, tools = chat_messages(body.messages), tool_use(chat_tools(body.tools))
        setting = Setting(tools, body.chat_template_kwargs or {})
        state = sessions.create(tenant, body.id, messages, setting, ttl=body.ttl_seconds)
        return told(sessions.pin(tenant, state.id) if body.pinned else state)

    @routes.get("")
    def every(
        tenant: TenantName, limit: Annotated[int, Query(ge=1, le=1000)] = 100, after: str | None = None
    ) -> SessionList:
        names = sessions.ids(tenant)
        if after is not None and after not in names:
            raise SessionNotFoundError(after)
        start = names.index(after) + 1 if after is not None else 0
        shown = sessions.infos(sessions.existing(tenant, names[start : start + limit]))
        return SessionList(data=[_object(info) for info in shown], has_more=start + limit < len(names))

    @routes.get("/{id}", response_model=WholeSession)
    def one(id: str, tenant: TenantName) -> Response:
        state = sessions.get(tenant, id)
        tools = state.setting.tools.tools
        whole = WholeSession(
            **told(state).model_dump(),
            messages=[_message(message, tools) for message in state.messages],
            tools=list(map(tool_object, tools)),
            chat_template_kwargs=dict(state.setting.template_kwargs),
        )
        # ASCII, for a client may have sent half of a surrogate pair.
        return Response(json.dumps(whole.model_dump()), media_type="application/json")

    @routes.patch("/{id}")
    def change(id: str, body: ChangeSession, tenant: TenantName) -> SessionObject:
        if body.ttl_seconds is not None:
            sessions.keep_for(tenant, id, body.ttl_seconds)
        if body.pinned is not None:
            (sessions.pin if body.pinned else sessions.unpin)(tenant, id)
        return told(sessions.get(tenant, id))

    @routes.post("/{id}/messages")
    def append(id: str, body: AppendMessages, tenant: TenantName) -> SessionObject:
        return told(sessions.append(tenant, id, chat_messages(body.messages)))

    @routes.post("/{id}/fork", status_code=201)
    def fork(id: str, tenant: TenantName, body: ForkSession | None = None) -> SessionObject:
        body = body or ForkSession()
        return told(sessions.fork(tenant, id, keep=body.keep, new_name=body.id))

    @routes.post("/{id}/rollback")
    def rollback(id: str, body: RollbackSession, tenant: TenantName) -> SessionObject:
        return told(sessions.rollback(tenant, id, keep=body.keep))

    @routes.post("/{id}/save")
    def save(id: str, tenant: TenantName) -> SessionObject:
        return told(sessions.save(tenant, id))

    @routes.post("/{id}/load")
    def load(id: str, tenant: TenantName) -> SessionObject:
        return told(sessions.load(tenant, id))

    @routes.delete("/{id}")
    def delete(id: str, tenant: TenantName) -> Deleted:
        sessions.delete(tenant, id)
        return Deleted(id=id, object="session.deleted")

    app.include_router(routes)


def _object(info: SessionInfo) -> SessionObject:
    state = info.state
    return SessionObject(
        id=state.id,
        created_at=state.created,
        last_used_at=state.used,
        expires_at=state.expires,
        ttl_seconds=state.ttl,
        pinned=state.pinned,
        parent=state.parent,
        message_count=len(state.messages),
        tokens=state.tokens,
        kv_tokens=info.kv_tokens,
        kv_bytes=info.kv_bytes,
        saved_bytes=info.saved_bytes,
        busy=state.turn is not None,
    )


def _message(message: Message, tools: Sequence[Tool]) -> dict[str, Any]:
    """A message in the form in which it can be sent again."""
    told: dict[str, Any] = {"role": message.role, "content": message.text}
    if message.tool_calls:
        told["tool_calls"] = call_objects(message.tool_calls, tools)
    if message.reasoning:
        told["reasoning_content"] = message.reasoning
    if message.tool_call_id is not None:
        told["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        told["name"] = message.name
    return told
