"""What one request may take: each limit has a name, and none that is beyond it freezes the server for the others."""

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest

from slipstream.config import FLAGS, LimitsConfig
from slipstream.errors import InvalidRequestError, LimitError
from slipstream.models import Model
from slipstream.server.bodies import count_values, parsed
from slipstream.server.intake import Intake
from slipstream.server.metrics import Metrics
from tests.server.process import Server, running_server
from tests.server.test_errors import CHAT, COMPLETIONS, function, user, with_answer, with_parameter

ENDPOINTS = (
    *(CHAT, COMPLETIONS, "/v1/responses", "/v1/messages", "/v1/messages/count_tokens"),
    *("/v1/sessions", "/v1/sessions/s/messages", "/v1/conversations", "/tokenize"),
)
JSON = {"Content-Type": "application/json"}


def tools(count: int) -> list[dict[str, Any]]:
    return [function(f"f{at}") for at in range(count)]


@pytest.mark.parametrize(
    ("path", "body", "limit", "param"),
    [
        (CHAT, {"messages": [{"role": "user", "content": ""}] * 10_001}, "max_messages", "messages"),
        ("/v1/responses", {"input": [{"role": "user", "content": ""}] * 10_001}, "max_messages", "input"),
        ("/v1/conversations", {"items": [{"role": "user", "content": ""}] * 10_001}, "max_messages", "items"),
        (CHAT, {**user("x"), "tools": tools(10_000)}, "max_tools", "tools"),
        ("/v1/sessions", {"tools": tools(513)}, "max_tools", "tools"),
        (CHAT, {**user("x"), "stop": ["a"] * 65}, "max_stop", "stop"),
        ("/v1/messages", {**user("x"), "max_tokens": 1, "stop_sequences": ["a"] * 65}, "max_stop", "stop_sequences"),
        (CHAT, {**user("x"), "logit_bias": {str(at): 1 for at in range(1025)}}, "max_logit_bias", "logit_bias"),
        (CHAT, {**user("x"), "n": 129}, "max_choices", "n"),
        (COMPLETIONS, {"prompt": ["a"] * 129}, "max_choices", "prompt"),
        (COMPLETIONS, {"prompt": ["a"] * 100, "n": 2}, "max_choices", "n"),
        (CHAT, user("a" * 4_000_001), "max_characters", None),
        (CHAT, {**user("x"), "a": [[]] * 80_000}, "max_values", None),
        (CHAT, with_parameter({"enum": ["x" * 99] * 6000}), "max_schema", "tools[1].function.parameters"),
        (CHAT, {**user("x"), "tools": [function(f"f{n}", parameters={"title": "x" * 9999}) for n in range(60)]},
         "max_schema", "tools"),
        (CHAT, with_answer({"enum": ["x" * 99] * 6000}), "max_schema", "response_format.json_schema.schema"),
    ],
)  # fmt: skip
def test_a_limit_names_itself_and_is_counted(
    server: Server, http: httpx.Client, path: str, body: dict[str, Any], limit: str, param: str | None
) -> None:
    metric = f"slipstream_refusals_total {limit}"
    before = server.metrics().get(metric, 0)
    response = http.post(path, json=body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert FLAGS[limit] in error["message"]
    if path != "/v1/messages":
        assert error["param"] == param
    assert server.metrics()[metric] == before + 1


@pytest.mark.parametrize("path", ENDPOINTS)
def test_half_a_surrogate_pair_is_refused_wherever_it_stands(http: httpx.Client, path: str) -> None:
    half = "\ud83c"
    for body, param in (
        (user(half), "messages[0].content"),
        ({"messages": [{"role": "tool", "tool_call_id": half, "content": "x"}]}, "messages[0].tool_call_id"),
        ({**user("x"), "tools": [function("fine"), function(description=half)]}, "tools[1].function.description"),
        (with_parameter({"enum": ["a", half]}), "tools[1].function.parameters.properties.a.enum[1]"),
        ({"prompt": half}, "prompt"),
        ({"input": half}, "input"),
        ({half: 1}, None),
    ):
        response = http.post(path, content=json.dumps(body), headers=JSON)
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert "valid Unicode" in error["message"]
        assert param is None or param in error["message"]
    whole = http.post(path, content=json.dumps({"messages": "\ud83c\udf0a"}), headers=JSON)
    assert "valid Unicode" not in whole.text


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(user("1" * 500_000), id="digits that are a token each"),
        pytest.param(user("a" * 500_000), id="one long word"),
        pytest.param({**user("x"), "tools": tools(500)}, id="many tools"),
    ],
)
def test_others_are_answered_while_a_large_body_is_looked_at(server: Server, body: dict[str, Any]) -> None:
    """A count, no time: a server that is frozen answers nothing before the large request is done."""
    done = threading.Event()

    def ask() -> None:
        with server.http() as http:
            responses.append(http.post(CHAT, json={"max_tokens": 1, **body}))
        done.set()

    responses: list[httpx.Response] = []
    with server.http() as http:
        thread = threading.Thread(target=ask)
        thread.start()
        answered = 0
        while not done.is_set():
            assert http.get("/health").status_code == 200
            answered += 1
        thread.join()
    assert responses[0].status_code in (200, 400)
    assert answered >= 5


