"""The Responses API, as the official client sees it."""

import asyncio
import json
from collections.abc import Iterable
from itertools import chain
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import httpx
import jsonschema
import openai
import pytest
from openai import OpenAI
from openai.types.responses import Response, ResponseItemList, ResponseOutputItem, ResponseStreamEvent
from pydantic import BaseModel, Field, TypeAdapter

from slipstream.chat.answers import AnswerReader, Dialect
from slipstream.engine import Output, SamplingParams, TurnCounters
from slipstream.server.responses_output import ResponseAnswer, output_items
from slipstream.server.responses_request import ResponseRequest
from slipstream.server.responses_tools import Toolbox
from slipstream.turns import Choice, Piece, TurnRequest
from tests.server.process import MODEL, Server
from tests.server.test_errors import nested

EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
INSTRUCTIONS = "You are a terse assistant who answers in one short sentence. " * 4
FRESH = {"slipstream": {"response_cache": False}}
Text = Annotated[str, Field(max_length=20)]


class Report(BaseModel):
    """What an answer is parsed as."""

    summary: Text
    degrees: Annotated[int, Field(ge=-40, le=40)]
    warnings: Annotated[list[Literal["storm", "frost", "heat"]], Field(max_length=2)]


def function(name: str, properties: dict[str, Any]) -> dict[str, Any]:
    """A tool, all of whose parameters are required."""
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "name": name, "description": f"Tells {name}.", "parameters": parameters, "strict": True}


def group(*tools: dict[str, Any]) -> dict[str, Any]:
    """A namespace of tools."""
    return {"type": "namespace", "name": "group", "tools": list(tools)}


WEATHER = function("weather", {"city": {"type": "string", "maxLength": 12}})
CLOCK = function("clock", {"zone": {"type": "string", "maxLength": 8}})
TOOLS = [WEATHER, CLOCK]
ONE_CALL = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "max_output_tokens": 100}
MANY_CALLS = {"tools": TOOLS, "tool_choice": "required", "max_output_tokens": 4000}
SAYS_AND_CALLS: list[Any] = [
    *chain.from_iterable(
        [
            {"role": "user", "content": f"Weather in {city}?"},
            {"role": "assistant", "content": f"I look up {city}."},
            {"type": "function_call", "call_id": city, "name": "weather", "arguments": json.dumps({"city": city})},
        ]
        for city in ("Oslo", "Rome", "Paris")
    ),
    {"role": "user", "content": "Weather in Berlin?"},
]
"""A conversation in which every question was answered alike: even a small model goes on like that."""
REPORT = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "degrees": {"type": "integer", "maximum": 40}},
    "required": ["city", "degrees"],
    "additionalProperties": False,
}
REPORT_FORMAT = {"format": {"type": "json_schema", "name": "report", "schema": REPORT, "strict": True}}


def create(client: OpenAI, input: Any, **params: Any) -> Any:
    """A response, or a stream, having checked that the response is what the protocol's types say."""
    defaults: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_output_tokens": 12, "extra_body": FRESH}
    response = client.responses.create(input=input, **(defaults | params))
    if not params.get("stream"):
        Response.model_validate_json(response.model_dump_json(by_alias=True))
    return response


def events(stream: Iterable[Any]) -> list[Any]:
    """The events of a stream, having checked that they are what the protocol's types say, and their numbers."""
    result = list(stream)
    for number, event in enumerate(result):
        EVENT.validate_json(event.model_dump_json(by_alias=True, exclude_unset=True))
        assert event.sequence_number == number
    return result


def said(response: Any) -> list[Any]:
    """The output, without the ids that differ between two answers to the same request."""
    return [item.model_dump(exclude={"id", "call_id"}, exclude_unset=True) for item in response.output]


def results(response: Any, result: str = "4 degrees") -> list[Any]:
    """Results of all its calls."""
    calls = [item for item in response.output if item.type == "function_call"]
    assert calls
    return [{"type": "function_call_output", "call_id": call.call_id, "output": result} for call in calls]


