"""What Anthropic's clients count on beyond an answer: words of errors, models, deferred tools, what can't be read."""

import json
import re
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pytest
from anthropic import Anthropic

from tests.server.process import MODEL, Server, running_server
from tests.server.test_anthropic import QUESTION, TOOLS, WEATHER, ask, openai_prompt, token_count, total
from tests.waiting import HANG

PICTURE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBO"}}
CALL = {"type": "tool_use", "id": "a", "name": "get_weather", "input": {"city": "Oslo", "unit": "C"}}


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Anthropic]:
    with Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=HANG) as client:
        yield client


def result(*content: Any) -> list[Any]:
    """A conversation that waits for an answer to the result of a call."""
    found = {"type": "tool_result", "tool_use_id": "a", "content": list(content)}
    return [*QUESTION, {"role": "assistant", "content": [CALL]}, {"role": "user", "content": [found]}]


def count(client: Anthropic, messages: list[Any], **more: Any) -> int:
    return client.messages.count_tokens(model=MODEL, messages=messages, **more).input_tokens


def test_too_long_an_answer_is_refused_in_words_that_clients_parse(client: Anthropic) -> None:
    """Claude Code asks for 32,000 tokens whatever the context; it asks for fewer by the numbers in this message."""
    limit = client.models.retrieve(MODEL).max_input_tokens
    prompt = count(client, QUESTION)
    with pytest.raises(anthropic.BadRequestError) as raised:
        ask(client, max_tokens=32_000)
    message: Any = raised.value.body
    assert message["error"]["message"] == (
        f"input length and `max_tokens` exceed context limit: {prompt} + 32000 > {limit}, "
        "decrease input length or `max_tokens` and try again"
    )
    assert ask(client, max_tokens=4).usage.output_tokens == 4


def test_too_long_a_prompt_is_refused_in_words_that_clients_parse(client: Anthropic) -> None:
    limit = client.models.retrieve(MODEL).max_input_tokens
    assert limit is not None
    messages: Any = [{"role": "user", "content": "word " * limit}]
    with pytest.raises(anthropic.BadRequestError) as raised:
        ask(client, messages, max_tokens=1)
    body: Any = raised.value.body
    match = re.fullmatch(r"prompt is too long: (\d+) tokens > (\d+) maximum", body["error"]["message"])
    assert match is not None
    assert (int(match[1]), int(match[2])) == (count(client, messages), limit - 1)


def test_models_as_anthropics_client_lists_them(client: Anthropic, http: httpx.Client) -> None:
    page = client.models.list()
    (model,) = page.data
    assert (page.has_more, page.first_id, page.last_id) == (False, MODEL, MODEL)
    assert (model.type, model.id, model.display_name) == ("model", MODEL, MODEL)
    assert model == client.models.retrieve(MODEL)
    assert int(model.created_at.timestamp()) == http.get("/v1/models").json()["data"][0]["created"]


def test_somebody_is_there(http: httpx.Client) -> None:
    assert http.head("/").status_code == http.get("/").status_code == 200
    assert http.head("/").content == b""


def test_model_goes_by_its_aliases_too(server: Server) -> None:
    names = ("claude-sonnet-4-5", "gpt-5.1-codex")
    with running_server(*(option for name in names for option in ("--served-model-name", name))) as aliased:
        with Anthropic(base_url=aliased.url, api_key="none", max_retries=0, timeout=HANG) as client:
            for name in (*names, MODEL):
                assert ask(client, model=name, max_tokens=1).model == name
            assert [model.id for model in client.models.list()] == [*names, MODEL]
            with pytest.raises(anthropic.NotFoundError, match="claude-opus"):
                ask(client, model="claude-opus", max_tokens=1)
        with aliased.openai() as other:
            for name in (*names, MODEL):
                messages: Any = [{"role": "user", "content": "?"}]
                assert other.chat.completions.create(model=name, messages=messages, max_tokens=1).model == name
                assert other.responses.create(model=name, input="?", max_output_tokens=1).model == name
                assert other.completions.create(model=name, prompt="?", max_tokens=1).model == name


