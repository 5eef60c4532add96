"""Answers on their way to a client, which may go away at any time."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterable
from itertools import chain
from typing import Any

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from pydantic_core import to_json
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from slipstream.server.errors import Failure, failure_of, openai_body
from slipstream.server.turn import LiveTurn
from slipstream.turns import Piece


class Answer(ABC):
    """What a protocol makes of a turn: one body, or server-sent events.

    Events are made of plain dictionaries: between two steps of the model there is no time for more.
    """

    def __init__(self, turn: LiveTurn) -> None:
        self.turn = turn

    @abstractmethod
    async def whole(self) -> bytes:
        """The body that answers a finished turn, in JSON."""

    def batches(self) -> AsyncIterator[list[Piece]]:
        """The pieces as they come, those that came together in one list; an empty one now and then."""
        return self.turn.batches()

    async def finish(self) -> None:
        """Wait for the last piece."""
        async for _ in self.batches():
            pass

    def begin(self) -> bytes:
        """The events before those of any piece."""
        return b""

    @abstractmethod
    def events(self, piece: Piece) -> Iterable[bytes]:
        """The events of a piece of an answer."""

    @abstractmethod
    async def end(self) -> bytes:
        """The last events of a finished turn."""

    def alive(self) -> bytes:
        """A sign of life while there is nothing to say, with the progress of the prompt if the request asked for it.

        Clients give up on a stream after some silence. A comment is for those that look at bytes.
        """
        return b": keep-alive\n\n"

    def progress(self) -> dict[str, Any]:
        """How much of the prompt is computed, as a `slipstream` object, if the request asked for it."""
        choice = self.turn.choices[0]
        if not choice.request.progress or choice.active is None:
            return {}
        sequence, total = choice.active.sequence, choice.active.counters.prompt_tokens
        done = 0 if sequence is None else min(sequence.computed, total)
        return {"slipstream": {"progress": {"prompt_tokens": total, "computed_tokens": done}}}

    def failed(self, failure: Failure) -> bytes:
        """The last event of a stream that breaks off, as most of OpenAI's clients expect it."""
        return b"data: " + openai_body(failure) + b"\n\n"


def event(data: dict[str, Any], name: str | None = None) -> bytes:
    """A server-sent event. It's ASCII, so that no character of a text is taken for the end of a line."""
    line = b"data: %b\n\n" % to_json(data, ensure_ascii=True, inf_nan_mode="null")
    return line if name is None else b"event: %b\n%b" % (name.encode(), line)


async def respond(http: Request, answer: Answer, *, stream: bool | None) -> Response:
    """The response to a request: at once as a stream, or when the turn is finished.

    The turn is cancelled if the client goes away; raises `ClientDisconnect` if it does so before the response.
    """
    if stream:
        return _EventStream(answer, http.url.path)
    finished = asyncio.ensure_future(answer.finish())
    gone = asyncio.ensure_future(_disconnect(http))
    try:
        await asyncio.wait((finished, gone), return_when=asyncio.FIRST_COMPLETED)
        if not finished.done():
            raise ClientDisconnect
        finished.result()
    finally:
        gone.cancel()
        finished.cancel()
        answer.turn.cancel()
    return Response(await answer.whole(), media_type="application/json")


class _EventStream(StreamingResponse):
    """The events of an answer, which is cancelled when nobody reads them any more."""

    media_type = "text/event-stream"

    def __init__(self, answer: Answer, path: str) -> None:
        # A proxy that buffers would undo the streaming.
        super().__init__(_events(answer, path), headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.turn.cancel()


async def _events(answer: Answer, path: str) -> AsyncIterator[bytes]:
    """All events, those that came together in one piece. An error becomes the last one."""
    try:
        if begun := answer.begin():
            yield begun
        silent = True
        async for batch in answer.batches():
            if events := b"".join(chain.from_iterable(map(answer.events, batch))):
                yield events
                silent = False
            elif not batch:
                if silent:
                    yield answer.alive()
                silent = True
        yield await answer.end()
    except Exception as error:
        yield answer.failed(failure_of(error, path))


async def _disconnect(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