def tokens_of_question(http: httpx.Client, text: str) -> int:
    """How many tokens a question adds to a prompt."""
    added = f"<|im_end|>\n<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    return http.post("/tokenize", json={"content": added}).json()["count"]


def assert_extends(response: Any, earlier: Any, new: int | None = None) -> None:
    """Its prompt goes on where the earlier response ended, with so many `new` tokens; only those are computed."""
    assert response.usage.input_tokens_details.cached_tokens >= earlier.usage.total_tokens
    assert new is None or response.usage.input_tokens == earlier.usage.total_tokens + new


# Whole responses


def test_whole_response(whole_client: OpenAI) -> None:
    params = {
        "metadata": {"a": "b"},
        "user": "me",
        "reasoning": {"effort": "low"},
        "include": ["reasoning.encrypted_content"],
    }
    response = create(whole_client, "Name a planet.", instructions=INSTRUCTIONS, max_output_tokens=40, **params)
    assert response.id.startswith("resp_")
    assert (response.object, response.status, response.error) == ("response", "completed", None)
    (message,) = response.output
    assert (message.type, message.role, message.status) == ("message", "assistant", "completed")
    assert message.id.startswith("msg_")
    assert message.content[0].text == response.output_text != ""
    assert (response.model, response.instructions, response.metadata) == (MODEL, INSTRUCTIONS, {"a": "b"})
    assert (response.tools, response.tool_choice, response.text.format.type) == ([], "auto", "text")
    usage = response.usage
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert usage.input_tokens == response.slipstream["prompt_tokens"]
    assert usage.input_tokens_details.cached_tokens == response.slipstream["reused_tokens"]
    assert usage.output_tokens_details.reasoning_tokens == 0


def test_answer_that_is_cut_short(client: OpenAI) -> None:
    response = create(client, "Tell me a story.", max_output_tokens=4, extra_body={"ignore_eos": True})
    assert response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.output[-1].status == "incomplete"
    assert response.usage.output_tokens == 4


def test_input_in_all_its_forms_reads_the_same(client: OpenAI) -> None:
    text = "Name a river."
    plain = create(client, text, instructions="Be brief.")
    parts = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]}
    for forms in (
        [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": text}],
        [{"type": "message", "role": "system", "content": [{"type": "input_text", "text": "Be brief."}]}, parts],
        [{"role": "system", "content": "Be brief."}, {"type": "reasoning", "id": "rs_1", "summary": []}, parts],
    ):
        response = create(client, forms)
        assert said(response) == said(plain)
        assert response.usage.input_tokens == plain.usage.input_tokens


def test_call_that_is_cut_short_is_not_complete(client: OpenAI) -> None:
    response = create(client, "How warm is it?", **ONE_CALL, extra_body=FRESH | {"stop": ['"city"']})
    assert (response.status, response.incomplete_details.reason) == ("incomplete", None)
    assert [(item.type, item.status) for item in response.output] == [("function_call", "incomplete")]


def test_answer_of_a_schema(client: OpenAI) -> None:
    response = create(client, "Report the weather as JSON.", text=REPORT_FORMAT, max_output_tokens=60)
    jsonschema.validate(json.loads(response.output_text), REPORT)
    assert response.text.format.name == "report"
    parsed = client.responses.parse(
        model=MODEL, input="Report 4 degrees.", text_format=Report, temperature=0, max_output_tokens=100
    )
    assert isinstance(parsed.output_parsed, Report)
    loose = create(client, "Report as JSON.", text={"format": {"type": "json_object"}}, max_output_tokens=200)
    assert isinstance(json.loads(loose.output_text), dict)


def test_tool_choice(client: OpenAI) -> None:
    def called(**params: Any) -> list[str]:
        response = create(client, "What time is it?", **(ONE_CALL | params))
        return [item.name for item in response.output if item.type == "function_call"]

    assert called(tool_choice={"type": "function", "name": "clock"}) == ["clock"]
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "weather"}]}
    assert called(tool_choice=allowed) == ["weather"]
    assert called(tool_choice="none", max_output_tokens=8) == []
    assert len(called(tool_choice="required")) == 1