def test_a_text_stands_for_a_picture_in_a_result(client: Anthropic) -> None:
    """So it does for whatever else can't be read: the client sends it again with every later turn."""
    pdf = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "JVBE"}}
    shown = [
        (PICTURE, "[image/png: left out, because this model reads text alone]"),
        (pdf, "[application/pdf: left out, because this model reads text alone]"),
        ({"type": "container_upload"}, "[container_upload: left out, because this model reads text alone]"),
    ]
    for block, text in shown:
        seen = count(client, result({"type": "text", "text": "Here."}, block))
        assert seen == count(client, result({"type": "text", "text": f"Here.\n{text}"}))
    assert ask(client, result(PICTURE), max_tokens=2).usage.output_tokens == 2
    with pytest.raises(anthropic.BadRequestError, match="'image', but this server's models read text alone"):
        ask(client, [{"role": "user", "content": [PICTURE]}])


def test_documents_and_search_results_of_text_are_text(client: Anthropic) -> None:
    text = {"type": "text", "text": "One.\nTwo."}
    document = {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "One.\nTwo."}}
    blocks = {"type": "document", "source": {"type": "content", "content": [{"type": "text", "text": "One.\nTwo."}]}}
    for block in (document, blocks):
        for messages in (lambda each: [{"role": "user", "content": [each]}], result):
            assert count(client, messages(block)) == count(client, messages(text))
    found = {"type": "search_result", "source": "a.md", "title": "A", "content": [{"type": "text", "text": "One."}]}
    assert count(client, result(found)) == count(client, result({"type": "text", "text": "A (a.md)\nOne."}))


def test_deferred_tools_leave_the_prompt_before_them_as_it_is(client: Anthropic) -> None:
    """A tool with `defer_loading` is described where a result or a message refers to it."""
    deferred: Any = {**WEATHER, "name": "get_wind", "defer_loading": True}
    before: Any = {"tools": TOOLS, "max_tokens": 4}
    first = ask(client, **before)
    tools = [*TOOLS, deferred]
    assert count(client, QUESTION, tools=tools) == count(client, QUESTION, tools=TOOLS)
    reference = {"type": "tool_reference", "tool_name": "get_wind"}
    messages = [*QUESTION, {"role": "assistant", "content": first.content}, *result(reference)[1:]]
    second = ask(client, messages, tools=tools, max_tokens=4)
    assert second.usage.cache_read_input_tokens >= total(first.usage)
    text = {"type": "text", "text": "The tool get_wind is available from now on:\n"}
    described = {"name": "get_wind", "description": WEATHER["description"], "parameters": WEATHER["input_schema"]}
    text["text"] += json.dumps(described, ensure_ascii=False)
    assert count(client, result(reference), tools=tools) == count(client, result(text), tools=tools)
    change = {"type": "tool_addition", "tool": {"type": "tool_reference", "name": "get_wind"}}
    added, told = ([*QUESTION, {"role": "system", "content": [each]}] for each in (change, text))
    assert count(client, added, tools=tools) == count(client, told, tools=tools)
    called = ask(client, messages, tools=tools, tool_choice={"type": "tool", "name": "get_wind"}, max_tokens=80)
    assert [block.name for block in called.content] == ["get_wind"]


def test_a_changed_system_text_leaves_the_tools_before_it_as_they_were(client: Anthropic) -> None:
    """Claude Code writes the state of a repository there: that must not cost the tools, which are most of a prompt."""
    tools: Any = [{**WEATHER, "name": f"tool_{number}"} for number in range(20)]
    system = "You look after a repository. " * 4
    clean, dirty = (
        ask(client, system=f"{system}Its state: {state}.", tools=tools, max_tokens=1) for state in ("clean", "changed")
    )
    described = count(client, QUESTION, tools=tools) - count(client, QUESTION)
    assert clean.usage.cache_read_input_tokens < described
    assert dirty.usage.cache_read_input_tokens > described + 20, "and what precedes the change in the text itself"
    assert dirty.usage.cache_creation_input_tokens < 40


