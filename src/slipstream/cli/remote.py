"""A running server, as commands ask it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import httpx

Url = Annotated[str, typer.Option(help="Where the server is.")]
ApiKey = Annotated[str, typer.Option(help="The server's key, if it has one.")]
LOCAL = "http://127.0.0.1:8000"


@contextmanager
def server_at(url: str, api_key: str) -> "Iterator[httpx.Client]":
    """A client of the server; if it refuses or doesn't answer, the command ends and says why."""
    import httpx  # takes a while, which other commands need not wait for

    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {api_key}"}) as http:
        try:
            yield http
        except httpx.HTTPStatusError as error:
            sys.exit(f"slipstream: {url} answered: {_message(error.response)}")
        except httpx.HTTPError as error:
            sys.exit(f"slipstream: no answer from {url}: {error}; is the server running, and is --url right?")


def _message(response: "httpx.Response") -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):  # from something else than Slipstream
        return f"{response.status_code} {response.reason_phrase}"
