"""The OpenAPI description: what FastAPI knows of the routes, and what holds for all of them."""

import threading
from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel

_JSON = "application/json"
_KEYS = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}
_EMPTY_BODY = {"content": {_JSON: {"schema": {"type": "object"}}}}


class OpenAIProblem(BaseModel):
    """What is wrong with a request."""

    message: str
    type: str
    param: str | None
    """The field that is at fault."""
    code: str | None


class OpenAIError(BaseModel):
    """An error as OpenAI's clients read it."""

    error: OpenAIProblem


class AnthropicDetails(BaseModel):
    """What Anthropic's clients pass over."""

    error_code: str | None


class AnthropicProblem(BaseModel):
    """What is wrong with a request; the message names the field."""

    type: str
    message: str
    details: AnthropicDetails


class AnthropicError(BaseModel):
    """An error as Anthropic's clients read it."""

    type: Literal["error"]
    error: AnthropicProblem


class Deleted(BaseModel):
    """What is left of something."""

    id: str
    object: Literal["session.deleted", "conversation.deleted", "response"]
    deleted: Literal[True] = True


Responses = dict[int | str, dict[str, Any]]


def errors(model: type[BaseModel]) -> Responses:
    """All errors of a route."""
    return {
        "4XX": {"model": model, "description": "The request can't be answered as it is"},
        "5XX": {"model": model, "description": "The server can't answer it, or not now"},
    }


WHOLE_OR_STREAM: Responses = {200: {"content": {_JSON: {}, "text/event-stream": {}}}}
"""The answer of a route that streams if it's asked to."""


class DescribedApp(FastAPI):
    """An app whose errors are OpenAI's, which may want a key, and wants JSON wherever something may change."""

    _making = threading.Lock()

    def openapi(self) -> dict[str, Any]:
        """The description, made once; thread-safe."""
        with self._making:
            if self.openapi_schema is None:
                _complete(super().openapi())
            assert self.openapi_schema is not None
            return self.openapi_schema


def _complete(api: dict[str, Any]) -> None:
    api["components"]["securitySchemes"] = _KEYS
    api["security"] = [{}, *({name: []} for name in _KEYS)]  # none at all, if the server has no keys
    for methods in api["paths"].values():
        for method, operation in methods.items():
            if method in ("post", "patch"):  # the server does without a body, but not without its content type
                operation["requestBody"] = _EMPTY_BODY | operation.get("requestBody", {}) | {"required": True}
