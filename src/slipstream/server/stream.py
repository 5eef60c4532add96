"""Answers on their way to a client, which may go away at any time."""

import asyncio
from collections.abc import AsyncIterator, Callable

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from slipstream.server.errors import Failure, failure_of
from slipstream.server.turn import LiveTurn


class EventStream(StreamingResponse):
    """Server-sent events of a turn, which is cancelled if the client goes away.

    `events` yields them encoded, any number at a time. An error that it raises becomes the last one: `error_event` has
    the protocol's shape for it.
    """

    media_type = "text/event-stream"

    def __init__(self, turn: LiveTurn, events: AsyncIterator[bytes], error_event: Callable[[Failure], bytes]) -> None:
        # A proxy that buffers would undo the streaming.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, headers=headers)
        self._turn = turn
        self._events = events
        self._error_event = error_event

    async def stream_response(self, send: Send) -> None:
        """Send the headers, the events, and the error that ended them, if one did."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for event in self._events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        except Exception as error:
            last = self._error_event(failure_of(error, self._path))
            await send({"type": "http.response.body", "body": last, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with the stream."""
        self._path = scope["path"]
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._turn.cancel()


async def finish(http: Request, turn: LiveTurn) -> None:
    """Wait until the turn is finished; raises `ClientDisconnect`, and cancels it, if the client goes away before."""
    finished = asyncio.ensure_future(turn.finish())
    gone = asyncio.ensure_future(_disconnect(http))
    try:
        await asyncio.wait((finished, gone), return_when=asyncio.FIRST_COMPLETED)
        if not finished.done():
            raise ClientDisconnect
        finished.result()
    finally:
        gone.cancel()
        finished.cancel()
        turn.cancel()


async def _disconnect(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
