"""What every request passes on its way to a route: its path is made the server's own, and it's counted."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from slipstream.server.errors import CLIENT_GONE
from slipstream.server.metrics import Metrics


class RequestCounter:
    """ASGI middleware that counts requests by route and status."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass everything on, and note the status."""
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


class RootPath:
    """ASGI middleware that takes the path under which a proxy serves the server off requests' paths.

    Some proxies take it off themselves, so that it may be there or not.
    """

    def __init__(self, app: ASGIApp, *, root_path: str) -> None:
        self._app = app
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass everything on, at its own path."""
        path = scope["path"]
        if self._root_path and (path + "/").startswith(self._root_path + "/"):
            scope = {**scope, "path": path[len(self._root_path) :] or "/"}
        await self._app(scope, receive, send)
