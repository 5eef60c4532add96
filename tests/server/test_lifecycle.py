"""Clients that go away, servers that are full, keys, and the end of a server."""

import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from slipstream.models import Model
from tests.server.process import MODEL, Server, running_server
from tests.waiting import HANG, wait_until

LONG: Any = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Tell me a very long story."}],
    "max_tokens": 8000,
    "extra_body": {"ignore_eos": True},
}


def long_stream(client: OpenAI) -> Any:
    """A stream that has begun and won't end by itself for a long time."""
    stream = client.chat.completions.create(**LONG, stream=True)
    for _ in range(3):
        next(stream)
    return stream


def _listens(server: Server) -> bool:
    """Whether it takes connections, which it does until the first signal."""
    try:
        with socket.create_connection((httpx.URL(server.url).host, httpx.URL(server.url).port or 0)):
            return True
    except OSError:
        return False


def test_closed_stream_frees_its_work(server: Server, client: OpenAI) -> None:
    before = server.wait_until_idle()
    stream = long_stream(client)
    assert server.metrics()["slipstream_choices_running"] == 1
    stream.close()
    after = server.wait_until_idle()
    assert after["slipstream_kv_sequences running"] == 0
    assert after["slipstream_choices_total cancelled"] == before.get("slipstream_choices_total cancelled", 0) + 1


def test_impatient_client_frees_its_work(server: Server) -> None:
    server.wait_until_idle()
    body = {key: value for key, value in LONG.items() if key != "extra_body"} | {"ignore_eos": True, "n": 2}
    with server.http() as http, pytest.raises(httpx.ReadTimeout):
        http.post("/v1/chat/completions", json=body, timeout=0.4)
    server.wait_until_idle()
    name = "slipstream_http_requests_total POST /v1/chat/completions 499"
    assert server.wait_for(lambda metrics: name in metrics)[name] >= 1


@pytest.fixture(scope="module")
def small_server(server: Server) -> Iterator[Server]:
    with running_server("--max-running", "1", "--max-waiting", "1", api_key="s3cret") as small:
        yield small


def test_full_server_asks_to_come_back_later(small_server: Server) -> None:
    with small_server.openai() as client:
        running = long_stream(client)
        waiting = threading.Thread(target=lambda: long_stream(client).close())
        waiting.start()
        small_server.wait_for(lambda metrics: metrics["slipstream_choices_waiting"] == 1)
        with pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(**LONG)
        assert int(caught.value.response.headers["retry-after"]) > 0
        assert caught.value.code == "overloaded"
        running.close()
        waiting.join()
        small_server.wait_until_idle()


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic s3cret"}])
def test_key_is_needed(small_server: Server, headers: dict[str, str]) -> None:
    with httpx.Client(base_url=small_server.url, headers=headers) as stranger:
        assert stranger.get("/health").status_code == 200
        for response in (stranger.get("/metrics"), stranger.post("/v1/chat/completions", json={})):
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"
            assert response.json()["error"]["code"] == "invalid_api_key"


def test_running_stream_may_finish(server: Server) -> None:
    with running_server("--drain-seconds", str(HANG)) as ending, ending.openai() as client:
        stream = client.chat.completions.create(**(LONG | {"max_tokens": 100}), stream=True)
        chunks = [next(stream)]
        ending.process.send_signal(signal.SIGTERM)
        chunks += stream
        assert chunks[-1].choices[0].finish_reason == "length"
        assert chunks[-1].slipstream["completion_tokens"] == 100
        assert ending.wait_for_end() == 0


def test_stream_that_takes_too_long_is_told(server: Server) -> None:
    with running_server("--drain-seconds", "0.5") as ending, ending.openai() as client:
        stream = long_stream(client)
        ending.process.send_signal(signal.SIGINT)
        with pytest.raises(openai.APIError, match="shut down") as caught:
            list(stream)
        assert caught.value.code == "shutting_down"
        assert ending.wait_for_end() == 0


def test_second_signal_ends_at_once(server: Server) -> None:
    with running_server("--drain-seconds", str(HANG)) as ending, ending.openai() as client:
        stream = long_stream(client)
        ending.process.send_signal(signal.SIGTERM)
        wait_until(lambda: not _listens(ending))
        assert ending.process.poll() is None
        ending.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="shut down"):
            list(stream)
        assert ending.wait_for_end() == 0


STUCK = """
import logging, threading
from slipstream.backend.paged import PagedTicket
from slipstream.cli import main
from slipstream.server import serve
from slipstream.turns import Turns

def stuck(*arguments):
    logging.warning("stuck")
    threading.Event().wait()

serve._END_SECONDS = 1.0
{place} = stuck
main()
"""


@pytest.mark.parametrize("place", ["Turns.start", "PagedTicket.wait"], ids=["turn", "step"])
def test_a_server_ends_whatever_runs(model: Model, tmp_path: Path, place: str) -> None:
    log = tmp_path / "log"
    command = (sys.executable, "-c", STUCK.format(place=place))

    def ask() -> None:
        with ending.http() as http, suppress(httpx.HTTPError):
            http.post("/v1/completions", json={"prompt": "a"})

    options = ("--drain-seconds", "0.1", "--step-timeout", "0.2")
    with running_server(*options, command=command, log=log) as ending, ending.http() as http:
        assert http.get("/health").json()["status"] == "ok"
        asking = threading.Thread(target=ask)
        asking.start()
        wait_until(lambda: "stuck" in log.read_text())
        if place == "PagedTicket.wait":
            wait_until(lambda: http.get("/health").status_code == 503)
            assert http.get("/health").json()["status"] == "stalled"
        ending.process.send_signal(signal.SIGTERM)
        assert ending.wait_for_end() == 1
        asking.join()
    assert "in wait" in log.read_text()


GIVES_BACK = """
import logging
from slipstream.cli import main
from slipstream.server import serve

serve._IDLE_SECONDS = 0.05
give_back = serve.give_back_memory
serve.give_back_memory = lambda: (give_back(), logging.warning("given back"))
main()
"""


def test_freed_memory_is_given_back(model: Model, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with running_server(command=(sys.executable, "-c", GIVES_BACK), log=log) as server, server.http() as http:
        for times in (1, 2):
            assert http.post("/v1/completions", json={"prompt": "a", "max_tokens": 2}).is_success
            wait_until(lambda times=times: log.read_text().count("given back") >= times)