# Turns


def test_resent_input_costs_nothing(client: OpenAI, http: httpx.Client) -> None:
    asked = [{"role": "user", "content": "Name a planet."}]
    first = create(client, asked, instructions=INSTRUCTIONS)
    again = [*asked, *(item.model_dump() for item in first.output), {"role": "user", "content": "And another?"}]
    second = create(client, again, instructions=INSTRUCTIONS)
    assert_extends(second, first, new=tokens_of_question(http, "And another?"))


def test_resent_calls_cost_nothing(client: OpenAI) -> None:
    asked = [{"role": "user", "content": "How warm is it, and how late?"}]
    first = create(client, asked, **MANY_CALLS)
    assert len(first.output) > 1
    items = [item.model_dump() for item in first.output]
    for item in items:
        item["arguments"] = json.dumps(json.loads(item["arguments"]), indent=2)
        del item["id"], item["status"]
    outputs = results(first)
    second = create(client, [*asked, *items, *outputs], tools=TOOLS)
    assert_extends(second, first)
    parts = [item | {"output": [{"type": "input_text", "text": item["output"]}]} for item in outputs]
    third = create(client, parts, tools=TOOLS, previous_response_id=first.id)
    assert said(third) == said(second)
    assert third.usage.input_tokens == second.usage.input_tokens


def test_text_and_call_of_one_answer_stay_one(whole_client: OpenAI) -> None:
    first = create(whole_client, SAYS_AND_CALLS, tools=TOOLS, parallel_tool_calls=False, max_output_tokens=60)
    assert first.output_text == "I look up Berlin."
    assert [item.type for item in first.output] == ["message", "function_call"]
    items = [item.model_dump() for item in first.output]
    assert_extends(create(whole_client, [*SAYS_AND_CALLS, *items, *results(first)], tools=TOOLS), first)
    assert_extends(create(whole_client, results(first), tools=TOOLS, previous_response_id=first.id), first)


def test_loop_of_calls_on_stored_responses(client: OpenAI, http: httpx.Client) -> None:
    response = create(client, "How warm is it?", instructions=INSTRUCTIONS, **ONE_CALL)
    for result in ("4 degrees", "5 degrees", "6 degrees"):
        before = response
        response = create(
            client,
            results(before, result),
            previous_response_id=before.id,
            instructions=INSTRUCTIONS,
            **ONE_CALL,
        )
        assert response.previous_response_id == before.id
        new = tokens_of_question(http, f"<tool_response>\n{result}\n</tool_response>")
        assert_extends(response, before, new)
    last = create(client, results(response), previous_response_id=response.id, instructions=INSTRUCTIONS, tools=TOOLS)
    assert_extends(last, response)


def test_branches_of_one_response(client: OpenAI, http: httpx.Client) -> None:
    root = create(client, "Name a planet.")
    branches = [create(client, text, previous_response_id=root.id) for text in ("Why?", "Its moons, please?", "Why?")]
    for branch, text in zip(branches, ("Why?", "Its moons, please?"), strict=False):
        assert_extends(branch, root, new=tokens_of_question(http, text))
    assert said(branches[0]) == said(branches[2])
    deeper = create(client, "Sure?", previous_response_id=branches[1].id)
    assert_extends(deeper, branches[1])


def test_instructions_are_for_one_response(client: OpenAI) -> None:
    instructed = create(client, "Name a planet.", instructions=INSTRUCTIONS)
    items = [{"role": "user", "content": "Name a planet."}, *instructed.output, {"role": "user", "content": "Why?"}]
    plain = create(client, items)
    later = create(client, "Why?", previous_response_id=instructed.id)
    assert (said(later), later.usage.input_tokens) == (said(plain), plain.usage.input_tokens)
    assert later.instructions is None
    other = create(client, "Why?", previous_response_id=instructed.id, instructions="Be loud.")
    assert other.usage.input_tokens == create(client, items, instructions="Be loud.").usage.input_tokens


