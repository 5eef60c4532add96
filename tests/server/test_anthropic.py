"""Anthropic's Messages API, as the official client sees it."""

import asyncio
import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import anthropic
import httpx
import jsonschema
import pytest
from anthropic import Anthropic, AsyncAnthropic
from pydantic import BaseModel

from tests.server.process import MODEL, Server, running_server
from tests.server.test_errors import nested
from tests.waiting import HANG

MESSAGES = "/v1/messages"
CITY = {"type": "string", "maxLength": 12}


def tool(name: str, properties: dict[str, Any]) -> dict[str, Any]:
    """A tool; all of its parameters are required."""
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return {"name": name, "description": f"Use {name}", "input_schema": schema}


WEATHER = tool("get_weather", {"city": CITY, "unit": {"type": "string", "enum": ["C", "F"]}})
CLOCK = tool("get_time", {"zone": {"type": "string", "maxLength": 8}, "day": {"type": "number", "maximum": 99}})
SCHEMAS = {each["name"]: each["input_schema"] for each in (WEATHER, CLOCK)}
TOOLS = [WEATHER, CLOCK]
ANY = {"type": "any"}
ONE = {"type": "any", "disable_parallel_tool_use": True}
SYSTEM = "You are a terse assistant who answers in one short sentence. " * 4
QUESTION: list[Any] = [{"role": "user", "content": "What is the weather in Oslo?"}]


def habit(answer: str) -> list[Any]:
    """A conversation in which every question was answered alike: even a small model goes on like that."""
    messages: list[Any] = []
    for city in ("Oslo", "Rome", "Paris"):
        messages += [{"role": "user", "content": f"Weather in {city}?"}]
        messages += [{"role": "assistant", "content": answer.format(city)}]
    return [*messages, {"role": "user", "content": "Weather in Berlin?"}]


THINKS = habit("<think>I look up {0}.</think>It is sunny in {0}.")


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Anthropic]:
    with Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=HANG) as client:
        yield client


@pytest.fixture(scope="module")
def whole_client(whole_server: Server) -> Iterator[Anthropic]:
    with Anthropic(base_url=whole_server.url, api_key="none", max_retries=0, timeout=HANG) as client:
        yield client