def test_what_can_not_fit_is_not_tokenised(http: httpx.Client) -> None:
    for path, body, param in (
        (CHAT, user("1" * 3_900_000), "messages"),
        (COMPLETIONS, {"prompt": " " * 10**6}, "prompt"),
    ):
        error = http.post(path, json=body).json()["error"]
        assert (error["code"], error["param"]) == ("context_length_exceeded", param)
        assert "characters is too long" in error["message"]


def test_json_alone_is_taken(http: httpx.Client) -> None:
    for content in (
        b'{"prompt": NaN}',
        b'{"prompt": "a", "seed": Infinity}',
        b'{"prompt": "\xed\xa0\x80"}',
        b"\xff\xfe{\0}\0",
    ):
        response = http.post(COMPLETIONS, content=content, headers=JSON)
        assert response.status_code == 400, response.text


@pytest.mark.parametrize(
    ("body", "count"),
    [
        (b"[]", 1),
        (b"[[],[]]", 4),
        (b'{"a":1,"b":[2,3]}', 4),
        (b'",[{"', 0),
        (b'["a,b","c\\",d"]', 2),
        (b'["\\\\",1]', 2),
        (b'["\\\\\\",1",2]', 2),
        (b'[",,,', 1),
        (b'["' + b"\\" * 99, 1),
    ],
)
def test_values_are_counted_outside_of_text(body: bytes, count: int) -> None:
    assert count_values(body, count) <= count
    assert count_values(body, count - 1) > count - 1


def test_deep_bodies_are_measured_without_a_deep_stack() -> None:
    limits = LimitsConfig(max_characters=1000)
    deep: Any = "x" * 1001
    for _ in range(300):
        deep = [deep]
    with pytest.raises(LimitError, match="1,002 characters"):
        parsed(json.dumps({"a": deep}).encode(), limits)
    with pytest.raises(InvalidRequestError, match="surrogate"):
        parsed(b'{"a": ' + b"[" * 300 + b'"\\ud800"' + b"]" * 300 + b"}", limits)


@pytest.fixture(scope="module")
def small(model: Model) -> Iterator[Server]:
    """A server that takes little at a time."""
    options = ("--max-bodies", "20KiB", "--read-timeout", "1", "--idle-timeout", "1", "--max-messages", "3")
    with running_server(*options, "--sandbox-seconds", "0.001") as server:
        yield server


def begun(server: Server, head: str) -> socket.socket:
    """A connection on which a request has begun."""
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=600)
    connection.sendall(head.encode())
    return connection


POST = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def test_a_limit_can_be_set(small: Server) -> None:
    with small.http() as http:
        response = http.post(CHAT, json={"messages": [{"role": "user", "content": "x"}] * 4})
    assert "3 (--max-messages)" in response.json()["error"]["message"]


def test_bytes_beyond_the_limit_are_asked_to_come_again(small: Server) -> None:
    with small.http() as http:
        for content in (b"x" * 21_000, iter([b"x" * 21_000])):
            response = http.post(COMPLETIONS, content=content, headers=JSON)
            assert (response.status_code, response.headers["Retry-After"]) == (429, "1")
            assert "--max-bodies" in response.json()["error"]["message"]
    assert small.metrics()["slipstream_refusals_total max_bodies"] > 0


def test_requests_beyond_the_limit_are_asked_to_come_again() -> None:
    statuses: list[int] = []

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def note(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    async def ask() -> None:
        metrics = cast(Metrics, SimpleNamespace(refused=lambda limit: None))
        intake = Intake(answer, limits=LimitsConfig(max_requests=2), metrics=metrics)
        bodies = asyncio.Queue[Any]()
        scope = {"type": "http", "path": CHAT, "headers": []}
        held = [asyncio.create_task(intake(scope, bodies.get, note)) for _ in range(2)]
        await asyncio.sleep(0)
        await intake(scope, bodies.get, note)
        await intake({**scope, "path": "/health"}, lambda: asyncio.sleep(0), note)
        for _ in held:
            bodies.put_nowait({"type": "http.request", "body": b""})
        await asyncio.gather(*held)
        bodies.put_nowait({"type": "http.request", "body": b""})
        await intake(scope, bodies.get, note)

    asyncio.run(ask())
    assert statuses == [429, 200, 200, 200, 200]


@pytest.mark.parametrize(
    "head", ["", "POST /v1/comp", f"{POST}Content-Length: 9\r\n\r\n{{"], ids=["none", "half", "body"]
)
def test_a_request_that_does_not_come_is_not_waited_for(small: Server, head: str) -> None:
    with begun(small, head) as connection:
        answer = b""
        while piece := connection.recv(4096):
            answer += piece
            if b"--read-timeout" in answer:
                break
    assert ("408" in answer.decode()) == head.startswith(POST)


def test_a_connection_that_stays_idle_is_closed(small: Server) -> None:
    with begun(small, "GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n") as connection:
        answer = b""
        while piece := connection.recv(4096):
            answer += piece
    assert answer.startswith(b"HTTP/1.1 200")


def test_what_ends_a_sandbox_names_its_limits_and_is_counted(small: Server) -> None:
    metrics = [f"slipstream_sandbox_deaths_total {name}" for name in ("grammar", "template")]
    before = small.metrics()
    many = {"properties": {f"p{at}": {"pattern": "^a{1,9}$", "type": "string"} for at in range(200)}}
    with small.http() as http:
        response = http.post(CHAT, json=with_answer(many))
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["code"] == "schema_too_complex"
    assert "(--sandbox-seconds, --sandbox-memory)" in error["message"]
    after = small.metrics()
    assert [after[name] - before[name] for name in metrics] == [1, 0]