def test_hosted_tools_are_left_out_with_a_warning(client: Anthropic) -> None:
    hosted = {"type": "web_search_20250305", "name": "web_search", "max_uses": 5}
    message: Any = ask(client, tools=[hosted, *TOOLS], max_tokens=2)
    assert message.slipstream["warnings"] == [
        "tools[0] is of type 'web_search_20250305', which is run by the server that it's made for: it was left out here"
    ]
    assert count(client, QUESTION, tools=[hosted, *TOOLS]) == count(client, QUESTION, tools=TOOLS)
    assert ask(client, tools=TOOLS, max_tokens=2).slipstream["warnings"] == []


def test_a_text_that_litellm_puts_before_calls_is_none(client: Anthropic, http: httpx.Client) -> None:
    stand_in = {"type": "text", "text": "[System: Empty message content sanitised to satisfy protocol]"}
    plain = [*QUESTION, {"role": "assistant", "content": [CALL]}]
    padded = [*QUESTION, {"role": "assistant", "content": [stand_in, CALL]}]
    found = result({"type": "text", "text": "4"})[2:]
    assert count(client, padded + found) == count(client, plain + found)
    said: Any = [*QUESTION, {"role": "assistant", "content": [stand_in]}, *QUESTION]
    answer = {"role": "assistant", "content": stand_in["text"]}
    assert count(client, said) == openai_prompt(http, QUESTION[0], answer, QUESTION[0])


def test_no_tokens_at_all_warm_the_cache(client: Anthropic) -> None:
    system = "You warm up before a long day of work at the station. " * 8
    warmed = ask(client, system=system, max_tokens=0)
    assert (warmed.content, warmed.stop_reason, warmed.usage.output_tokens) == ([], "max_tokens", 0)
    assert warmed.usage.cache_creation_input_tokens > 50
    first = ask(client, system=system, max_tokens=3)
    assert first.usage.cache_read_input_tokens >= total(warmed.usage) - 1
    cold = ask(client, system=system, max_tokens=3, extra_body={"temperature": 0, "slipstream": {"reuse": False}})
    assert [block.text for block in cold.content] == [block.text for block in first.content]


def test_usage_adds_up_to_the_prompt_in_every_protocol(server: Server, client: Anthropic) -> None:
    """What is computed is written to the cache, unless nothing is to be kept."""
    for reuse in (True, False):
        body: Any = {"slipstream": {"reuse": reuse, "response_cache": False}}
        system = f"You add up, {reuse}."
        message: Any = ask(client, system=system, max_tokens=2, extra_body=body)
        usage, report = message.usage, message.slipstream
        assert usage.cache_creation_input_tokens == (report["delta_tokens"] if reuse else 0)
        assert total(usage) - usage.output_tokens == report["prompt_tokens"]
        with server.openai() as other:
            messages: Any = [{"role": "system", "content": f"{system} Now."}, *QUESTION]
            chat: Any = other.chat.completions.create(model=MODEL, messages=messages, max_tokens=2, extra_body=body)
            written = chat.usage.prompt_tokens_details.cache_write_tokens
            assert written == (chat.slipstream["delta_tokens"] if reuse else 0)
            response: Any = other.responses.create(model=MODEL, input="Add.", max_output_tokens=16, extra_body=body)
            written = response.usage.input_tokens_details.cache_write_tokens
            assert written == (response.slipstream["delta_tokens"] if reuse else 0)


def test_the_likeliest_token_alone(client: Anthropic, http: httpx.Client) -> None:
    greedy = ask(client, max_tokens=8)
    cut = ask(
        client, max_tokens=8, extra_body={"temperature": 1.0, "top_p": 0, "slipstream": {"response_cache": False}}
    )
    assert cut.content == greedy.content
    body = {"messages": QUESTION, "top_p": 0, "max_tokens": 2}
    assert http.post("/v1/chat/completions", json=body).status_code == 200
    assert token_count(http, content="x") == 1