def test_answer_that_was_cut_short_may_be_gone_on_from(client: OpenAI) -> None:
    call = create(client, "How warm is it?", **(ONE_CALL | {"max_output_tokens": 3}))
    assert call.status == "incomplete"
    assert create(client, "Never mind.", previous_response_id=call.id).status in ("completed", "incomplete")


def test_conversation_is_named(client: OpenAI) -> None:
    for conversation in ("conv_named", {"id": "conv_named"}):
        response = create(client, "Hello.", conversation=conversation)
        assert response.conversation.id == "conv_named"
        assert response.slipstream["session_id"] == "conv_named"


def test_conversation_takes_new_items_alone(client: OpenAI) -> None:
    made = client.conversations.create(items=[{"role": "user", "content": "My name is Ada."}])
    first = create(client, "Say hello.", conversation=made.id)
    second = create(client, "And my name?", conversation=made.id)
    assert second.usage.input_tokens > first.usage.total_tokens
    assert second.usage.input_tokens_details.cached_tokens >= first.usage.total_tokens
    branch = create(client, "And my name?", previous_response_id=first.id)
    assert branch.output_text == second.output_text, "a response of a conversation can be gone on from by its id too"
    assert client.conversations.retrieve(made.id).id == made.id
    assert client.conversations.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.conversations.retrieve(made.id)


def test_instructions_take_the_place_of_a_session_s_own(client: OpenAI, http: httpx.Client) -> None:
    name = "instructed"
    http.post("/v1/sessions", json={"id": name, "messages": [{"role": "system", "content": "Be brief."}]})
    response = create(client, "Hello.", conversation=name, instructions="Be loud.")
    assert response.instructions == "Be loud."
    told = [message["content"] for message in http.get(f"/v1/sessions/{name}").json()["messages"]]
    assert told[:2] == ["Be loud.", "Hello."]


# Streams

PART = ["response.content_part.added", "response.{}_text.done", "response.content_part.done"]


@pytest.mark.parametrize(
    ("params", "kinds"),
    [
        pytest.param({"max_output_tokens": 30}, ["message"], id="text"),
        pytest.param(
            {"input": SAYS_AND_CALLS, "tools": TOOLS, "max_output_tokens": 60},
            ["message", "function_call"],
            id="text and call",
        ),
        pytest.param(ONE_CALL, ["function_call"], id="call"),
        pytest.param(MANY_CALLS | {"max_output_tokens": 300}, None, id="calls"),
        pytest.param({"text": REPORT_FORMAT, "max_output_tokens": 60}, ["message"], id="schema"),
        pytest.param(ONE_CALL | {"max_output_tokens": 3}, None, id="call cut short"),
        pytest.param({"extra_body": FRESH | {"stop": list("aeiouAEIOUT")}}, ["message"], id="nothing"),
    ],
)
def test_stream_equals_the_whole(whole_client: OpenAI, params: dict[str, Any], kinds: list[str] | None) -> None:
    params = {"input": "How warm is it in Oslo?"} | params
    whole = create(whole_client, **params)
    streamed = events(create(whole_client, **params, stream=True))
    created, started, *pieces, end = streamed
    pieces = [event for event in pieces if event.type != "response.in_progress"]  # as where the machine is slow
    assert (created.type, started.type) == ("response.created", "response.in_progress")
    assert created.response.status == started.response.status == "in_progress"
    assert created.response.output == []
    assert end.type == f"response.{whole.status}"
    assert said(end.response) == said(whole)
    assert end.response.slipstream["completion_tokens"] == whole.slipstream["completion_tokens"]
    assert Response.model_validate_json(end.response.model_dump_json(by_alias=True)).id == created.response.id
    assert kinds is None or [item.type for item in end.response.output] == kinds
    for place, item in enumerate(end.response.output):
        own = [event for event in pieces if event.output_index == place]
        assert own == pieces[: len(own)], "one item after the other"
        pieces = pieces[len(own) :]
        assert_item(own, item)
    assert pieces == []