def params(messages: list[Any], more: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a request that is computed each time; what the client has no parameter for goes into the body."""
    body = {"temperature": 0, "slipstream": {"response_cache": False}}
    return {"model": MODEL, "messages": messages, "max_tokens": 24, "extra_body": body} | more


def ask(client: Anthropic, messages: list[Any] = QUESTION, **more: Any) -> Any:
    return client.messages.create(**params(messages, more))


def ask_streaming(client: Anthropic, messages: list[Any] = QUESTION, **more: Any) -> Any:
    """The message that the client's own helper puts together from a stream."""
    with client.messages.stream(**params(messages, more)) as stream:
        return stream.get_final_message()


def said(message: Any) -> tuple[Any, ...]:
    """What a response says, without what differs between two answers to the same request."""
    blocks = []
    for block in message.content:
        if block.type == "tool_use":
            jsonschema.validate(block.input, SCHEMAS[block.name])
            blocks.append((block.type, block.name, block.input))
        else:
            blocks.append((block.type, block.text if block.type == "text" else block.thinking))
    return blocks, message.stop_reason, message.stop_sequence, message.usage.output_tokens


def total(usage: Any) -> int:
    """All tokens of a turn."""
    return usage.input_tokens + usage.cache_read_input_tokens + usage.cache_creation_input_tokens + usage.output_tokens


def assert_all_reused(usage: Any, before: Any) -> None:
    """That nothing of the turn before was computed again; a few tokens that follow it may be there already."""
    assert 0 <= usage.cache_read_input_tokens - total(before) <= 12


def forwarded_for_requests(metrics: dict[str, float]) -> float:
    """Tokens computed, but for what the server does while nobody waits."""
    return metrics["slipstream_engine_tokens_total"] - metrics["slipstream_idle_tokens_total"]


def results(message: Any) -> list[Any]:
    """A result for each of the calls in a response."""
    calls = [block for block in message.content if block.type == "tool_use"]
    return [{"type": "tool_result", "tool_use_id": call.id, "content": f"{len(call.input)} found"} for call in calls]


def token_count(http: httpx.Client, **body: Any) -> int:
    return http.post("/tokenize", json=body).json()["count"]


# Answers


def test_answer_has_the_protocols_form(client: Anthropic) -> None:
    message = ask(client, max_tokens=6)
    assert (message.type, message.role, message.model) == ("message", "assistant", MODEL)
    assert message.id.startswith("msg_")
    assert [block.type for block in message.content] == ["text"]
    assert (message.stop_reason, message.stop_sequence) == ("max_tokens", None)
    assert message.usage.output_tokens == 6
    report = message.slipstream
    assert total(message.usage) == report["prompt_tokens"] + report["completion_tokens"]
    assert message.usage.cache_read_input_tokens == report["reused_tokens"]


def test_fields_that_change_nothing_are_accepted(client: Anthropic) -> None:
    harmless: dict[str, Any] = {
        "metadata": {"user_id": "me"},
        "service_tier": "auto",
        "cache_control": {"type": "ephemeral"},
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "output_config": {"effort": "low"},
        "tool_choice": {"type": "auto"},
        "extra_headers": {"anthropic-beta": "context-management-2025-06-27"},
    }
    assert said(ask(client, **harmless)) == said(ask(client))


@pytest.mark.parametrize(
    ("messages", "more"),
    [
        pytest.param(QUESTION, {}, id="text"),
        pytest.param(QUESTION, {"system": SYSTEM, "stop_sequences": ["e"]}, id="stop sequence"),
        pytest.param(QUESTION, {"tools": TOOLS, "tool_choice": ONE, "max_tokens": 80}, id="call"),
        pytest.param(QUESTION, {"tools": TOOLS, "tool_choice": ANY, "max_tokens": 150}, id="calls"),
        pytest.param(THINKS, {}, id="thinking"),
    ],
)
def test_stream_adds_up_to_the_whole(client: Anthropic, messages: list[Any], more: dict[str, Any]) -> None:
    whole = ask(client, messages, **more)
    streamed = ask_streaming(client, messages, **more)
    assert said(streamed) == said(whole)
    assert total(streamed.usage) == total(whole.usage)


def test_events_come_in_order(whole_http: httpx.Client) -> None:
    body = {"max_tokens": 150, "messages": several_calls(), "tools": TOOLS, "tool_choice": ANY, "stream": True}
    body |= {"temperature": 0, "slipstream": {"response_cache": False}}
    response = whole_http.post(MESSAGES, json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = []
    for text in response.text.removesuffix("\n\n").split("\n\n"):
        name, data = text.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"

    start, ping, *blocks, ending, stop = events
    assert [event["type"] for event in (start, ping, ending, stop)] == [
        "message_start",
        "ping",
        "message_delta",
        "message_stop",
    ]
    assert start["message"]["content"] == []
    assert start["message"]["stop_reason"] is None
    usage = ending["usage"]
    assert start["message"]["usage"] == {**usage, "output_tokens": 0}
    assert ending["slipstream"]["completion_tokens"] == usage["output_tokens"] > 0

    opened = -1
    for event in blocks:
        kind = event["type"].removeprefix("content_block_")
        if kind == "start":
            opened += 1
            assert event["content_block"]["input"] == {}
            before, arguments = "start", ""
        elif kind == "delta":
            assert before in ("start", "delta")
            assert event["delta"]["type"] == "input_json_delta"
            before, arguments = "delta", arguments + event["delta"]["partial_json"]
        else:
            assert (kind, before) == ("stop", "delta")
            assert isinstance(json.loads(arguments), dict)
            before = "stop"
        assert event["index"] == opened
    assert before == "stop"
    assert opened >= 1


def test_text_arrives_while_it_is_decoded(client: Anthropic) -> None:
    with client.messages.stream(**params(QUESTION, {})) as stream:
        pieces = list(stream.text_stream)
        assert "".join(pieces) == stream.get_final_text()
    assert len(pieces) > 3


def test_async_clients_at_once_answer_as_each_would_alone(server: Server, client: Anthropic) -> None:
    questions: list[Any] = [[{"role": "user", "content": f"Count from {index}."}] for index in range(4)]

    async def together() -> list[Any]:
        async with AsyncAnthropic(base_url=server.url, api_key="none", max_retries=0) as parallel:

            async def one(messages: list[Any]) -> Any:
                async with parallel.messages.stream(**params(messages, {})) as stream:
                    return await stream.get_final_message()

            return await asyncio.gather(*map(one, questions))

    assert [said(each) for each in asyncio.run(together())] == [said(ask(client, one)) for one in questions]


def test_stop_sequence_is_named_and_left_out(client: Anthropic) -> None:
    full = ask(client).content[0].text
    stop = full[10:13]
    for get in (ask, ask_streaming):
        message = get(client, stop_sequences=["\0", stop, full[12:16]])
        assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", stop)
        assert message.content[0].text == full[: full.index(stop)]
    assert ask(client, stop_sequences=["\0"]).stop_sequence is None


def test_exact_repeat_costs_nothing(client: Anthropic) -> None:
    stop = ask(client).content[0].text[10:13]
    more: Any = {"stop_sequences": [stop], "max_tokens": 23, "extra_body": {"temperature": 0}}
    first = ask(client, **more)
    for get in (ask, ask_streaming):
        again = get(client, **more)
        assert said(again) == said(first)
        assert again.stop_sequence == stop
        assert (again.usage.input_tokens, total(again.usage)) == (0, total(first.usage))


def test_end_of_turn(whole_client: Anthropic) -> None:
    message = ask(whole_client, habit("It is sunny in {}."))
    assert said(message)[:3] == ([("text", "It is sunny in Berlin.")], "end_turn", None)


def test_reasoning_is_a_thinking_block_and_no_part_of_later_prompts(whole_client: Anthropic) -> None:
    first = ask(whole_client, THINKS)
    assert [block.type for block in first.content] == ["thinking", "text"]
    redacted = {"type": "redacted_thinking", "data": "…"}
    counts = [
        whole_client.messages.count_tokens(
            model=MODEL,
            messages=[*QUESTION, {"role": "assistant", "content": content}, *QUESTION],
        ).input_tokens
        for content in (first.content, [redacted, *first.content[1:]], first.content[1:])
    ]
    assert len(set(counts)) == 1


class Report(BaseModel):
    city: str
    degrees: int


@pytest.mark.parametrize("field", ["output_config", "output_format"])
def test_answer_of_a_schema(client: Anthropic, field: str) -> None:
    schema = {"type": "json_schema", "schema": {**Report.model_json_schema(), "properties": {"city": CITY}}}
    schema["schema"]["required"] = ["city"]
    body = {field: {"format": schema} if field == "output_config" else schema}
    message = ask(client, extra_body={"temperature": 0, **body})
    assert list(json.loads(message.content[0].text)) == ["city"]


def test_official_client_parses_an_answer(client: Anthropic) -> None:
    message = client.messages.parse(**params(QUESTION, {"max_tokens": 60}), output_format=Report)
    assert isinstance(message.parsed_output, Report)


# Tools


def test_tool_choice(whole_client: Anthropic) -> None:
    def called(**choice: Any) -> list[str]:
        message = ask(whole_client, tools=TOOLS, tool_choice=choice, max_tokens=150)
        said(message)
        names = [block.name for block in message.content if block.type == "tool_use"]
        assert names or [block.type for block in message.content] == ["text"]
        return names

    assert called(type="none") == []
    assert called(type="tool", name="get_time") == ["get_time"]
    message = ask(whole_client, several_calls(), tools=TOOLS, tool_choice=ANY, max_tokens=150)
    assert len(results(message)) > 1
    assert len(called(type="any", disable_parallel_tool_use=True)) == 1
    assert ask(whole_client, tools=TOOLS, tool_choice=ONE, max_tokens=150).stop_reason == "tool_use"


def several_calls() -> list[Any]:
    """A conversation in which each question was answered by two calls, as even a small model then goes on to do."""
    messages: list[Any] = []
    for city in ("Oslo", "Rome", "Lima", "Bern"):
        calls = [(f"{name}_{city}", name, {"city": city}) for name in ("get_weather", "get_time")]
        used = [{"type": "tool_use", "id": id, "name": name, "input": arguments} for id, name, arguments in calls]
        found = [{"type": "tool_result", "tool_use_id": id, "content": "fine"} for id, _, _ in calls]
        messages += [
            {"role": "user", "content": f"Weather and time in {city}?"},
            {"role": "assistant", "content": used},
        ]
        messages += [{"role": "user", "content": found}, {"role": "assistant", "content": "It is fine."}]
    return [*messages, {"role": "user", "content": "Weather and time in Paris?"}]


@pytest.mark.parametrize("get", [ask, ask_streaming], ids=["whole", "stream"])
def test_tool_loop_computes_only_what_is_new(client: Anthropic, http: httpx.Client, get: Any) -> None:
    system = [{"type": "text", "text": f"{SYSTEM}{get.__name__}", "cache_control": {"type": "ephemeral"}}]
    more: Any = {"system": system, "tools": TOOLS, "tool_choice": ONE, "max_tokens": 80}
    messages = list(QUESTION)
    before = get(client, messages, **more)
    for _ in range(4):
        answer = {"role": "assistant", "content": [block.to_dict() for block in before.content]}
        (result,) = results(before)
        messages += [answer, {"role": "user", "content": [result, {"type": "text", "text": "And in Rome?"}]}]
        message = get(client, messages, **more)
        assert_all_reused(message.usage, before.usage)
        said_since = (f"<tool_response>\n{result['content']}\n</tool_response>", "And in Rome?")
        glue = "".join(f"<|im_end|>\n<|im_start|>user\n{text}" for text in said_since)
        new = total(message.usage) - message.usage.output_tokens - total(before.usage)
        assert new == token_count(http, content=f"{glue}<|im_end|>\n<|im_start|>assistant\n")
        before = message


def test_results_of_parallel_calls(whole_client: Anthropic) -> None:
    more: Any = {"tools": TOOLS, "tool_choice": ANY, "max_tokens": 150}
    first = ask(whole_client, several_calls(), **more)
    found = results(first)
    assert len(found) > 1
    split = [{"role": "assistant", "content": [block]} for block in first.content]  # as some clients keep them
    reply = {"role": "user", "content": [*found, {"type": "text", "text": "Go on."}]}
    for answer in ([{"role": "assistant", "content": first.content}], split):
        second = ask(whole_client, [*several_calls(), *answer, reply], **more)
        assert second.usage.cache_read_input_tokens >= total(first.usage)
        assert second.slipstream["session_id"] == first.slipstream["session_id"]


@pytest.mark.parametrize(
    ("more", "reason"), [({"max_tokens": 48}, "max_tokens"), ({"stop_sequences": ['", "text": "']}, "stop_sequence")]
)
def test_call_cut_short_is_read_as_far_as_it_goes(client: Anthropic, more: dict[str, Any], reason: str) -> None:
    long = tool("note", {"title": {"type": "string", "maxLength": 9}, "text": {"type": "string", "minLength": 900}})
    more = {"tools": [long], "tool_choice": ONE, "max_tokens": 60, **more}
    whole, streamed = (get(client, **more) for get in (ask, ask_streaming))
    assert whole.stop_reason == streamed.stop_reason == reason
    (call,) = whole.content
    assert call.name == "note"
    assert call.input == streamed.content[0].input


def test_official_clients_tool_runner(client: Anthropic) -> None:
    measured = []

    @anthropic.beta_tool
    def measure(place: str, height: int) -> str:
        """Measure the temperature somewhere."""
        measured.append((place, height))
        return "4 degrees"

    runner = client.beta.messages.tool_runner(
        **params(list(QUESTION), {"max_tokens": 120}), tools=[measure], tool_choice=ONE, max_iterations=3
    )
    answers = list(runner)
    assert len(measured) == len(answers) == 3
    for earlier, later in pairwise(answers):
        assert_all_reused(later.usage, earlier.usage)


# Prompts


def openai_prompt(http: httpx.Client, *messages: dict[str, Any]) -> int:
    return token_count(http, messages=list(messages))


def test_messages_mean_what_they_do_in_chat(client: Anthropic, http: httpx.Client) -> None:
    call = {"type": "tool_use", "id": "a", "name": "f", "input": {"x": [1, {"y": "ü"}]}, "cache_control": None}
    ephemeral = {"cache_control": {"type": "ephemeral"}}
    messages: list[Any] = [
        {"role": "user", "content": "One."},
        {"role": "user", "content": [{"type": "text", "text": "Two."}]},
        {"role": "assistant", "content": [{"type": "text", "text": "I loo"}, {"type": "text", "text": "k."}, call]},
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "a", "content": "4", **ephemeral},
                {
                    "type": "tool_result",
                    "tool_use_id": "b",
                    "is_error": True,
                    "content": [{"type": "text", "text": "No"}],
                },
                {"type": "tool_result", "tool_use_id": "c"},
                {"type": "text", "text": "And now?", **ephemeral},
            ],
        },
    ]
    counted = client.messages.count_tokens(model=MODEL, messages=messages, system="Be kind.")
    made = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x": [1, {"y": "ü"}]}'}}
    assert counted.input_tokens == openai_prompt(
        http,
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "One.\nTwo."},
        {"role": "assistant", "content": "I look.", "tool_calls": [made]},
        {"role": "tool", "tool_call_id": "a", "content": "4"},
        {"role": "tool", "tool_call_id": "b", "content": "Error: No"},
        {"role": "tool", "tool_call_id": "c", "content": ""},
        {"role": "user", "content": "And now?"},
    )


