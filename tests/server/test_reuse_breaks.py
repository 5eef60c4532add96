"""A turn that computes again what was computed before says why, in all protocols."""

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest

from slipstream.models import Model
from tests.server.process import Server, running_server
from tests.short_model import add_short_model, room_for

SYSTEM = "You keep the books of a small lighthouse, and answer tersely."
LOOK = {"name": "look", "description": "Look at the sea", "schema": {"type": "object", "properties": {}}}
RING = {"name": "ring", "description": "Ring the bell", "schema": {"type": "object", "properties": {}}}
PROTOCOLS = ["chat", "messages", "responses"]

Said = list[tuple[str, str]]
numbers = count()
MOVES_SYSTEM = """{%- for tool in tools %}{{ '<|im_start|>tool\n' + tool.function.name + '<|im_end|>\n' }}{% endfor %}
{%- for message in messages if message.role != 'system' %}
{{- '<|im_start|>' + message.role + '\n' }}{% if loop.last %}{{ messages[0].content + '\n' }}{% endif %}
{{- message.content + '<|im_end|>\n' }}
{%- endfor %}
{{- '<|im_start|>assistant\n' }}"""
"""A template that has the system text in the last turn, and takes it out of all others."""


@pytest.fixture(scope="module")
def small(model: Model) -> Iterator[Server]:
    with running_server("--kv-memory", room_for(1400)) as server:
        yield server


@pytest.fixture(scope="module")
def http(small: Server) -> Iterator[httpx.Client]:
    with small.http() as http:
        yield http


def opening() -> str:
    """A question that nobody asked before."""
    return f"This is ship number {next(numbers)}. How deep is the water to the west of the lighthouse at low tide?"


def ask(
    http: httpx.Client, protocol: str, said: Said, *, system: str = SYSTEM, tools: list[dict[str, Any]] | None = None
) -> tuple[str, dict[str, Any]]:
    """The answer to a conversation, and its report."""
    tools = [LOOK, RING] if tools is None else tools
    messages = [{"role": role, "content": text} for role, text in said]
    fields: dict[str, Any] = {"temperature": 0.0, "slipstream": {"response_cache": False}}
    if protocol == "chat":
        functions = [{"name": t["name"], "description": t["description"], "parameters": t["schema"]} for t in tools]
        fields |= {"messages": [{"role": "system", "content": system}, *messages], "tool_choice": "none"}
        fields |= {"tools": [{"type": "function", "function": each} for each in functions], "max_tokens": 4}
        response = http.post("/v1/chat/completions", json=fields).raise_for_status().json()
        return response["choices"][0]["message"]["content"], response["slipstream"]
    if protocol == "messages":
        described = [{"name": t["name"], "description": t["description"], "input_schema": t["schema"]} for t in tools]
        fields |= {"system": system, "messages": messages, "tools": described, "max_tokens": 4}
        response = http.post("/v1/messages", json=fields | {"tool_choice": {"type": "none"}}).raise_for_status().json()
        return response["content"][0]["text"], response["slipstream"]
    fields |= {"instructions": system, "input": messages, "max_output_tokens": 4, "tool_choice": "none", "store": False}
    fields["tools"] = [
        {"type": "function", "name": t["name"], "description": t["description"], "parameters": t["schema"]}
        for t in tools
    ]
    response = http.post("/v1/responses", json=fields).raise_for_status().json()
    return response["output"][0]["content"][0]["text"], response["slipstream"]


