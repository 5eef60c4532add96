"""Agents on models with recurrent states, through the server: a turn computes what is new and at most one interval."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slipstream.kv.prefix_index import common_length
from slipstream.models import ModelStore
from tests.models.clients import Answer, Chat
from tests.models.test_tool_loops import LIMIT, TOOLS, assert_whole
from tests.server.process import Server, running_server

pytestmark = pytest.mark.models

MEMORY = ("--kv-memory", "64MiB")
TURNS = 5
AROUND = 80
"""Tokens that the template may put around a message: the vocabulary spells nearly all of it byte by byte."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {"SLIPSTREAM_HOME": str(tmp_path_factory.mktemp("home"))}


@pytest.fixture(scope="module", params=["lfm2", "qwen3.5", "granite-hybrid"])
def model(request: pytest.FixtureRequest, judged: Path, home: dict[str, str]) -> str:
    return ModelStore(Path(home["SLIPSTREAM_HOME"])).ensure(str(judged / f"{request.param}.gguf")).name


@pytest.fixture(scope="module")
def interval(model: str, home: dict[str, str]) -> int:
    """Tokens between two states that the server keeps."""
    command = [sys.executable, "-m", "slipstream", "doctor", "--json", *MEMORY, "--model", model]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **home})
    found: int = json.loads(run.stdout)["checkpoint_interval"]
    assert found > 0
    return found


@pytest.fixture
def server(model: str, home: dict[str, str]) -> Iterator[Server]:
    with running_server(*MEMORY, model=model, environment=home) as found:
        yield found


def ask(client: Chat, messages: list[Any]) -> Answer:
    """An answer, which is the one that a computation from scratch gives, too."""
    answer = client.ask(messages, "auto", stream=True, limit=LIMIT, response_cache=False)
    assert_whole(answer, "auto")
    anew = client.ask(messages, "auto", stream=False, limit=LIMIT, response_cache=False, reuse=False)
    assert anew.report["reused_tokens"] == 0
    assert anew.said == answer.said
    return answer


def test_a_conversation_goes_on_branches_and_is_answered_again(server: Server, model: str, interval: int) -> None:
    client = Chat(server, model, "You look after a station.", TOOLS, ())
    history: list[list[Any]] = []
    messages: list[Any] = client.question("How is the weather in Oslo?")
    known = 0
    for turn in range(TURNS):
        history.append(messages)
        answer = ask(client, messages)
        if turn:
            assert answer.report["reused_tokens"] >= known - interval
        known = answer.report["prompt_tokens"] - 1  # random bytes are no text that comes back as it was
        more = client.results(answer.calls, ["4 degrees"] * len(answer.calls)) if answer.calls else []
        messages = [*messages, *answer.as_message, *(more or client.question(f"Go on, {turn}."))]
    again = client.ask(history[-1], "auto", stream=True, limit=LIMIT, response_cache=False)
    assert again.said == answer.said
    assert again.report["delta_tokens"] <= interval
    other = [*history[-1][:-1], *client.question("Something else.")]
    edited = ask(client, other)
    assert edited.report["delta_tokens"] <= len("Something else.") + AROUND + interval


def test_an_edit_within_a_first_long_prompt_is_computed_from_the_nearest_state(
    server: Server, model: str, interval: int
) -> None:
    client = Chat(server, model, "You look after a station.", TOOLS, ())

    def conversation(fifth: str) -> list[Any]:
        messages: list[Any] = []
        for number in range(8):
            text = fifth if number == 4 else f"Reading {number}: " + "12 " * (interval // 8)
            messages += [*client.question(text), {"role": "assistant", "content": "Noted. " * (interval // 16)}]
        return [*messages, *client.question("Which was the warmest?")]

    def tokens(messages: list[Any]) -> list[int]:
        _, body = client.request(messages, "auto", limit=LIMIT)
        with server.http() as http:
            asked = {"messages": body["messages"], "tools": body["tools"]}
            found: list[int] = http.post("/tokenize", json=asked).raise_for_status().json()["tokens"]
        return found

    first, edited = conversation("Nothing was read."), conversation("No reading at all.")
    client.ask(first, "auto", stream=True, limit=LIMIT, response_cache=False)
    answer = ask(client, edited)
    common = common_length(np.array(tokens(first)), np.array(tokens(edited)))
    assert common > 2 * interval
    assert answer.report["prompt_tokens"] - common > interval
    assert answer.report["delta_tokens"] <= answer.report["prompt_tokens"] - common + interval


def test_it_goes_on_after_a_restart(model: str, home: dict[str, str], interval: int, tmp_path: Path) -> None:
    options = (*MEMORY, "--state-dir", str(tmp_path))
    with running_server(*options, model=model, environment=home) as server:
        client = Chat(server, model, "You look after a station.", TOOLS, ())
        messages: list[Any] = client.question("How is the weather in Bergen?")
        before = client.ask(messages, "required", stream=False, limit=2 * LIMIT)  # which comes back as it was
        more = client.results(before.calls, ["4 degrees"] * len(before.calls)) or client.question("Go on.")
        messages = [*messages, *before.as_message, *more]
    with running_server(*options, model=model, environment=home) as server:
        client = Chat(server, model, "You look after a station.", TOOLS, ())
        after = ask(client, messages)
        known = before.report["prompt_tokens"] - 1
        assert after.report["reused_tokens"] >= known - interval
