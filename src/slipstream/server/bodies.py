"""The body of a request: parsed and measured before anything else looks at it, and off the event loop if it's large."""

import asyncio
import json
import math
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json

from slipstream.config import LimitsConfig
from slipstream.errors import InvalidRequestError, LimitError
from slipstream.fields import Option
from slipstream.server.errors import field_path

_SMALL = 64 * 1024
"""Bytes that are parsed within a millisecond or so."""

# Where the protocols have what a request may not have too much of.
_COUNTED = (
    (("messages", "input", "items"), "entries", "max_messages"),
    (("tools",), "entries", "max_tools"),
    (("stop", "stop_sequences", "stop_token_ids"), "entries", "max_stop"),
    (("logit_bias",), "entries", "max_logit_bias"),
    (("n",), "choices", "max_choices"),
)
_SCHEMAS_OF_TOOLS: tuple[tuple[str, ...], ...] = (
    ("function", "parameters"),
    ("parameters",),
    ("input_schema",),
    ("custom", "format"),
    ("format",),
)
_SCHEMAS_OF_ANSWERS: tuple[tuple[str, ...], ...] = (
    ("response_format", "json_schema", "schema"),
    ("text", "format", "schema"),
    ("output_config", "format", "schema"),
)


_MARKS = (b",", b"[", b"{")
"""There is one before each value but the first, beside those of objects and lists themselves."""


class BodyRoute(APIRoute):
    """A route whose bodies are read by this module."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """What answers a request."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(_BodyRequest(request.scope, request.receive))

        return handle


class _BodyRequest(Request):
    """A request whose JSON keeps to the limits; the framework makes an HTTP error of what it raises, with its cause."""

    async def json(self) -> Any:
        """The body, parsed. Raises `InvalidRequestError` and `json.JSONDecodeError`."""
        body, limits = await self.body(), self.app.state.limits
        if len(body) <= _SMALL:
            return parsed(body, limits)
        return await asyncio.to_thread(parsed, body, limits)


def parsed(body: bytes, limits: LimitsConfig) -> Any:
    """The JSON of a body. No part of it holds the interpreter's lock for long.

    Raises `LimitError` for what is beyond a limit, `InvalidRequestError` for text that is no Unicode, and
    `ValueError` for what is no JSON.
    """
    if len(body) > limits.max_values:
        _require(None, count_values(body, limits.max_values), "values", "max_values", limits)
    try:
        value = from_json(body, allow_inf_nan=False, cache_strings=False)
    except ValueError:  # what is wrong, or just deep, the slower parser tells
        value = json.loads(body.decode())
        _require_expressible(value)
    if isinstance(value, dict):
        _measure(value, len(body), limits)
    return value


def count_values(body: bytes, most: int) -> int:
    """How many values JSON has, about; counts no further than is sure to be beyond `most`.

    Bytes are looked through by searches that each take well below a millisecond for a megabyte.
    """
    if (count := sum(body.count(mark) for mark in _MARKS)) <= most:
        return count  # with those in text
    count = at = 0
    while count <= most:
        opening = body.find(b'"', at)
        end = len(body) if opening < 0 else opening
        count += sum(body.count(mark, at, end) for mark in _MARKS)
        if opening < 0:
            break
        at = _end_of_string(body, opening + 1)
    return count


def _end_of_string(body: bytes, at: int) -> int:
    """Where JSON goes on after a string whose text begins at `at`."""
    while (end := body.find(b'"', at)) >= 0:
        backslashes = (end - at) - len(body[at:end].rstrip(b"\\"))
        if backslashes % 2 == 0:
            return end + 1
        at = end + 1
    return len(body)


def _require_expressible(value: Any) -> None:
    """Raise `InvalidRequestError`, naming the field, for what Python's parser takes and nothing expresses.

    That is half of a surrogate pair in a text, and NaN and Infinity.
    """
    for path, each in _scalars(value):
        param = field_path(path) or None
        if isinstance(each, float) and not math.isfinite(each):
            subject = param or "the body"
            raise InvalidRequestError(f"{subject} must be a finite number: JSON has no NaN or Infinity", param=param)
        text = each if isinstance(each, str) else ""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(text[error.start]):04x}"
            message = f"the text has a lone surrogate, {half}, at position {error.start}; send valid Unicode"
            raise InvalidRequestError(f"{param}: {message}" if param else message, param=param) from None


def _scalars(value: Any) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """All text, numbers and the like in JSON, and where they stand, keys too. Deep JSON needs no deep stack."""
    waiting: list[tuple[tuple[str | int, ...], Any]] = [((), value)]
    while waiting:
        path, each = waiting.pop()
        if isinstance(each, dict):
            for key, member in each.items():
                yield path, key
                waiting.append(((*path, key) if len(path) < 16 else path, member))
        elif isinstance(each, list):
            waiting.extend(((*path, at) if len(path) < 16 else path, member) for at, member in enumerate(each))
        else:
            yield path, each


def _measure(body: dict[str, Any], size: int, limits: LimitsConfig) -> None:
    """Raise `LimitError` if there is too much of something. `size` is the body's, in bytes."""
    for names, unit, limit in _COUNTED:
        for name in names:
            value = body.get(name)
            count = len(value) if isinstance(value, list | dict) else value if type(value) is int else 0
            _require(name, count, unit, limit, limits)
    prompts = body.get("prompt")
    if isinstance(prompts, list) and prompts and not isinstance(prompts[0], int):
        _require("prompt", len(prompts), "entries", "max_choices", limits)
    if size > limits.max_schema:
        _measure_schemas(body, limits)
    if size > limits.max_characters:
        characters = sum(len(each) for _, each in _scalars(body) if isinstance(each, str))
        _require(None, characters, "characters", "max_characters", limits)


def _measure_schemas(body: dict[str, Any], limits: LimitsConfig) -> None:
    total = 0
    for path, schema in _schemas(body):
        size = len(json.dumps(schema, ensure_ascii=False))
        total += size
        for param, count in ((field_path(path), size), ("tools", total)):
            _require(param, count, "bytes of JSON Schema", "max_schema", limits, code="schema_too_large")


def _schemas(body: dict[str, Any]) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    tools = body.get("tools")
    for index, tool in enumerate(tools if isinstance(tools, list) else ()):
        for path in _SCHEMAS_OF_TOOLS:
            if (schema := _at(tool, path)) is not None:
                yield ("tools", index, *path), schema
    for path in _SCHEMAS_OF_ANSWERS:
        if (schema := _at(body, path)) is not None:
            yield path, schema


def _at(value: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _require(
    param: str | None, count: int, unit: str, limit: str, limits: LimitsConfig, *, code: str = "limit_exceeded"
) -> None:
    most = int(getattr(limits, limit))
    if count > most:
        raise LimitError(param, count, unit, Option(limit), most, code=code)