def test_system_blocks(client: Anthropic) -> None:
    def count(system: Any) -> int:
        return client.messages.count_tokens(model=MODEL, messages=QUESTION, system=system).input_tokens

    first, second = {"type": "text", "text": "Be brief."}, {"type": "text", "text": "Be kind."}
    plain = count("Be brief.\nBe kind.")
    assert count([first, {**second, "cache_control": {"type": "ephemeral", "ttl": "1h"}}]) == plain
    assert count("") == count([]) != plain


def test_line_for_anthropics_accounts_is_no_part_of_the_prompt(client: Anthropic) -> None:
    def system(number: int) -> list[Any]:
        line = f"x-anthropic-billing-header: cc_version=2.1.0.{number}; cch=0000{number};"
        return [{"type": "text", "text": line}, {"type": "text", "text": f"You count stars. {SYSTEM}"}]

    first = ask(client, system=system(1))
    messages = [*QUESTION, {"role": "assistant", "content": first.content}, {"role": "user", "content": "Go on."}]
    assert_all_reused(ask(client, messages, system=system(2)).usage, first.usage)


@pytest.mark.parametrize("tools", [[], TOOLS], ids=["plain", "tools"])
def test_count_is_that_of_the_later_prompt(server: Server, client: Anthropic, tools: list[Any]) -> None:
    asked: Any = {"model": MODEL, "messages": QUESTION, "system": "Count.", "tools": tools}
    before = server.wait_until_idle()
    counted = client.messages.count_tokens(**asked).input_tokens
    after = server.metrics()
    assert forwarded_for_requests(after) == forwarded_for_requests(before)
    first = client.messages.create(**asked, max_tokens=6)
    assert counted == total(first.usage) - first.usage.output_tokens

    asked["messages"] = [*QUESTION, {"role": "assistant", "content": first.content}, *QUESTION]
    counted = client.messages.count_tokens(**asked).input_tokens
    later = client.messages.create(**asked, max_tokens=1)
    assert counted == total(later.usage) - later.usage.output_tokens
    assert_all_reused(later.usage, first.usage)


