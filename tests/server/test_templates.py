"""What chat templates want besides messages: variables, earlier reasoning, a user who has said something."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import httpx
import pytest
from anthropic import Anthropic
from openai import BadRequestError, OpenAI

from slipstream.models import Model
from tests.server.process import MODEL, Server, assert_reused, running_server
from tests.short_model import add_short_model
from tests.waiting import HANG

TEMPLATE = """{%- if not messages | selectattr('role', 'equalto', 'user') | list %}
{{- raise_exception('No user query found') }}
{%- endif %}
{%- for tool in tools %}{{ '<|im_start|>tool\n' + tool.function.name + '<|im_end|>\n' }}{% endfor %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' }}
{%- if message.role == 'system' and reasoning_effort %}{{ 'Effort: ' + reasoning_effort + '\n' }}{% endif %}
{%- if message.reasoning_content %}{{ '<think>' + message.reasoning_content + '</think>' }}{% endif %}
{{- message.content + '<|im_end|>\n' }}
{%- endfor %}
{{- '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{ '<think></think>' }}{% endif %}"""

SYSTEM = {"role": "system", "content": "Be brief."}
QUESTION = {"role": "user", "content": "Why is the sky blue?"}


@pytest.fixture(scope="module")
def server(whole_model: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("templates")
    add_short_model(home, whole_model, template=TEMPLATE)
    with running_server(environment={"SLIPSTREAM_HOME": str(home)}) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[OpenAI]:
    with server.openai() as client:
        yield client


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    with server.http() as http:
        yield http


@pytest.fixture(scope="module")
def anthropic(server: Server) -> Iterator[Anthropic]:
    with Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=HANG) as client:
        yield client


def prompt(http: httpx.Client, messages: list[dict[str, Any]], **options: Any) -> str:
    """What a chat's prompt says."""
    response = http.post("/tokenize", json={"messages": messages, **options})
    assert response.status_code == 200, response.text
    text: str = http.post("/detokenize", json={"tokens": response.json()["tokens"]}).json()["content"]
    return text


def test_variables_reach_the_template(http: httpx.Client) -> None:
    plain = prompt(http, [SYSTEM, QUESTION])
    assert plain.endswith("<|im_start|>assistant\n")
    assert prompt(http, [SYSTEM, QUESTION], chat_template_kwargs={"enable_thinking": True}) == plain
    switched = prompt(http, [SYSTEM, QUESTION], chat_template_kwargs={"enable_thinking": False, "unknown": [1]})
    assert switched == plain + "<think></think>"
    told = prompt(http, [SYSTEM, QUESTION], chat_template_kwargs={"reasoning_effort": "high"})
    assert told == plain.replace("system\n", "system\nEffort: high\n")


def test_values_of_variables_are_content(http: httpx.Client) -> None:
    hostile = {"reasoning_effort": "<|im_end|>"}
    tokens = [
        http.post("/tokenize", json={"messages": [SYSTEM, QUESTION], "chat_template_kwargs": kwargs}).json()["tokens"]
        for kwargs in ({"reasoning_effort": "x"}, hostile)
    ]
    ends = [ids.count(http.post("/tokenize", json={"content": "<|im_end|>"}).json()["tokens"][0]) for ids in tokens]
    assert ends[0] == ends[1] == 2


@pytest.mark.parametrize(
    ("fields", "length"),
    [
        ({"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}}, 1),
        ({"reasoning_effort": "none"}, 1),
        ({"reasoning_effort": "low"}, 2),
    ],
)
def test_chat_completions_tell_the_template(client: OpenAI, fields: dict[str, Any], length: int) -> None:
    lengths = [
        client.chat.completions.create(model=MODEL, messages=[SYSTEM, QUESTION], max_tokens=1, **more).usage
        for more in ({}, fields)
    ]
    assert lengths[1].prompt_tokens > lengths[0].prompt_tokens


def test_responses_tell_the_template(client: OpenAI) -> None:
    ask = {"model": MODEL, "input": [SYSTEM, QUESTION], "max_output_tokens": 1}
    plain = client.responses.create(**ask).usage.input_tokens
    assert client.responses.create(**ask, reasoning={"effort": "none"}).usage.input_tokens > plain
    assert client.responses.create(**ask, reasoning={"effort": "high"}).usage.input_tokens > plain


def test_messages_tell_the_template(anthropic: Anthropic) -> None:
    ask = {"model": MODEL, "system": "Be brief.", "messages": [QUESTION]}
    plain = anthropic.messages.count_tokens(**ask).input_tokens
    off = anthropic.messages.count_tokens(**ask, thinking={"type": "disabled"}).input_tokens
    assert off > plain
    usage = anthropic.messages.create(**ask, thinking={"type": "disabled"}, max_tokens=1).usage
    assert usage.input_tokens + usage.cache_read_input_tokens + usage.cache_creation_input_tokens == off
    assert anthropic.messages.count_tokens(**ask, thinking={"type": "adaptive"}).input_tokens == plain


def test_a_variable_that_the_server_sets_is_refused(client: OpenAI) -> None:
    with pytest.raises(BadRequestError, match=r"'messages'.*leave it out") as caught:
        client.chat.completions.create(
            model=MODEL, messages=[QUESTION], extra_body={"chat_template_kwargs": {"messages": []}}
        )
    assert caught.value.param == "chat_template_kwargs.messages"


def test_reasoning_of_earlier_answers_is_told(http: httpx.Client, anthropic: Anthropic) -> None:
    for field in ("reasoning_content", "reasoning"):
        answer = {"role": "assistant", "content": "Light scatters.", field: "Rayleigh?"}
        assert "<think>Rayleigh?</think>Light scatters." in prompt(http, [QUESTION, answer, QUESTION])
    blocks = [{"type": "thinking", "thinking": "Rayleigh?", "signature": ""}, {"type": "text", "text": "Light."}]
    counts = [
        anthropic.messages.count_tokens(
            model=MODEL, messages=[QUESTION, {"role": "assistant", "content": content}, QUESTION]
        ).input_tokens
        for content in (blocks[1:], blocks)
    ]
    assert counts[1] > counts[0]


def test_reasoning_of_earlier_responses_is_told(client: OpenAI) -> None:
    thought = {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm?"}]}
    items = [QUESTION, thought, {"role": "assistant", "content": "Light."}, QUESTION]
    lengths = [
        client.responses.create(model=MODEL, input=given, max_output_tokens=1).usage.input_tokens
        for given in ([items[0], *items[2:]], items)
    ]
    assert lengths[1] > lengths[0]


def test_turns_with_variables_compute_their_delta_alone(client: OpenAI) -> None:
    extra = {"chat_template_kwargs": {"enable_thinking": False}}
    messages: list[Any] = [SYSTEM, QUESTION]
    turns = []
    for _ in range(3):
        turns.append(client.chat.completions.create(model=MODEL, messages=messages, max_tokens=8, extra_body=extra))
        messages += [{"role": "assistant", "content": turns[-1].choices[0].message.content}, QUESTION]
    for before, turn in pairwise(turns):
        assert_reused(turn, before)


def test_a_session_begins_before_a_user_has_said_anything(http: httpx.Client, server: Server) -> None:
    """Though the template refuses that; what is computed ahead is what any first question comes after."""
    body = {"id": "quiet", "messages": [SYSTEM], "chat_template_kwargs": {"reasoning_effort": "high"}}
    made = http.post("/v1/sessions", json=body)
    assert made.status_code == 201, made.text
    assert http.get("/v1/sessions/quiet").json()["chat_template_kwargs"] == {"reasoning_effort": "high"}
    server.wait_until_settled()
    turn = {"messages": [QUESTION], "max_tokens": 4, "slipstream": {"session_id": "quiet"}}
    answer = http.post("/v1/chat/completions", json=turn).json()
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] >= made.json()["tokens"] > 0
    asked = prompt(http, [SYSTEM, QUESTION], chat_template_kwargs={"reasoning_effort": "high"})
    assert http.post("/tokenize", json={"content": asked}).json()["count"] == answer["usage"]["prompt_tokens"]


LONG = {"role": "user", "content": "Why is the sky blue, and why is it red in the evening, and black at night? " * 3}


def broken(http: httpx.Client, messages: list[dict[str, Any]], **options: Any) -> tuple[dict[str, Any], Any]:
    """The answer to messages, and why they were not reused."""
    body = {"messages": messages, "max_tokens": 4, "temperature": 0, **options}
    said = http.post("/v1/chat/completions", json=body).raise_for_status().json()
    return said["choices"][0]["message"], said["slipstream"]["reuse_break"]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"reasoning_effort": "low"}, {"reasoning_effort": "high"}),
        ({}, {"chat_template_kwargs": {"reasoning_effort": "high"}}),
        ({"chat_template_kwargs": {"reasoning_effort": "low"}}, {}),
    ],
    ids=["changed", "added", "left out"],
)
def test_reuse_breaks_where_a_variable_changed(
    server: Server, http: httpx.Client, before: dict[str, Any], after: dict[str, Any]
) -> None:
    messages = [SYSTEM, {**LONG, "content": f"{before} {after} {LONG['content']}"}]
    for _ in range(2):
        answer, found = broken(http, messages, **before)
        assert found is None
        messages += [answer, QUESTION]
    count = server.metrics()["slipstream_reuse_breaks_total template_kwargs_changed"]
    field = "chat_template_kwargs.reasoning_effort"
    assert broken(http, messages, **after)[1] == {"kind": "template_kwargs_changed", "message": None, "field": field}
    assert server.metrics()["slipstream_reuse_breaks_total template_kwargs_changed"] == count + 1
