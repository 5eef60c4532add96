"""Compaction in the Responses API: a conversation's summary, in the item that clients keep in its place."""

import base64
import binascii

from slipstream.errors import InvalidRequestError

SUMMARISE = (
    "Summarise this conversation for an assistant that will continue it and see nothing else of it: what the user "
    "wants, what was done and found, what is left to do, and every name, path and number that matters. "
    "Answer with the summary alone."
)
_INTRODUCTION = "This is a summary of the conversation so far:"


def sealed(summary: str) -> str:
    """A summary as the `encrypted_content` of an item; it's no secret from its client."""
    return base64.b64encode(summary.encode()).decode()


def summary_of(content: str, param: str) -> str:
    """What a compaction item says in a prompt; raises `InvalidRequestError` for one of another server."""
    try:
        summary = base64.b64decode(content, validate=True).decode()
    except (binascii.Error, UnicodeDecodeError, ValueError):
        message = f"{param}.encrypted_content can't be read: it was made by another server. Send the messages instead"
        raise InvalidRequestError(message, param=f"{param}.encrypted_content") from None
    return f"{_INTRODUCTION}\n{summary}"
