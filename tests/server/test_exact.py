"""Servers that say whether they are exact, one of them on a processor where nothing is."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from slipstream.models import Model
from tests.processors import NO_CLASS
from tests.server.process import MODEL, Server, running_server
from tests.short_model import room_for
from tests.waiting import HANG

CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "Name a colour."}], "max_tokens": 12, "temperature": 0}
TOLD = {
    "messages": [
        {
            "role": "user",
            "content": "Remember that the lighthouse has nine windows, four doors, and a cellar full of rope. " * 3,
        }
    ],
    "max_tokens": 8,
    "slipstream": {"session_id": "s"},
}


@pytest.fixture(scope="module")
def home(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of its own for what is measured, with the model's files."""
    home = tmp_path_factory.mktemp("home")
    folder = home / "models" / model.name
    folder.mkdir(parents=True)
    for path in model.path.iterdir():
        if path.is_file():
            (folder / path.name).symlink_to(path)
    return home


@dataclass
class Inexact:
    """Where a token's bits depend on its place in a step, so that no step class keeps them."""

    server: Server
    resumed: dict[str, Any]
    """The report of its first turn, of a conversation whose KV another processor computed and saved."""


@pytest.fixture(scope="module")
def inexact_after_exact(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Inexact]:
    environment, state = {"SLIPSTREAM_HOME": str(home)}, ("--state-dir", str(tmp_path_factory.mktemp("state")))
    with running_server(*state, environment=environment) as server, server.http() as http:
        assert http.post(CHAT, json=TOLD).json()["slipstream"]["reuse_break"] is None
    bounds = ",".join(map(str, NO_CLASS))
    command = [sys.executable, "-m", "tests.processors", bounds, "-"]
    with running_server(*state, command=command, environment=environment) as server, server.http() as http:
        turn = TOLD | {"messages": [{"role": "user", "content": "How many windows?"}]}
        yield Inexact(server, http.post(CHAT, json=turn).json()["slipstream"])


@pytest.fixture
def inexact(inexact_after_exact: Inexact) -> Server:
    return inexact_after_exact.server


def test_an_exact_server_says_so_everywhere(server: Server, http: httpx.Client) -> None:
    assert "(exact; " in server.greeting
    assert http.get("/health").json()["exact"] is True
    assert server.metrics()["slipstream_exact"] == 1
    assert http.post(CHAT, json=BODY).json()["slipstream"]["exact"] is True
    claude = {key: value for key, value in BODY.items() if key != "temperature"}
    assert http.post("/v1/messages", json=claude).json()["slipstream"]["exact"] is True
    assert http.post("/v1/responses", json={"input": "x", "max_output_tokens": 2}).json()["slipstream"]["exact"] is True
    assert http.post("/v1/completions", json={"prompt": "x", "max_tokens": 2}).json()["slipstream"]["exact"] is True


def test_a_server_that_is_not_exact_says_so_everywhere(inexact: Server) -> None:
    assert "not exact" in inexact.greeting
    assert "slipstream doctor" in inexact.greeting
    with inexact.http() as http:
        health = http.get("/health").json()
        assert (health["status"], health["exact"]) == ("ok", False)
        assert http.post(CHAT, json=BODY).json()["slipstream"]["exact"] is False
    assert inexact.metrics()["slipstream_exact"] == 0


def test_it_reuses_and_drafts_but_repeats_nothing_from_memory(inexact: Server) -> None:
    said = {"role": "user", "content": "Go on: one two three four, one two three four, one two three four, one two"}
    with inexact.http() as http:
        first, repeat = (http.post(CHAT, json=BODY | {"messages": [said], "max_tokens": 40}).json() for _ in range(2))
        turn = [said, first["choices"][0]["message"], {"role": "user", "content": "Again."}]
        second = http.post(CHAT, json=BODY | {"messages": turn}).json()["slipstream"]
    assert first["slipstream"]["response_cache"] == repeat["slipstream"]["response_cache"] == "off"
    assert second["reused_tokens"] >= first["slipstream"]["prompt_tokens"]
    assert inexact.metrics()["slipstream_drafted_tokens_total"] > 0


def test_saved_kv_of_another_processor_is_named_as_what_breaks_reuse(inexact_after_exact: Inexact) -> None:
    report = inexact_after_exact.resumed
    assert report["reused_tokens"] == 0
    assert report["reuse_break"] == {"kind": "not_exact", "message": None, "field": None}
    assert inexact_after_exact.server.metrics()["slipstream_reuse_breaks_total not_exact"] == 1


def test_doctor(server: Server) -> None:
    command = [sys.executable, "-m", "slipstream", "doctor"]
    told = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=HANG, check=True)
    report = json.loads(told.stdout)
    assert report["exact"] is True
    assert report["model"] == MODEL
    assert report["step_sizes"] == sorted(report["step_sizes"])
    assert report["threads"] >= 1
    assert report["decode_ms"] > 0
    shown = subprocess.run(
        [*command, "--kv-memory", room_for(3000)], capture_output=True, text=True, timeout=HANG, check=True
    )
    assert report["processor"].split(",")[0] in shown.stdout
    assert "--kv-memory" in shown.stdout, "how to have room for one conversation of the full context"