def conversation(http: httpx.Client, protocol: str) -> Said:
    """A conversation of two turns, the second of which went on from the first, waiting for a third."""
    said = [("user", opening())]
    for side in ("east", "south"):
        answer, report = ask(http, protocol, said)
        assert report["reuse_break"] is None
        said += [("assistant", answer), ("user", f"And {next(numbers)} miles to the {side} of it?")]
    return said


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_turn_that_goes_on_is_not_broken(http: httpx.Client, protocol: str) -> None:
    said = conversation(http, protocol)
    assert ask(http, protocol, said)[1]["reuse_break"] is None
    another_way = [*said[:2], ("user", "Then tell me about the north, the islands and the wrecks that lie there.")]
    assert ask(http, protocol, another_way)[1]["reuse_break"] is None


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_system_text_changed(small: Server, http: httpx.Client, protocol: str) -> None:
    said = conversation(http, protocol)
    before = small.metrics()["slipstream_reuse_breaks_total system_changed"]
    report = ask(http, protocol, said, system=f"{SYSTEM} It is 12:04.")[1]
    assert report["reuse_break"] == {"kind": "system_changed", "message": 0, "field": "content"}
    assert small.metrics()["slipstream_reuse_breaks_total system_changed"] == before + 1


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_tools_changed(http: httpx.Client, protocol: str) -> None:
    said = conversation(http, protocol)
    for tools, field in (
        ([LOOK, {**RING, "description": "Ring the large bell"}], "tools[1].description"),
        ([{**LOOK, "schema": {"type": "object", "properties": {"far": {}}}}, RING], "tools[0].parameters"),
        ([LOOK], "tools[1]"),
    ):
        report = ask(http, protocol, [*said[:-1], ("user", opening())], tools=tools)[1]
        assert report["reuse_break"] == {"kind": "tools_changed", "message": None, "field": field}
        ask(http, protocol, said)  # now it's the nearest again


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_tools_reordered(http: httpx.Client, protocol: str) -> None:
    report = ask(http, protocol, conversation(http, protocol), tools=[RING, LOOK])[1]
    assert report["reuse_break"] == {"kind": "tools_reordered", "message": None, "field": "tools[0]"}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_earlier_message_edited_left_out_or_added(http: httpx.Client, protocol: str) -> None:
    said = conversation(http, protocol)
    edited = [("user", f"{said[0][1]} Please hurry."), *said[1:]]
    assert ask(http, protocol, edited)[1]["reuse_break"] == {"kind": "message_edited", "message": 1, "field": "content"}
    said = conversation(http, protocol)
    answer = [*said[:3], ("assistant", f"Well. {said[3][1]}"), said[4]]
    assert ask(http, protocol, answer)[1]["reuse_break"] == {"kind": "message_edited", "message": 4, "field": "content"}
    said = conversation(http, protocol)
    assert ask(http, protocol, said[2:])[1]["reuse_break"] == {"kind": "message_removed", "message": 1, "field": None}
    said = conversation(http, protocol)
    added = [said[0], ("assistant", "Wait."), ("user", "I did."), *said[1:]]
    assert ask(http, protocol, added)[1]["reuse_break"] == {"kind": "message_inserted", "message": 2, "field": None}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_reasoning_dropped(http: httpx.Client, protocol: str) -> None:
    said = [
        ("user", opening()),
        ("assistant", "<think>The chart says nine.</think>Nine fathoms."),
        ("user", "And east?"),
    ]
    answer, _ = ask(http, protocol, said)
    went_on = [said[0], ("assistant", "Nine fathoms."), said[2], ("assistant", answer), ("user", "And south?")]
    report = ask(http, protocol, went_on)[1]
    assert report["reuse_break"] == {"kind": "reasoning_dropped", "message": 2, "field": "content"}


def test_template_rewrote(whole_model: Model, tmp_path: Path) -> None:
    add_short_model(tmp_path, whole_model, template=MOVES_SYSTEM)
    with running_server(environment={"SLIPSTREAM_HOME": str(tmp_path)}) as server, server.http() as http:
        for protocol in PROTOCOLS:
            said = [("user", opening())]
            answer, report = ask(http, protocol, said)
            assert report["reuse_break"] is None
            said += [("assistant", answer), ("user", "And to the east of it?")]
            report = ask(http, protocol, said)[1]
            assert report["reuse_break"] == {"kind": "template_rewrote", "message": None, "field": None}
        assert server.metrics()["slipstream_reuse_breaks_total template_rewrote"] == len(PROTOCOLS)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_evicted(http: httpx.Client, protocol: str) -> None:
    said = conversation(http, protocol)
    for _ in range(2):
        ask(http, protocol, [("user", opening() * 24)], system=opening(), tools=[])
    report = ask(http, protocol, said)[1]
    assert report["reuse_break"] == {"kind": "evicted", "message": None, "field": None}


def test_a_stream_says_so_too(http: httpx.Client) -> None:
    said = conversation(http, "chat")
    messages = [{"role": role, "content": text} for role, text in said]
    body = {"messages": [{"role": "system", "content": "Changed"}, *messages], "stream": True, "max_tokens": 4}
    text = http.post("/v1/chat/completions", json=body).text
    assert '"reuse_break":{"kind":"tools_changed","message":null,"field":"tools[0]"}' in text, "as no tools were sent"
