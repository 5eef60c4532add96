"""What every request passes before it reaches a route: who asks; and that it's counted."""

import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from slipstream.server.errors import CLIENT_GONE, Failure, error_response
from slipstream.server.metrics import Metrics

_OPEN_PATHS = frozenset({"/", "/health"})
_NO_ENTRY = Failure(
    status=401,
    message="the API key is missing or wrong: send the server's as `Authorization: Bearer KEY` or `x-api-key: KEY`",
    code="invalid_api_key",
    headers={"WWW-Authenticate": "Bearer"},
)


class Gate:
    """ASGI middleware that refuses requests without the API key."""

    def __init__(self, app: ASGIApp, *, api_key: str | None) -> None:
        self._app = app
        self._api_key = api_key.encode() if api_key is not None else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request pass, or answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if scope["path"] not in _OPEN_PATHS and not self._admits(headers):
            await error_response(_NO_ENTRY, scope["path"])(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _admits(self, headers: Headers) -> bool:
        if self._api_key is None:
            return True
        scheme, _, token = headers.get("authorization", "").partition(" ")
        keys = (token.strip() if scheme.lower() == "bearer" else "", headers.get("x-api-key", ""))
        return any(hmac.compare_digest(key.encode("latin-1"), self._api_key) for key in keys)


class RequestCounter:
    """ASGI middleware that counts requests by route and status."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass everything on, and note the status."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = CLIENT_GONE

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.answered(route, scope["method"], status)
