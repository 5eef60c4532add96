"""The `slipstream` object: what a request may ask beyond its protocol, and what each response tells of its cost."""

import re
from dataclasses import replace
from typing import Annotated, Any

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field

from slipstream import fields
from slipstream.errors import InvalidRequestError
from slipstream.server import field_names
from slipstream.server.turn import LiveTurn
from slipstream.sessions.breaks import ReuseBreak
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
    progress: bool = False
    """Whether a stream tells how much of a long prompt is computed, each time that it shows that it's alive."""
    priority: Annotated[int, Field(ge=-5, le=5)] = 0
    """Higher goes first among a tenant's requests; each level has twice the share of the one below."""


_AFFINITY_HEADER = "X-Session-Affinity"


def names_session(http: Request) -> bool:
    """Whether the header `X-Session-Id` of a request names a session of this server.

    opencode sends it with every request, those for titles beside others, together with `X-Session-Affinity`: to lead
    them to one server. Then it's a hint, for the messages are whole conversations.
    """
    return SESSION_HEADER in http.headers and _AFFINITY_HEADER not in http.headers


def in_session(request: TurnRequest, http: Request) -> TurnRequest:
    """The request with the session that its header `X-Session-Id` names, unless its body named one.

    Raises `InvalidRequestError` for what can't be a name.
    """
    name = http.headers.get(SESSION_HEADER)
    if name is None or request.session_id is not None:
        return request
    if not names_session(http):
        return replace(request, session_hint=request.session_hint or session_hint(name))
    if not re.fullmatch(_SESSION_ID, name):
        rule = "must be printable ASCII without spaces and slashes, at most 256 characters"
        raise InvalidRequestError(f"the header {SESSION_HEADER} {rule}", param=SESSION_HEADER)
    return replace(request, session_id=name)


def session_hint(cache_key: str | None) -> str | None:
    """The session that a `prompt_cache_key` names, if it can be a name."""
    return cache_key if cache_key is not None and re.fullmatch(_SESSION_ID, cache_key) else None


_TOKENS = ("completion_tokens", "forced_tokens", "drafted_tokens", "accepted_tokens", "forward_passes")
_PROMPT_TOKENS = ("prompt_tokens", "reused_tokens", "delta_tokens")
_TIMES = ("queue_ms", "prefill_ms", "decode_ms")


def report_of(turn: LiveTurn) -> dict[str, Any]:
    """The `slipstream` object of the response to a finished turn: its session, null after plain prompts, and its cost.

    A prompt counts once, however many choices were made of it: as the first of them found it. Everything else is
    the sum over the choices, and each time the longest of any. The response cache has a hit if nothing was computed.
    `exact` says whether the same request gives the same tokens on this machine, whatever happens around it, and
    `reuse_break` why something was computed again that had been computed before, if it was.
    `warnings` name what of the request was left out or loosened.
    """
    each = [choice.counters for choice in turn.choices]
    prompts = {choice.request: choice.counters for choice in reversed(turn.choices)}.values()
    uses = {counters.response_cache for counters in each}
    first = turn.choices[0]
    broken = first.session_turn.reuse_break if first.session_turn is not None else None
    return {
        "session_id": first.session_id,
        **{name: sum(getattr(counters, name) for counters in prompts) for name in _PROMPT_TOKENS},
        **{name: sum(getattr(counters, name) for counters in each) for name in _TOKENS},
        **{name: round(max(getattr(counters, name) for counters in each), 3) for name in _TIMES},
        "response_cache": uses.pop() if len(uses) == 1 else "miss",
        "exact": turn.runner.runtime.exact,
        "warnings": list(dict.fromkeys(warning for choice in turn.choices for warning in choice.warnings)),
        "reuse_break": _as_shown(broken) if broken is not None else None,
    }


def _as_shown(broken: ReuseBreak) -> dict[str, Any]:
    field = broken.field
    named = field.named(field_names.CHAT) if isinstance(field, fields.Field) else field
    return {"kind": broken.kind, "message": broken.message, "field": named}
