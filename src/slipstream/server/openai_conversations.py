"""OpenAI's conversations: `/v1/conversations`. A conversation is a session, to go on with through the Responses API."""

import asyncio
import secrets
from typing import Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel

from slipstream.server.errors import unsupported
from slipstream.server.responses_items import InputItem, item_messages
from slipstream.server.turn import TENANT
from slipstream.sessions import Sessions, SessionState


class CreateConversation(BaseModel):
    """What a conversation begins with."""

    items: list[InputItem] | None = None
    metadata: dict[str, str] | None = None


class Conversation(BaseModel):
    """A conversation of the Responses API, which is a session here."""

    id: str
    object: Literal["conversation"] = "conversation"
    created_at: int
    metadata: dict[str, Any] = {}


class DeletedConversation(BaseModel):
    """What is left of one."""

    id: str
    object: Literal["conversation.deleted"] = "conversation.deleted"
    deleted: Literal[True] = True


def router(sessions: Sessions) -> APIRouter:
    """The routes of this protocol."""
    routes = APIRouter(prefix="/v1/conversations")

    @routes.post("")
    async def create(body: CreateConversation) -> Conversation:
        if body.metadata:
            raise unsupported("metadata", "is not kept: leave it out")
        messages = item_messages(body.items or [], "items", ())
        name = f"conv_{secrets.token_hex(12)}"
        return _conversation(await asyncio.to_thread(sessions.create, TENANT, name, messages))

    @routes.get("/{id}")
    async def retrieve(id: str) -> Conversation:
        return _conversation(await asyncio.to_thread(sessions.get, TENANT, id))

    @routes.delete("/{id}")
    async def delete(id: str) -> DeletedConversation:
        await asyncio.to_thread(sessions.delete, TENANT, id)
        return DeletedConversation(id=id)

    return routes


def _conversation(state: SessionState) -> Conversation:
    return Conversation(id=state.id, created_at=int(state.created))
