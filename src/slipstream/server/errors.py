"""What went wrong, as HTTP tells it."""

import json
import logging
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from itertools import compress
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from slipstream.errors import (
    ContextLengthError,
    EngineStoppedError,
    InvalidRequestError,
    LimitError,
    LogitsError,
    OverloadedError,
    SessionConflictError,
    SlipstreamError,
    StorageError,
)
from slipstream.fields import PROMPT, Field
from slipstream.server.field_names import names_at
from slipstream.server.overflow import overflow_message

logger = logging.getLogger(__name__)
T = TypeVar("T")

OVERFLOW = "context_length_exceeded"
"""The code of a prompt that is too long."""

CLIENT_GONE = 499
"""Nobody reads it; it keeps such requests apart in the metrics (nginx's number)."""

_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
}
"""By status; others are the client's fault or the server's."""

_KINDS: Mapping[type[SlipstreamError], tuple[int, str, str]] = {
    LogitsError: (500, "server_error", "no_numbers"),
    StorageError: (507, "server_error", "storage_failed"),
    OverloadedError: (429, "rate_limit_error", "overloaded"),
    SessionConflictError: (409, "invalid_request_error", "session_conflict"),
    EngineStoppedError: (503, "server_error", "shutting_down"),
}
"""The status, type and code of errors that are not about a field."""

_HTTP_CODES = {413: "request_entity_too_large"}
"""The codes of statuses that Python calls differently from version to version; of others, the status's name."""


@dataclass(frozen=True, slots=True)
class Failure:
    """An error, before a protocol gives it its shape."""

    status: int
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


def failure_of(error: Exception, path: str) -> Failure:
    """The failure in the words of the protocol at `path`; what nobody foresaw goes to the log, not to the client."""
    names = names_at(path)
    if isinstance(error, RequestValidationError):
        error = _invalid_body(error.errors())
    match error:
        case ContextLengthError():
            message = overflow_message(error, path, error.worded(names))
            # Anthropic's clients match its whole message, which no name of a field may begin.
            param = None if path.startswith("/v1/messages") else PROMPT.named(names)
            return Failure(400, message, param=param, code=error.code)
        case InvalidRequestError():
            status = 404 if error.code.endswith("_not_found") else 400
            param = error.param.named(names) if isinstance(error.param, Field) else error.param
            return Failure(status, error.worded(names), param=param, code=error.code)
        case SlipstreamError() if type(error) in _KINDS:
            status, kind, code = _KINDS[type(error)]
            headers = {"Retry-After": str(error.retry_after)} if error.retry_after is not None else {}
            return Failure(status, error.worded(names), kind, code=code, headers=headers)
        case HTTPException():
            status = error.status_code
            code = _HTTP_CODES.get(status) or HTTPStatus(status).phrase.lower().replace(" ", "_")
            return Failure(status, str(error.detail), code=code, headers=error.headers or {})
    id = f"err_{secrets.token_hex(8)}"
    logger.error("%s failed (%s)", path, id, exc_info=error)
    message = f"the server failed to answer this request; its log says more, under {id}"
    return Failure(500, message, "server_error", code="internal_error")


def missing(param: str) -> InvalidRequestError:
    """An error about a field that isn't there."""
    return InvalidRequestError(param, " is required", param=param, code="missing_required_parameter")


def given(value: T | None, param: str) -> T:
    """The value of a field; raises `InvalidRequestError` if it isn't there."""
    if value is None:
        raise missing(param)
    return value


def unsupported(param: str, complaint: str) -> InvalidRequestError:
    """An error about a field that asks for what can't be had."""
    return InvalidRequestError(param, " ", complaint, param=param, code="unsupported_value")


def unreadable(param: str, kind: str, wanted: str = "text") -> InvalidRequestError:
    """An error about content of a kind that no model here reads."""
    complaint = f"is of type {kind!r}, but this server's models read text alone: send type {wanted!r}"
    return unsupported(param, complaint)


def not_read(kind: str) -> str:
    """The text that stands for content of a kind that no model here reads, in the result of a call."""
    return f"[{kind}: left out, because this model reads text alone]"


def openai_body(failure: Failure) -> bytes:
    """OpenAI's error object; ASCII, so that whatever a client sent can be quoted in it."""
    error = {"message": failure.message, "type": failure.type, "param": failure.param, "code": failure.code}
    return json.dumps({"error": error}).encode()


