"""What clients see of errors that nobody foresaw: that there was one, and nothing of its inside."""

import asyncio
import json
import socket
import threading
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
from anyio.to_thread import current_default_thread_limiter
from fastapi import FastAPI

from slipstream.chat import NO_SETTING, Message, Prompt
from slipstream.chat.answers import Dialect
from slipstream.chat.messages import History
from slipstream.config import ServerConfig
from slipstream.engine import EngineRequest, Output, TurnCounters
from slipstream.errors import SlipstreamError
from slipstream.runtime import Runtime
from slipstream.server import run
from slipstream.server.app import create_app
from slipstream.server.errors import install_error_handlers
from slipstream.server.keys import KeyRing
from slipstream.sessions import SessionTurn
from slipstream.tokens import Tokens
from slipstream.turns import Turns

Submit = Callable[[EngineRequest, Callable[[Output], None]], Any]


def post(submit: Submit, *, stream: bool) -> httpx.Response:
    """The answer of an app over an engine whose `submit` is this."""
    prompt = Prompt(Tokens([1, 1, 1]), "conv_1", History(b"", []))
    turn = SessionTurn("", None, (Message("user", "Hello"),), NO_SETTING)
    session_turns = SimpleNamespace(
        claim=lambda *asked, **how: turn,
        prepare=lambda turn, prompt, reuse: None,
        answered=lambda *answer: None,
        release=lambda turn: None,
    )
    core: Any = SimpleNamespace(limits=SimpleNamespace(max_sequence=64), submit=submit, cancel=lambda active: None)
    conversations: Any = SimpleNamespace(prompt=lambda messages, tools, tenant: prompt, renders=None)
    parts: Any = session_turns, conversations
    runtime = SimpleNamespace(
        sessions=None,
        database=None,
        model=SimpleNamespace(name="m", fingerprint="0" * 64),
        exact=True,
        core=core,
        turns=Turns(core, *parts, Dialect(""), cast(Any, None), lambda text: []),
        tokenizer=None,
    )
    transport = httpx.ASGITransport(
        create_app(cast(Runtime, runtime), ServerConfig(), KeyRing()), raise_app_exceptions=False
    )
    body = {"messages": [{"role": "user", "content": "Hello"}], "stream": stream}

    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.post("/v1/chat/completions", json=body)

    return asyncio.run(send())


def fails_at_once(request: EngineRequest, sink: Callable[[Output], None]) -> None:
    raise RuntimeError("secret")


def fails_later(request: EngineRequest, sink: Callable[[Output], None]) -> object:
    outputs = [
        Output(text="So", token_ids=(1,)),
        Output(finish_reason="error", error=RuntimeError("secret"), counters=TurnCounters()),
    ]
    threading.Thread(target=lambda: [sink(output) for output in outputs]).start()
    return object()


@pytest.mark.parametrize("submit", [fails_at_once, fails_later])
def test_internal_error_keeps_its_secrets(submit: Submit) -> None:
    response = post(submit, stream=False)
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert "secret" not in response.text


def test_stream_that_breaks_off_ends_with_an_error() -> None:
    response = post(fails_later, stream=True)
    assert response.status_code == 200
    *_, last, rest = response.text.split("\n\n")
    assert rest == ""
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "internal_error"
    assert "secret" not in response.text


def test_taken_port_is_said_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = ServerConfig(port=taken.getsockname()[1])
        with pytest.raises(SlipstreamError, match="--port"):
            run(lambda: cast(Runtime, nullcontext()), config)


def test_errors_do_not_wait_for_routes_that_wait() -> None:
    app, free = FastAPI(), threading.Event()
    install_error_handlers(app)

    @app.get("/")
    def waiting() -> None:
        free.wait()

    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            limiter = current_default_thread_limiter()
            waits = [asyncio.create_task(client.get("/")) for _ in range(int(limiter.total_tokens))]
            try:
                while limiter.available_tokens:
                    await asyncio.sleep(0.01)
                return await asyncio.wait_for(client.get("/nothing"), timeout=20)
            finally:
                free.set()
                await asyncio.gather(*waits)

    assert asyncio.run(send()).status_code == 404
