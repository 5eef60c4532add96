"""How much may come in at the same time, and how slowly: counted before anything is read, and while it is."""

import asyncio
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from slipstream.config import LimitsConfig
from slipstream.errors import OverloadedError, SlipstreamError
from slipstream.fields import Option
from slipstream.server.errors import error_response, failure_of
from slipstream.server.keys import Client
from slipstream.server.metrics import Metrics

RETRY_AFTER_SECONDS = 1

_UNCOUNTED = frozenset({"/health", "/metrics"})
"""What tells how a server fares that is full."""


class Intake:
    """ASGI middleware that bounds requests in flight, the bytes of their bodies, and how long one takes to send.

    Requests are bounded in all, by key and by tenant.
    """

    def __init__(self, app: ASGIApp, *, limits: LimitsConfig, metrics: Metrics) -> None:
        self._app = app
        self._limits = limits
        self._metrics = metrics
        self._requests = 0
        self._bytes = 0
        self._by_quota = Counter[bytes]()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request pass, or answer it."""
        if scope["path"] in _UNCOUNTED:
            await self._app(scope, receive, send)
            return
        client: Client = scope.get("state", {}).get("client", Client())
        body = _Body()
        self._requests += 1
        self._by_quota.update(quota.id for quota in client.quotas)
        try:
            if (refusal := self._refusal(client, Headers(scope=scope))) is None:
                await self._app(scope, partial(self._received, body, receive), send)
            else:
                if isinstance(refusal, OverloadedError):
                    self._metrics.refused(refusal.limit)
                await error_response(failure_of(refusal, scope["path"]), scope["path"])(scope, receive, send)
        finally:
            self._requests -= 1
            self._by_quota -= Counter(quota.id for quota in client.quotas)  # which keeps no zeros
            self._bytes -= body.size

    async def _received(self, body: "_Body", receive: Receive) -> Message:
        """The next part of a body, counted, within the time for one; afterwards that the client has gone."""
        if body.complete:
            return await receive()
        try:
            message = await asyncio.wait_for(receive(), self._limits.read_timeout)
        except TimeoutError:
            self._metrics.refused("read_timeout")
            patience = f"{self._limits.read_timeout:g} s (--read-timeout)"
            raise HTTPException(408, f"the body did not come within {patience}: send it again") from None
        body.complete = message["type"] != "http.request" or not message.get("more_body", False)
        size = len(message.get("body", b""))
        body.size += size
        self._bytes += size
        if body.size > self._limits.max_body:
            raise self._too_large()
        if self._bytes > self._limits.max_bodies:
            raise self._full("max_bodies")
        return message

    def _refusal(self, client: Client, headers: Mapping[str, str]) -> Exception | None:
        declared = headers.get("content-length", "")
        size = int(declared) if declared.isdecimal() and len(declared) < 20 else 0
        if size > self._limits.max_body:
            return self._too_large()
        if self._requests > self._limits.max_requests:
            return self._full("max_requests")
        for quota in client.quotas:
            if self._by_quota[quota.id] > quota.max_requests:
                message = f"this {quota.holder} has {quota.max_requests} requests under way, as many as it may have: "
                limit = f"max_requests_of_{quota.holder}"
                return OverloadedError(message, "try again", retry_after=RETRY_AFTER_SECONDS, limit=limit)
        return self._full("max_bodies") if self._bytes + size > self._limits.max_bodies else None

    def _too_large(self) -> HTTPException:
        self._metrics.refused("max_body")
        most = self._limits.max_body.human_readable()
        return HTTPException(413, f"the body is too large: send at most {most} (--max-body)")

    def _full(self, limit: str) -> SlipstreamError:
        message = "the server has as many requests as it takes at a time ("
        return OverloadedError(message, Option(limit), "): try again", retry_after=RETRY_AFTER_SECONDS, limit=limit)


@dataclass(slots=True)
class _Body:
    """What of a body has come in."""

    size: int = 0
    complete: bool = False
