"""What went wrong, as HTTP tells it."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from slipstream.errors import (
    EngineStoppedError,
    InvalidRequestError,
    OverloadedError,
    SessionConflictError,
    SlipstreamError,
)

logger = logging.getLogger(__name__)

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

_ANTHROPIC_NAMES = {
    "function.parameters": "input_schema",
    "function.name": "name",
    "response_format.json_schema.schema": "output_config.format.schema",
    "response_format": "output_config.format",
}
"""Fields that go by OpenAI's names where no protocol is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """An error, before a protocol gives it its shape."""

    status: int
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


def failure_of(error: Exception) -> Failure:
    """What to tell a client; of an error that nobody foresaw, nothing but that it happened."""
    failure: Failure
    match error:
        case RequestValidationError():
            failure = _invalid_body(error.errors())
        case InvalidRequestError():
            status = 404 if (error.code or "").endswith("_not_found") else 400
            failure = Failure(status=status, message=str(error), param=error.param, code=error.code or "invalid_value")
        case OverloadedError():
            headers = {"Retry-After": str(error.retry_after)}
            failure = Failure(
                status=429, message=str(error), type="rate_limit_error", code="overloaded", headers=headers
            )
        case SessionConflictError():
            headers = {"Retry-After": str(error.retry_after)} if error.retry_after is not None else {}
            failure = Failure(status=409, message=str(error), code="session_conflict", headers=headers)
        case EngineStoppedError():
            failure = Failure(status=503, message=str(error), type="server_error", code="shutting_down")
        case HTTPException():
            failure = Failure(
                status=error.status_code,
                message=str(error.detail),
                code=HTTPStatus(error.status_code).phrase.lower().replace(" ", "_"),
                headers=error.headers or {},
            )
        case _:
            message = "the server failed to answer this request; its log says more"
            failure = Failure(status=500, message=message, type="server_error", code="internal_error")
    return failure


def openai_body(failure: Failure) -> bytes:
    """OpenAI's error object; ASCII, so that whatever a client sent can be quoted in it."""
    error = {
        "message": failure.message,
        "type": failure.type,
        "param": failure.param,
        "code": failure.code,
    }
    return json.dumps({"error": error}).encode()


def anthropic_body(failure: Failure) -> bytes:
    """Anthropic's error object, which has no place for the field but the message."""
    kind = "api_error" if failure.status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
    error = {
        "type": _ANTHROPIC_TYPES.get(failure.status, kind),
        "message": _naming_field(failure),
        "details": {"error_code": failure.code},
    }
    return json.dumps({"type": "error", "error": error}).encode()


def error_response(failure: Failure, path: str) -> Response:
    """The answer to a request that failed, in the shape of the protocol that is spoken at `path`."""
    body = anthropic_body if path.startswith("/v1/messages") else openai_body
    return Response(body(failure), failure.status, headers=dict(failure.headers), media_type="application/json")


def openai_event(error: Exception) -> bytes:
    """The last event of a stream that breaks off, as OpenAI's clients expect it."""
    return b"data: " + openai_body(failure_of_stream(error)) + b"\n\n"


def anthropic_event(error: Exception) -> bytes:
    """The same for Anthropic's."""
    return b"event: error\ndata: " + anthropic_body(failure_of_stream(error)) + b"\n\n"


def install_error_handlers(app: FastAPI) -> None:
    """Give every error of the app its protocol's shape."""
    for kind in (RequestValidationError, SlipstreamError, HTTPException):
        app.add_exception_handler(kind, _answer)
    app.add_exception_handler(ClientDisconnect, _answer_nobody)
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
            if started or scope["type"] != "http":
                raise
            logger.exception("%s %s failed", scope["method"], scope["path"])
            await error_response(failure_of(error), scope["path"])(scope, receive, send)


def _answer(request: Request, error: Exception) -> Response:
    failure = failure_of(error)
    if failure.status == HTTPStatus.INTERNAL_SERVER_ERROR:
        logger.error("%s failed", request.url.path, exc_info=error)
    if isinstance(error, HTTPException) and (message := _advice(request, error)) is not None:
        failure = replace(failure, message=message)
    return error_response(failure, request.url.path)


def failure_of_stream(error: Exception) -> Failure:
    """What to tell a client whose stream breaks off; what nobody foresaw goes to the log."""
    failure = failure_of(error)
    if failure.status == HTTPStatus.INTERNAL_SERVER_ERROR:
        logger.error("a stream broke off", exc_info=error)
    return failure


def _naming_field(failure: Failure) -> str:
    """The message, with the field in it by the name that it has in Anthropic's protocol."""
    if failure.param is None:
        return failure.message
    name = failure.param
    for openai, anthropic in _ANTHROPIC_NAMES.items():
        name = name.replace(openai, anthropic)
    message = failure.message.replace(failure.param, name)
    return message if name in message else f"{name}: {message}"


def _advice(request: Request, error: HTTPException) -> str | None:
    """Better words for what the framework raises."""
    match error.status_code:
        case HTTPStatus.BAD_REQUEST:
            return "the body can't be read: send JSON in UTF-8, nested no deeper than people would"
        case HTTPStatus.NOT_FOUND:
            return f"there is no {request.url.path} here: chat is at /v1/chat/completions, and /docs lists the rest"
        case HTTPStatus.METHOD_NOT_ALLOWED:
            allowed = (error.headers or {}).get("Allow", "another method")
            return f"{request.url.path} does not take {request.method}: use {allowed}"
    return None


def _answer_nobody(_request: Request, _error: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)


def _invalid_body(errors: Sequence[Mapping[str, Any]]) -> Failure:
    """The first thing that is wrong with a request's body."""
    first = errors[0]
    if first["type"] == "json_invalid":
        at, cause = first["loc"][-1], first["ctx"]["error"]
        return Failure(
            status=400, message=f"the body is not valid JSON: {cause} at character {at}", code="invalid_json"
        )
    param = field_path(first["loc"][1:])
    if not param:
        message = "the body must be a JSON object, sent with Content-Type: application/json"
        return Failure(status=400, message=message, code="invalid_body")
    if first["type"] == "missing":
        return Failure(status=400, message=f"{param} is required", param=param, code="missing_required_parameter")
    if first["type"] == "extra_forbidden":
        message = f"{param} is not a field that exists: leave it out"
        return Failure(status=400, message=message, param=param, code="unknown_parameter")
    complaint = str(first["msg"]).removeprefix("Value error, ")
    message = f"{param}: {complaint[:1].lower()}{complaint[1:]}, not {_quoted(first['input'])}"
    return Failure(status=400, message=message, param=param, code="invalid_value")


def field_path(location: Sequence[str | int]) -> str:
    """A field's place in a body as people write it: `messages[0].content`."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not part.startswith("["):  # pydantic's mark for the key of a mapping, or the tag of a union's member
            path += f".{part}" if path else part
    return path


def _quoted(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