def assert_item(own: list[Any], item: Any) -> None:
    """The events of an item come in order, and add up to it."""
    added, *inner, done = own
    assert (added.type, done.type) == ("response.output_item.added", "response.output_item.done")
    assert (added.item.id, added.item.status) == (item.id, "in_progress")
    assert done.item == item
    assert {event.item_id for event in inner} == {item.id}
    deltas = "".join(event.delta for event in inner if event.type.endswith(".delta"))
    ends = [event for event in inner if not event.type.endswith(".delta")]
    if item.type == "function_call":
        (told,) = ends
        assert told.type == "response.function_call_arguments.done"
        assert (added.item.name, added.item.call_id, added.item.arguments) == (item.name, item.call_id, "")
        assert told.arguments == deltas == item.arguments
        assert told is inner[-1]
    else:
        kind = "reasoning" if item.type == "reasoning" else "output"
        assert [event.type for event in ends] == [name.format(kind) for name in PART]
        assert (inner[0], inner[-2:]) == (ends[0], ends[1:])
        assert ends[1].text == ends[2].part.text == deltas == item.content[0].text


def test_reasoning_is_an_item_of_its_own() -> None:
    request = TurnRequest(prompt="", params=SamplingParams())
    reader = AnswerReader(Dialect("<think></think>"), request.setting.tools, opens_reasoning=True)
    choice = Choice(0, request, None, reader)
    runtime = SimpleNamespace(exact=True, tokenizer=SimpleNamespace(encode=str.split))
    turn: Any = SimpleNamespace(choices=[choice], runner=SimpleNamespace(runtime=runtime))
    answer = ResponseAnswer(turn, ResponseRequest.model_validate({"input": "?", "store": False}), [], {"id": "resp_1"})
    sent = b""
    for text in ("Let me ", "think.</thi", "nk>\n\nFour", " degrees."):
        last = text == " degrees."
        output = Output(text=text, finish_reason="stop" if last else None, counters=TurnCounters() if last else None)
        choice.outputs.append(output)
        sent += b"".join(answer.events(Piece(choice, output, choice.reader.feed(text, last=last))))
    sent += asyncio.run(answer.end())
    items = output_items(choice, "resp_1", Toolbox(()))
    *lines, _ = [line[6:] for line in sent.decode().splitlines() if line.startswith("data: ")]
    pieces = [EVENT.validate_json(line) for line in lines]
    reasoning, message = [TypeAdapter(ResponseOutputItem).validate_python(item) for item in items]
    assert reasoning.content[0].text == "Let me think."
    assert message.content[0].text == "Four degrees."
    for place, item in enumerate((reasoning, message)):
        assert_item([event for event in pieces if event.output_index == place], item)


