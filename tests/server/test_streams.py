"""Streams that stay alive through a long prompt, and how the first piece of an answer looks."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from openai import OpenAI

from slipstream.chat import Tool, ToolUse
from slipstream.chat.answers import AnswerReader, Dialect
from slipstream.models import Model
from tests.server.process import MODEL, Server, running_server

QUESTION = [{"role": "user", "content": "word " * 6000}]
CALL: dict[str, Any] = {
    "tools": [{"type": "function", "function": {"name": "ring", "parameters": {"type": "object", "properties": {}}}}],
    "tool_choice": "required",
}


@pytest.fixture(scope="module")
def impatient(model: Model) -> Iterator[Server]:
    with running_server("--keep-alive-seconds", "0.01") as server:
        yield server


def lines(server: Server, path: str, **body: Any) -> list[str]:
    """The lines of a stream until the prompt is computed."""
    given = {"stream": True, "slipstream": {"response_cache": False, "reuse": False} | body.pop("slipstream", {})}
    with server.http() as http, http.stream("POST", path, json=body | given) as response:
        return [line for line in response.iter_lines() if line]


def test_chat_streams_stay_alive_by_comments(impatient: Server) -> None:
    first, *_ = lines(impatient, "/v1/chat/completions", messages=QUESTION, max_tokens=2)
    assert first == ": keep-alive"
    with impatient.openai() as client:
        chunks = list(client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=2, stream=True))  # type: ignore[arg-type]
    assert all(chunk.choices for chunk in chunks)


def test_anthropics_streams_stay_alive_by_pings(impatient: Server) -> None:
    first, *rest = lines(impatient, "/v1/messages", messages=QUESTION, max_tokens=2)
    assert first == "event: ping"
    assert json.loads(rest[0].removeprefix("data: ")) == {"type": "ping"}
    from anthropic import Anthropic

    with Anthropic(base_url=impatient.url, api_key="none") as client:
        messages: Any = QUESTION
        with client.messages.stream(model=MODEL, messages=messages, max_tokens=2) as stream:
            assert stream.get_final_message().usage.output_tokens == 2


def test_responses_stay_alive_by_events(impatient: Server) -> None:
    events = [
        json.loads(line.removeprefix("data: "))
        for line in lines(impatient, "/v1/responses", input=QUESTION, max_output_tokens=2)
        if line.startswith("data: ")
    ]
    assert [event["type"] for event in events[:3]] == ["response.created", *["response.in_progress"] * 2]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": QUESTION, "max_tokens": 2}),
        ("/v1/messages", {"messages": QUESTION, "max_tokens": 2}),
        ("/v1/responses", {"input": QUESTION, "max_output_tokens": 2}),
    ],
)
def test_progress_is_told_to_whom_asks(impatient: Server, path: str, body: dict[str, Any]) -> None:
    told = lines(impatient, path, **body, slipstream={"progress": True})
    events = [json.loads(line.removeprefix("data: ")) for line in told if line.startswith("data: {")]
    progress = [event["slipstream"]["progress"] for event in events if "progress" in event.get("slipstream", {})]
    assert progress
    done = [each["computed_tokens"] for each in progress]
    assert done == sorted(done)
    assert all(0 <= each["computed_tokens"] <= each["prompt_tokens"] > 6000 for each in progress)


def test_first_delta_of_a_call_has_no_text(client: OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "Ring."}]
    text, call = (
        list(client.chat.completions.create(model=MODEL, messages=messages, max_tokens=40, stream=True, **more))
        for more in ({}, CALL)
    )
    assert text[0].choices[0].delta.to_dict() == {"role": "assistant", "content": ""}
    assert call[0].choices[0].delta.to_dict() == {"role": "assistant", "content": None}
    assert all(chunk.choices[0].delta.content is None for chunk in call)
    assert call[1].choices[0].delta.tool_calls


def test_line_ends_of_javascript_are_escaped_in_arguments() -> None:
    tool = Tool("note", "", {"type": "object", "properties": {"text": {"type": "string"}}})
    reader = AnswerReader(Dialect("<tool_call>{"), ToolUse((tool,)), opens_reasoning=False)
    text = '<tool_call>\n{"name": "note", "arguments": {"text": "a\u2028b\u2029c"}}\n</tool_call>'
    deltas = reader.feed(text, last=True)
    arguments = "".join(delta.arguments for delta in deltas)
    assert arguments == '{"text": "a\\u2028b\\u2029c"}'
    assert reader.message.tool_calls[0].arguments == arguments
