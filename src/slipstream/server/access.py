"""Who gets in: requests with a key, under the server's own name, from no stranger's web page.

A server on a laptop can be reached by every web page that its owner opens. Three checks keep those out. The `Host`
must be a name of this server, or a page could point its own name here (DNS rebinding). The `Origin`, which browsers
add, must be the server's own or an allowed one. And what changes something needs a JSON content type, which a page
can't send to another origin without asking first (a CORS preflight).
"""

import base64
import ipaddress
from collections.abc import Iterator
from contextlib import suppress
from typing import Annotated

from fastapi import Depends, Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from slipstream.config import ServerConfig
from slipstream.errors import InvalidRequestError
from slipstream.server.errors import Failure, error_response
from slipstream.server.keys import Client, KeyRing

_OPEN_PATHS = frozenset({"/", "/health"})
_DOCS_PATHS = frozenset({"/docs", "/openapi.json"})
"""Where a browser may ask its user for the key; what comes back can't be read by another origin."""


class Access:
    """ASGI middleware that refuses whoever may not use the server, and notes whose request it is."""

    def __init__(self, app: ASGIApp, *, keys: KeyRing, config: ServerConfig) -> None:
        self._app = app
        self._keys = keys
        self._hosts = frozenset(name.lower() for name in (*config.allowed_host, config.host))
        self._origins = frozenset(config.allow_origin)
        self._by_address = not is_loopback(config.host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request pass, or answer it."""
        headers, path = Headers(scope=scope), scope["path"]
        in_browser = path in _DOCS_PATHS
        refusal = self._wrong_place(scope, headers)
        client = self._keys.client(_offered(headers, basic=in_browser))
        if refusal is None and client is None and path not in _OPEN_PATHS:
            refusal = _no_key(in_browser=in_browser)
        if refusal is not None:
            await error_response(refusal, path)(scope, receive, send)
            return
        scope.setdefault("state", {})["client"] = client or Client(operator=False)
        await self._app(scope, receive, send)

    def _wrong_place(self, scope: Scope, headers: Headers) -> Failure | None:
        """Why a request is none of this server's business, if so."""
        host = headers.get("host", "")
        if not self._knows(_name_of(host)):
            advice = "use a loopback address, or start the server with --allowed-host NAME"
            return Failure(403, f"this server doesn't go by the name {host!r}: {advice}", code="host_not_allowed")
        origin = headers.get("origin")
        allowed = {*self._origins, f"{scope['scheme']}://{host}"}
        if origin is not None and origin not in allowed and "*" not in allowed:
            advice = "start the server with --allow-origin ORIGIN"
            message = f"web pages of {origin!r} may not use this server: {advice}"
            return Failure(403, message, code="origin_not_allowed")
        return None

    def _knows(self, name: str) -> bool:
        """Whether the server goes by a name; by any address, if it listens on more than loopback."""
        if "*" in self._hosts or name in self._hosts or is_loopback(name):
            return True
        if self._by_address:
            with suppress(ValueError):
                return bool(ipaddress.ip_address(name))
        return False


def _no_key(*, in_browser: bool) -> Failure:
    advice, challenge = "send the server's as `Authorization: Bearer KEY` or `x-api-key: KEY`", "Bearer"
    if in_browser:
        advice, challenge = "give it as the password, with any user name", 'Basic realm="Slipstream", charset="UTF-8"'
    message = f"the API key is missing or wrong: {advice}"
    return Failure(401, message, code="invalid_api_key", headers={"WWW-Authenticate": challenge})


def client_of(http: Request) -> Client:
    """Who sent a request that was let in."""
    client: Client = http.state.client
    return client


async def _tenant_of(http: Request) -> str:
    return client_of(http).tenant


TenantName = Annotated[str, Depends(_tenant_of)]
"""The tenant of a request, as a parameter of a route."""


async def require_json(http: Request) -> None:
    """Raise `InvalidRequestError` for what a web page could send here without asking, and could change something."""
    if http.method not in ("POST", "PUT", "PATCH"):  # the others that change something are always asked about first
        return
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        message = "the body must be a JSON object, sent with Content-Type: application/json, even if it's empty"
        raise InvalidRequestError(message, code="invalid_body")


def is_loopback(host: str) -> bool:
    """Whether a name or address always means this machine."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def _offered(headers: Headers, *, basic: bool) -> Iterator[bytes]:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        yield token.strip().encode("latin-1")
    elif scheme.lower() == "basic" and basic:
        with suppress(ValueError):
            yield base64.b64decode(token.strip()).partition(b":")[2]
    if (key := headers.get("x-api-key")) is not None:
        yield key.encode("latin-1")


def _name_of(host: str) -> str:
    """A `Host` header's name or address, without the port."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()
