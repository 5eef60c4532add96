"""The `slipstream` object: what a request may ask beyond its protocol, and what each response tells of its cost."""

import re
from dataclasses import replace
from typing import Annotated, Self

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field

from slipstream.engine.request import CacheUse
from slipstream.errors import InvalidRequestError
from slipstream.server.turn import LiveTurn
from slipstream.turns import TurnRequest

SESSION_HEADER = "X-Session-Id"
_SESSION_ID = r"[!-.0-~]{1,256}"
SessionId = Annotated[str, Field(pattern=f"^{_SESSION_ID}$")]
"""Printable ASCII without spaces and slashes, so that it fits in a header and in a path."""


class SlipstreamOptions(BaseModel):
    """The `slipstream` object of a request. Every switch is on unless it's switched off here or for the server."""

    model_config = ConfigDict(extra="forbid")

    session_id: SessionId | None = None
    reuse: bool = True
    speculation: bool = True
    jump_forward: bool = True
    response_cache: bool = True


def in_session(request: TurnRequest, http: Request) -> TurnRequest:
    """The request with the session that its header `X-Session-Id` names, unless its body named one.

    Raises `InvalidRequestError` for what can't be a name.
    """
    name = http.headers.get(SESSION_HEADER)
    if name is None or request.session_id is not None:
        return request
    if not re.fullmatch(_SESSION_ID, name):
        rule = "must be printable ASCII without spaces and slashes, at most 256 characters"
        raise InvalidRequestError(f"the header {SESSION_HEADER} {rule}", param=SESSION_HEADER)
    return replace(request, session_id=name)


def session_hint(cache_key: str | None) -> str | None:
    """The session that a `prompt_cache_key` names, if it can be a name."""
    return cache_key if cache_key is not None and re.fullmatch(_SESSION_ID, cache_key) else None


class TurnReport(BaseModel):
    """The `slipstream` object of a response.

    A prompt counts once, however many choices were made of it: as the first of them found it. Everything else is
    the sum over the choices, and each time the longest of any.
    """

    session_id: str | None
    """The session that the answer belongs to; null after plain prompts."""
    prompt_tokens: int
    reused_tokens: int
    delta_tokens: int
    completion_tokens: int
    forced_tokens: int
    drafted_tokens: int
    accepted_tokens: int
    forward_passes: int
    queue_ms: float
    prefill_ms: float
    decode_ms: float
    response_cache: CacheUse
    exact: bool
    """Whether the same request gives the same tokens on this machine, whatever was cached, batched or drafted."""

    @classmethod
    def of(cls, turn: LiveTurn) -> Self:
        """The report on a finished turn."""
        first, each = turn.choices[0], [choice.counters for choice in turn.choices]
        prompts = list({choice.request: choice.counters for choice in reversed(turn.choices)}.values())
        return cls(
            session_id=first.session_id,
            prompt_tokens=sum(counters.prompt_tokens for counters in prompts),
            reused_tokens=sum(counters.reused_tokens for counters in prompts),
            delta_tokens=sum(counters.delta_tokens for counters in prompts),
            completion_tokens=sum(counters.completion_tokens for counters in each),
            forced_tokens=sum(counters.forced_tokens for counters in each),
            drafted_tokens=sum(counters.drafted_tokens for counters in each),
            accepted_tokens=sum(counters.accepted_tokens for counters in each),
            forward_passes=sum(counters.forward_passes for counters in each),
            queue_ms=round(max(counters.queue_ms for counters in each), 3),
            prefill_ms=round(max(counters.prefill_ms for counters in each), 3),
            decode_ms=round(max(counters.decode_ms for counters in each), 3),
            response_cache=_joined([counters.response_cache for counters in each]),
            exact=turn.exact,
        )


def _joined(each: list[CacheUse]) -> CacheUse:
    """A hit if all were: nothing was computed."""
    return each[0] if len(set(each)) == 1 else "miss"
