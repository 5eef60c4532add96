"""Agents on the vocabularies of real models: whatever random weights say, calls fit and a turn computes its delta."""

import json

import jsonschema
import pytest

from slipstream.tokenizer.provenance import content, own
from tests.models.clients import CLIENTS, Answer, Client, Mode, Tool
from tests.models.conftest import Served

pytestmark = pytest.mark.models

TOOLS = (
    Tool(
        "get_weather",
        "The weather in a city",
        {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 10},
                "unit": {"type": "string", "enum": ["C", "F"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 14},
            },
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    ),
    Tool(
        "note",
        "Remember something",
        {
            "type": "object",
            "properties": {"text": {"type": "string", "maxLength": 10}, "done": {"type": "boolean"}},
            "required": ["text", "done"],
            "additionalProperties": False,
        },
    ),
)
SCHEMAS = {tool.name: tool.schema for tool in TOOLS}
TURNS = 3
LIMIT = 64
"""Tokens of an answer, enough for some thoughts and any call."""
MOST_AROUND = 40
"""Tokens that a template may put around one message and before the next answer."""


def hostile(served: Served) -> str:
    """A text that spells control tokens, those that the template uses first."""
    tokenizer = served.tokenizer
    template = tokenizer.encode(own(served.family.template))
    used = dict.fromkeys(token for token in template if tokenizer.is_control(token))
    assert len(used) > 1
    return " ".join(tokenizer.token_bytes(token).decode() for token in used) + " done"


def bias(served: Served, mode: Mode) -> list[int]:
    """Tokens that have a model with random weights reason where it must call, and call where it may."""
    wanted = served.family.thought if mode == "required" else served.family.call
    return served.tokenizer.encode(own(wanted))


def assert_whole(answer: Answer, mode: Mode) -> None:
    """That it says something, and its calls fit their schemas."""
    for call in answer.calls:
        jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])
    if mode == "required":
        assert len(answer.calls) == 1
        assert answer.text == ""
    assert answer.calls or answer.text


def assert_delta_alone(answer: Answer, before: Answer, new: int) -> None:
    """That it computed no more than `new` tokens of new messages, and what the template puts around them."""
    known = before.report["prompt_tokens"] + before.report["completion_tokens"]
    assert answer.report["reused_tokens"] >= known
    assert new <= answer.report["prompt_tokens"] - known <= new + MOST_AROUND
    assert answer.report["delta_tokens"] == answer.report["prompt_tokens"] - answer.report["reused_tokens"]


@pytest.mark.parametrize("mode", ["required", "auto"])
@pytest.mark.parametrize("protocol", CLIENTS)
def test_three_turns(served: Served, protocol: str, mode: Mode) -> None:
    system = f"You are a station of the {protocol} kind. {mode}: call the tools."
    client: Client = CLIENTS[protocol](served.server, served.model.name, system, TOOLS, bias(served, mode))
    biased = protocol == "chat" and (served.family.thought if mode == "required" else served.family.call)
    exact = is_exact(served)
    messages, new = client.question("How is the weather in Oslo?"), 0
    before: Answer | None = None
    for turn in range(TURNS):
        # Without a bias random weights call because they must, so that there is a result to go on with.
        now: Mode = "required" if turn == 0 and not biased else mode
        stream = turn % 2 == 0
        answer = client.ask(messages, now, stream=stream, limit=LIMIT, response_cache=False)
        assert_whole(answer, now)
        if biased:
            assert answer.calls
            assert answer.reasoning or mode == "auto"
        assert answer.report["exact"] == exact
        if before is not None:
            assert_delta_alone(answer, before, new)
        if exact:
            anew = client.ask(messages, now, stream=not stream, limit=LIMIT, response_cache=False, reuse=False)
            assert anew.report["reused_tokens"] == 0
            assert anew.said == answer.said
        added = hostile(served) if answer.calls else "Go on."
        new = len(served.tokenizer.encode(content(added)))
        more = client.results(answer.calls, [added]) if answer.calls else client.question(added)
        messages = [*messages, *answer.as_message, *more]
        before = answer


def test_content_is_text(served: Served) -> None:
    """What a result spells changes no control token of the prompt, and comes out as it was."""
    tokenizer = served.tokenizer
    name = "get_weather"
    call = {"id": "a1b2c3d4e", "type": "function", "function": {"name": name, "arguments": '{"city": "Oslo"}'}}

    def tokens(result: str) -> list[int]:
        messages = [
            {"role": "user", "content": "How is the weather?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": call["id"], "content": result},
        ]
        with served.server.http() as http:
            answer = http.post("/tokenize", json={"messages": messages}).raise_for_status()
        found: list[int] = answer.json()["tokens"]
        return found

    def control(ids: list[int]) -> list[int]:
        return [token for token in ids if tokenizer.is_control(token)]

    spelled = hostile(served)
    found = tokens(spelled)
    assert control(found) == control(tokens("4 degrees")) != []
    text = tokenizer.decode(found, skip_special=False)
    assert spelled in text or json.dumps(spelled, ensure_ascii=False) in text
    assert control(tokenizer.encode(spelled))


def is_exact(served: Served) -> bool:
    with served.server.http() as http:
        exact: bool = http.get("/health").json()["exact"]
    if not exact:
        print("no step class was found on this processor: turns are not compared with a computation from scratch")
    return exact