def test_events_on_the_wire(http: httpx.Client) -> None:
    body = {"input": "Hello.", "max_output_tokens": 4, "stream": True}
    with http.stream("POST", "/v1/responses", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        *blocks, rest = response.read().decode().split("\n\n")
    assert rest == ""
    for number, block in enumerate(blocks):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        assert event["sequence_number"] == number


def test_stream_repeats_a_schema_however_deep(http: httpx.Client) -> None:
    deep = {"type": "function", "name": "f", "parameters": nested(130)}
    body = {"input": "Hello.", "tools": [deep], "tool_choice": "none", "max_output_tokens": 1, "stream": True}
    *_, last, _ = http.post("/v1/responses", json=body).text.split("\n\n")
    name, data = last.split("\n")
    assert name == "event: response.incomplete"
    assert json.loads(data.removeprefix("data: "))["response"]["tools"] == [deep]


def test_streamed_response_is_gone_on_from(client: OpenAI) -> None:
    *_, end = events(create(client, "How warm is it?", **ONE_CALL, stream=True))
    first = end.response
    second = create(client, results(first), previous_response_id=first.id, tools=TOOLS)
    assert_extends(second, first)


def test_async_client_that_streams_and_parses(server: Server) -> None:
    async def run() -> tuple[Any, list[str]]:
        async with (
            server.async_openai() as client,
            client.responses.stream(
                model=MODEL,
                input="Report 4 degrees.",
                text_format=Report,
                temperature=0,
                max_output_tokens=100,
                extra_body=FRESH,
            ) as stream,
        ):
            deltas = [event.delta async for event in stream if event.type == "response.output_text.delta"]
            return await stream.get_final_response(), deltas

    response, deltas = asyncio.run(run())
    assert isinstance(response.output_parsed, Report)
    assert "".join(deltas) == response.output_text
    assert len(deltas) > 1


def test_stream_that_breaks_off_is_failed(client: OpenAI, http: httpx.Client) -> None:
    (likely,) = http.post("/tokenize", json={"content": "aaaa"}).json()["tokens"]
    endless = function("f", {"a": {"type": "string", "pattern": "^(((a{1,99}){1,99}){1,99}){1,99}$"}})
    params = {"tools": [endless], "tool_choice": "required", "max_output_tokens": 200}
    params["extra_body"] = {"logit_bias": {likely: 100}}
    created, *_, last = events(create(client, "Call f.", **params, stream=True))
    assert last.type == "response.failed"
    assert (last.response.status, last.response.error.code) == ("failed", "invalid_prompt")
    assert "simplify" in last.response.error.message
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(created.response.id)


# What is kept


def test_stored_response(client: OpenAI) -> None:
    response = create(client, "Name a planet.", tools=TOOLS, text=REPORT_FORMAT)
    assert client.responses.retrieve(response.id).model_dump() == response.model_dump()
    *_, end = events(create(client, "Name a planet.", stream=True))
    assert client.responses.retrieve(end.response.id).model_dump() == end.response.model_dump()
    client.responses.delete(response.id)
    for forgotten in (client.responses.retrieve, client.responses.delete, client.responses.input_items.list):
        with pytest.raises(openai.NotFoundError) as caught:
            forgotten(response.id)
        assert caught.value.code == "response_not_found"
    with pytest.raises(openai.NotFoundError) as gone:
        create(client, "Why?", previous_response_id=response.id)
    assert (gone.value.code, gone.value.param) == ("previous_response_not_found", "previous_response_id")


def test_deleted_response_leaves_those_after_it(client: OpenAI) -> None:
    first = create(client, "Name a planet.")
    second = create(client, "Why?", previous_response_id=first.id)
    client.responses.delete(first.id)
    third = create(client, "Sure?", previous_response_id=second.id)
    assert_extends(third, second)


def test_response_that_is_not_stored(client: OpenAI) -> None:
    response = create(client, "Name a planet.", store=False)
    assert response.store is False
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)
    with pytest.raises(openai.NotFoundError):
        create(client, "Why?", previous_response_id=response.id)


def test_input_items(client: OpenAI, http: httpx.Client) -> None:
    call = {"type": "function_call", "call_id": "c1", "name": "clock", "arguments": "{}", "id": "fc_mine"}
    output = {"type": "function_call_output", "call_id": "c1", "output": "noon"}
    response = create(client, [{"role": "user", "content": "Time?"}, call, output], tools=TOOLS)
    page = http.get(f"/v1/responses/{response.id}/input_items", params={"order": "asc"}).json()
    ResponseItemList.model_validate(page)
    items = page["data"]
    assert [item["type"] for item in items] == ["message", "function_call", "function_call_output"]
    assert items[0]["content"] == [{"type": "input_text", "text": "Time?"}]
    assert items[1] == call | {"status": "completed"}
    assert (page["first_id"], page["last_id"], page["has_more"]) == (items[0]["id"], items[2]["id"], False)
    listed = client.responses.input_items.list(response.id, limit=1)
    assert listed.data[0].id == items[2]["id"]
    assert [item.id for item in listed] == [item["id"] for item in reversed(items)]
    bad = http.get(f"/v1/responses/{response.id}/input_items", params={"limit": 0})
    assert (bad.status_code, bad.json()["error"]["param"]) == (400, "limit")
    lost = http.get(f"/v1/responses/{response.id}/input_items", params={"after": "msg_lost"})
    assert (lost.status_code, lost.json()["error"]["param"]) == (404, "after")