def anthropic_body(failure: Failure) -> bytes:
    """Anthropic's error object, which has no place for the field but the message."""
    unnamed = failure.param is not None and failure.param not in failure.message
    kind = "api_error" if failure.status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
    error = {
        "type": _ANTHROPIC_TYPES.get(failure.status, kind),
        "message": f"{failure.param}: {failure.message}" if unnamed else failure.message,
        "details": {"error_code": failure.code},
    }
    return json.dumps({"type": "error", "error": error}).encode()


def error_response(failure: Failure, path: str) -> Response:
    """The answer to a request that failed, in the shape of the protocol that is spoken at `path`."""
    body = anthropic_body if path.startswith("/v1/messages") else openai_body
    return Response(body(failure), failure.status, headers=dict(failure.headers), media_type="application/json")


def install_error_handlers(app: FastAPI) -> None:
    """Give every error of the app its protocol's shape."""
    for kind in (RequestValidationError, SlipstreamError, HTTPException):
        app.add_exception_handler(kind, _answer)
    app.add_exception_handler(ClientDisconnect, lambda *_: Response(status_code=CLIENT_GONE))
    app.add_middleware(_LastResort)


class _LastResort:
    """ASGI middleware that answers where an error was not foreseen.

    The framework's own handler raises the error again, for which the server drops the connection under the client.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def noting(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except Exception as error:
            if started:
                raise
            await error_response(failure_of(error, scope["path"]), scope["path"])(scope, receive, send)


async def _answer(request: Request, error: Exception) -> Response:
    """A coroutine, for a plain function would wait until the routes that wait leave it a thread."""
    if isinstance(error, HTTPException) and isinstance(error.__cause__, SlipstreamError):
        error = error.__cause__  # which the framework made an HTTP error of, while it read the body
    failure = failure_of(error, request.url.path)
    if isinstance(error, LimitError | OverloadedError):
        request.app.state.metrics.refused(error.limit)
    elif isinstance(error, HTTPException):
        failure = _advised(failure, request)
    return error_response(failure, request.url.path)


def _advised(failure: Failure, request: Request) -> Failure:
    """What the framework raises, in better words."""
    path = request.url.path
    match failure.status:
        case HTTPStatus.BAD_REQUEST:
            message = "the body can't be read: send JSON in UTF-8, nested no deeper than people would"
        case HTTPStatus.NOT_FOUND:
            message = f"there is no {path} here: chat is at /v1/chat/completions, and /docs lists the rest"
        case HTTPStatus.METHOD_NOT_ALLOWED:  # the framework names the methods of the path's first route alone
            scopes = [{**request.scope, "method": name} for name in ("GET", "HEAD", "POST", "PATCH", "DELETE")]
            fit = [any(route.matches(scope)[0] is Match.FULL for route in request.app.routes) for scope in scopes]
            allowed = ", ".join(scope["method"] for scope in compress(scopes, fit))
            message = f"{path} does not take {request.method}: use {allowed}"
            return replace(failure, message=message, headers={"Allow": allowed})
        case _:
            return failure
    return replace(failure, message=message)


def _invalid_body(errors: Sequence[Mapping[str, Any]]) -> InvalidRequestError:
    """The first thing that is wrong with a request's body."""
    first = errors[0]
    if first["type"] == "json_invalid":
        at, cause = first["loc"][-1], first["ctx"]["error"]
        return InvalidRequestError(f"the body is not valid JSON: {cause} at character {at}", code="invalid_json")
    param = field_path(first["loc"][1:])
    if not param:
        message = "the body must be a JSON object, sent with Content-Type: application/json"
        return InvalidRequestError(message, code="invalid_body")
    if first["type"] == "missing":
        return missing(param)
    if first["type"] == "extra_forbidden":
        message = f"{param} is not a field that exists: leave it out"
        return InvalidRequestError(message, param=param, code="unknown_parameter")
    complaint, sent = str(first["msg"]).removeprefix("Value error, "), repr(first["input"])
    quoted = sent if len(sent) <= 60 else f"{sent[:57]}..."
    message = f"{param}: {complaint[:1].lower()}{complaint[1:]}, not {quoted}"
    return InvalidRequestError(message, param=param)


def field_path(location: Sequence[str | int]) -> str:
    """A field's place in a body as people write it: `messages[0].content`."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not part.startswith("["):  # pydantic's mark for the key of a mapping, or the tag of a union's member
            path += f".{part}" if path else part
    return path