# Errors


def assert_error(response: httpx.Response, status: int, kind: str, says: str) -> None:
    assert response.status_code == status, response.text
    assert set(response.json()) == {"type", "error"}
    assert response.json()["type"] == "error"
    error = response.json()["error"]
    assert set(error) == {"type", "message", "details"}
    assert error["details"]["error_code"]
    assert error["type"] == kind
    assert says in error["message"]


def user(*blocks: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(blocks)}]}


HOSTED = {"type": "web_search_20250305", "name": "web_search"}


def schema(*before: dict[str, Any], **parameter: Any) -> dict[str, Any]:
    return {"tools": [*before, WEATHER, {**tool("f", {"a": parameter}), "strict": True}]}


TOOL_USE = {"type": "tool_use", "id": "a", "name": "f", "input": {}}
RESULT = {"type": "tool_result", "tool_use_id": "a"}


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens: input should be greater"),
        (user({"type": "text", "text": "\ud800"}), "messages[0].content[0].text: the text has a lone surrogate"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs has 'messages'"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages is empty"),
        ({"messages": [{"role": "tool", "content": ""}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content is required"),
        ({"messages": [*QUESTION, {"role": "assistant", "content": "It"}]}, "messages[1] is the assistant's"),
        (user("x"), "messages[0].content[0]"),
        (user({"text": "x"}), "messages[0].content[0].type is required"),
        (user({"type": "text"}), "messages[0].content[0].text is required"),
        (user({"type": "image", "source": {}}), "messages[0].content[0] is of type 'image'"),
        (user({"type": "document", "source": {}}), "messages[0].content[0] is of type 'document'"),
        (user({"type": "tool_reference", "tool_name": "f"}), "messages[0].content[0].tool_name is 'f', but tools has"),
        (user({"type": "server_tool_use", "id": "a"}), "messages[0].content[0] is of type 'server_tool_use'"),
        (user(TOOL_USE), "messages[0].content[0] is of type 'tool_use'"),
        (user({"type": "tool_result"}), "messages[0].content[0].tool_use_id is required"),
        ({"messages": [{"role": "assistant", "content": [RESULT]}]}, "messages[0].content[0] is of type 'tool_result'"),
        ({"system": [{"type": "image"}]}, "system[0] is of type 'image'"),
        ({"temperature": -1}, "temperature"),
        ({"stop_sequences": [""]}, "stop_sequences[0]"),
        ({"stop_sequences": ["a"] * 17}, "stop_sequences"),
        ({"thinking": {"type": "deeply"}}, "thinking.type"),
        ({"thread": {"type": "continue", "previous_message_id": "msg_1"}}, "thread is not supported"),
        ({"compaction": {}}, "compaction"),
        ({"mcp_servers": [{"type": "url", "url": "http://a"}]}, "mcp_servers"),
        ({"slipstream": {"reus": 1}}, "slipstream.reus"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0].type"),
        ({"tools": [HOSTED], "tool_choice": ANY}, "tool_choice"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema is required"),
        ({"tools": [{"name": "f", "input_schema": {"type": "array"}}]}, "tools[0].input_schema"),
        ({"tools": [{**WEATHER, "name": "a b"}]}, "tools[0].name"),
        ({"tools": [WEATHER, WEATHER]}, "tools[1].name: two tools"),
        (schema(type="string", pattern=r"\bword\b"), "tools[1].input_schema of the tool 'f' has 'pattern'"),
        (schema(HOSTED, type="string", pattern=r"\bword\b"), "tools[2].input_schema of the tool 'f' has 'pattern'"),
        ({"tools": [HOSTED, WEATHER, WEATHER]}, "tools[2].name: two tools"),
        ({"tool_choice": ANY}, "tool_choice"),
        ({"tool_choice": {"type": "tool"}, "tools": TOOLS}, "tool_choice.name is required"),
        ({"tool_choice": {"type": "tool", "name": "f"}, "tools": TOOLS}, "tool_choice names f"),
        ({"tool_choice": {"type": "required"}, "tools": TOOLS}, "tool_choice.type"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema is required"),
        (
            {"output_config": {"format": {"type": "json_schema", "schema": {"not": {}}}}},
            "output_config.format.schema has",
        ),
        (
            {"output_config": {"format": {"type": "json_schema", "schema": nested(400)}}},
            "output_config.format.schema has a schema that is nested too deeply",
        ),
    ],
)
def test_bad_field(http: httpx.Client, body: dict[str, Any], says: str) -> None:
    given = {"messages": QUESTION, "max_tokens": 8, **body}
    request = {name: value for name, value in given.items() if value is not None}
    for stream in (False, True):
        content = json.dumps({**request, "stream": stream})  # httpx's own way can't send a lone surrogate
        response = http.post(MESSAGES, content=content, headers={"Content-Type": "application/json"})
        assert_error(response, 400, "invalid_request_error", says)


def test_bad_prompt_can_not_be_counted(http: httpx.Client) -> None:
    response = http.post(f"{MESSAGES}/count_tokens", json=user({"type": "image"}))
    assert_error(response, 400, "invalid_request_error", "messages[0].content[0] is of type 'image'")


def test_other_errors_have_the_protocols_shape(http: httpx.Client) -> None:
    assert_error(http.get(MESSAGES), 405, "invalid_request_error", "POST")
    assert_error(http.post(f"{MESSAGES}/batches"), 404, "not_found_error", f"{MESSAGES}/batches")
    too_large = http.post(MESSAGES, content=b" " * (8 * 2**20 + 1))
    assert_error(too_large, 413, "request_too_large", "8.0MiB")


def test_stream_that_breaks_off_ends_with_an_error_event(client: Anthropic) -> None:
    endless = tool("f", {"a": {"type": "string", "pattern": "^[ab]((a{50,60}){50,60}){50,60}$"}})
    with pytest.raises(anthropic.APIStatusError) as raised:
        ask_streaming(client, tools=[endless], tool_choice=ONE, max_tokens=200)
    assert raised.value.type == "invalid_request_error"
    assert "simplify" in str(raised.value.api_message)


def test_official_client_raises_its_own_errors(client: Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        ask(client, max_tokens=-1)
    for request in (client.messages.create, client.messages.count_tokens):
        more = {"max_tokens": 1} if request == client.messages.create else {}
        with pytest.raises(anthropic.NotFoundError, match=MODEL):
            request(model="claude-sonnet", messages=QUESTION, **more)


def test_key_as_bearer_token_or_header(server: Server) -> None:
    body = {"max_tokens": 1, "messages": QUESTION}
    with running_server(api_key="s3cret") as locked:
        for headers in ({}, {"x-api-key": "wrong"}, {"Authorization": "Bearer wrong"}, {"x-api-key": ""}):
            response = httpx.post(f"{locked.url}{MESSAGES}", json=body, headers=headers)
            assert_error(response, 401, "authentication_error", "x-api-key")
        for headers in ({"x-api-key": "s3cret"}, {"Authorization": "Bearer s3cret"}):
            assert httpx.post(f"{locked.url}{MESSAGES}", json=body, headers=headers).status_code == 200
        stranger, friend = (Anthropic(base_url=locked.url, api_key=key, max_retries=0) for key in ("wrong", "s3cret"))
        with stranger, pytest.raises(anthropic.AuthenticationError):
            ask(stranger, max_tokens=1)
        with friend:
            assert ask(friend, max_tokens=1).usage.output_tokens == 1