def test_items_by_reference(client: OpenAI) -> None:
    first = create(client, "How warm is it?", **ONE_CALL)
    asked = client.responses.input_items.list(first.id).data[0]
    references = [{"type": "item_reference", "id": asked.id}, {"id": first.output[0].id}]
    second = create(client, [*references, *results(first)], tools=TOOLS)
    assert_extends(second, first)


# What can't be had

CALL = {"type": "function_call", "call_id": "c1", "name": "clock", "arguments": "{}"}
IMAGE = {"type": "input_image", "image_url": "https://example.com/a.png"}
WEB = {"type": "web_search"}
UNKNOWN_TYPE = function("f", {"a": {"type": "text"}})
UNDEFINED = {
    "type": "custom",
    "name": "g",
    "format": {"type": "grammar", "syntax": "lark", "definition": "start: NONE"},
}


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"input": None}, "input", "input"),
        ({"input": []}, "input", "at least 1"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role", "'robot'"),
        ({"input": [{"role": "user"}]}, "input[0].content", "required"),
        ({"input": [{"type": "message", "content": "x"}]}, "input[0].role", "required"),
        ({"input": [{"role": "user", "content": [IMAGE]}]}, "input[0].content[0]", "input_image"),
        ({"input": [{"type": "teleport_call", "id": "1"}]}, "input[0]", "function_call_output"),
        ({"input": [CALL | {"name": None}]}, "input[0].name", "required"),
        ({"input": [{"type": "function_call_output", "call_id": "c1"}]}, "input[0].output", "required"),
        ({"input": [CALL | {"type": "function_call_output", "output": "4"}]}, "input[0].call_id", "'c1'"),
        ({"input": [CALL, {"type": "function_call_output", "output": "4"}]}, "input[1].call_id", "required"),
        ({"tools": [{"type": "web_search"}], "tool_choice": "required"}, "tool_choice", "there are no tools"),
        ({"tools": [{"type": "function"}]}, "tools[0].name", "required"),
        ({"tools": [WEATHER, WEATHER]}, "tools[1].name", "weather"),
        ({"tools": [group({"type": "function"})]}, "tools[0].tools[0].name", "required"),
        ({"tools": [group({"type": "custom", "name": ""})]}, "tools[0].tools[0].name", "at least 1"),
        ({"tools": [group({"type": "web_search", "name": "f"})]}, "tools[0].tools[0].type", "'function'"),
        ({"tools": [UNKNOWN_TYPE]}, "tools[0].parameters", "the tool 'f' has 'type'"),
        ({"tools": [WEB, CLOCK, WEB, UNKNOWN_TYPE]}, "tools[3].parameters", "tools[3].parameters of the tool 'f'"),
        (
            {"tools": [WEB, group(CLOCK, UNKNOWN_TYPE)]},
            "tools[1].tools[1].parameters",
            "the tool 'group__f' has 'type'",
        ),
        ({"tools": [WEB, group(CLOCK, CLOCK)]}, "tools[1].tools[1].name", "rename one"),
        ({"tools": [WEB, UNDEFINED]}, "tools[1].format.definition", "the tool 'g' is no grammar"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "ring"}}, "tool_choice", "names ring"),
        ({"tools": TOOLS, "tool_choice": {"type": "web_search"}}, "tool_choice", "type function or custom"),
        ({"tool_choice": "required"}, "tool_choice", "tools"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema", "text.format.schema is"),
        (
            {"text": {"format": {"type": "json_schema", "schema": {"type": "text"}, "strict": True}}},
            "text.format.schema",
            "text.format.schema has",
        ),
        ({"text": {"format": {"type": "grammar"}}}, "text.format.type", "'grammar'"),
        ({"max_output_tokens": 0}, "max_output_tokens", "1"),
        ({"max_output_tokens": 9000}, "input", "max_output_tokens of 9,000 is too long"),
        ({"input": "\ud800"}, "input", "valid Unicode"),
        ({"input": [{"role": "user", "content": "\ud800"}]}, "input[0].content", "valid Unicode"),
        ({"input": [{"type": [[]]}]}, "input[0]", "an item must be of type"),
        ({"input": [{"type": "reasoning"}]}, "input", "input is empty"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages", "chat_template_kwargs has"),
        (
            {"text": {"format": {"type": "json_schema", "schema": nested(400), "strict": True}}},
            "text.format.schema",
            "text.format.schema has a schema that is nested too deeply",
        ),
        ({"temperature": -1}, "temperature", "between"),
        ({"background": True}, "background", "not supported"),
        ({"prompt": {"id": "p"}}, "prompt", "instructions"),
        ({"include": ["message.output_text.logprobs"]}, "include", "/v1/chat/completions"),
        ({"conversation": "c", "previous_response_id": "resp_1"}, "previous_response_id", "one"),
        ({"conversation": {"id": ""}}, "conversation", "conversation"),
        ({"slipstream": {"fast": True}}, "slipstream.fast", "leave it out"),
    ],
)
def test_bad_field(http: httpx.Client, body: dict[str, Any], param: str, says: str) -> None:
    content = json.dumps({"input": "Hello.", "max_output_tokens": 4} | body)  # httpx can't send a lone surrogate
    response = http.post("/v1/responses", content=content, headers={"Content-Type": "application/json"})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert error["type"] == "invalid_request_error"
    assert says in error["message"]


