"""Compaction: the model summarises a conversation, which goes on from the summary, whatever the protocol."""

import base64
import binascii
from dataclasses import replace

from slipstream.chat import Message
from slipstream.errors import InvalidRequestError
from slipstream.runtime import Runtime
from slipstream.turns import TurnRequest

_SUMMARISE = (
    "Summarise this conversation for an assistant that will continue it and see nothing else of it: what the user "
    "wants, what was done and found, what is left to do, and every name, path and number that matters. "
    "Answer with the summary alone."
)
_INTRODUCTION = "This is a summary of the conversation so far:"
_FEWEST_TOKENS, _MOST_TOKENS = 64, 4096
"""Of a summary at its longest, unless the request says how many."""


def summarising(
    runtime: Runtime, request: TurnRequest, *, instructions: str | None = None, most: int | None = None
) -> TurnRequest:
    """The request for a summary after the messages of another, which costs no more of the prompt than what it adds.

    It has up to `most` tokens, by default no more than half of what it stands for, and no more than there is room for.
    """
    assert isinstance(request.prompt, tuple)
    tools = replace(request.setting.tools, mode="none", allowed=None)
    summary = replace(
        request,
        prompt=(*request.prompt, Message("user", (instructions or "").strip() or _SUMMARISE)),
        setting=replace(request.setting, tools=tools),
        session_hint=None,
        response_schema=None,
    )
    prompt, limit = runtime.turns.count(summary), runtime.core.limits.max_sequence
    most = max(1, min(most or min(_MOST_TOKENS, max(_FEWEST_TOKENS, prompt // 2)), limit - prompt))
    return replace(summary, params=replace(request.params, max_tokens=most, stop=()))


def introduced(summary: str) -> str:
    """What a summary says in a prompt."""
    return f"{_INTRODUCTION}\n{summary}"


def sealed(summary: str) -> str:
    """A summary as the `encrypted_content` of an item; it's no secret from its client."""
    return base64.b64encode(summary.encode()).decode()


def unsealed(content: str, param: str) -> str:
    """The summary in an item; raises `InvalidRequestError` for one of another server."""
    try:
        return base64.b64decode(content, validate=True).decode()
    except (binascii.Error, UnicodeDecodeError, ValueError):
        message = f"{param}.encrypted_content can't be read: it was made by another server. Send the messages instead"
        raise InvalidRequestError(message, param=f"{param}.encrypted_content") from None