def test_bad_items_of_a_conversation(http: httpx.Client) -> None:
    for item, param in (
        ({"role": "user", "content": [IMAGE]}, "items[0].content[0]"),
        ({"role": "robot"}, "items[0].role"),
        ({"role": "user", "content": "word " * 9000}, "items"),
    ):
        response = http.post("/v1/conversations", json={"items": [item]})
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    lost = http.get("/v1/conversations/conv_lost")
    assert (lost.status_code, lost.json()["error"]["param"]) == (404, "conversation_id")


def test_what_is_not_there(http: httpx.Client) -> None:
    reference = {"type": "item_reference", "id": "msg_0123456789abcdef01234567_0"}
    for body, param, code in (
        ({"previous_response_id": "resp_1"}, "previous_response_id", "previous_response_not_found"),
        ({"input": [reference]}, "input[0].id", "item_not_found"),
        ({"input": [{"id": "msg_foreign"}]}, "input[0].id", "item_not_found"),
        ({"model": "gpt-5"}, "model", "model_not_found"),
    ):
        response = http.post("/v1/responses", json={"input": "Hello."} | body)
        assert response.status_code == 404
        assert (response.json()["error"]["param"], response.json()["error"]["code"]) == (param, code)


def test_what_makes_no_difference_is_accepted(client: OpenAI) -> None:
    asked = create(client, "Hello.")
    fields: dict[str, Any] = {
        "truncation": "auto",
        "service_tier": "flex",
        "prompt_cache_key": "k",
        "safety_identifier": "s",
        "max_tool_calls": 3,
        "text": {"verbosity": "low"},
        "reasoning": {"effort": "high", "summary": "auto"},
        "include": ["web_search_call.action.sources"],
        "extra_body": FRESH | {"unheard_of": 1},
    }
    assert said(create(client, "Hello.", **fields)) == said(asked)
