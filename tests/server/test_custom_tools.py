"""Custom tools in chat completions, as the official client has them: their input is text, or fits a grammar."""

import re
from typing import Any

import httpx
import pytest
from openai import BadRequestError, OpenAI
from openai.types.chat import ChatCompletion

from tests.server.process import MODEL, assert_reused

USER: list[Any] = [{"role": "user", "content": "Go."}]
LINES = 'start: line{1,3}\nline: ("+" | "-") /[ "\\\\\\t.]{1,4}/ LF -> line\n\n%import common.LF\n'
VERSION = r'v[0-9]{1,2}\.[0-9] "[^"a-zA-Z]{2}"'
ENDLESS = "((a{50,60}){50,60}){50,60}"


def custom(name: str, syntax: str = "", definition: str = "") -> Any:
    """A custom tool, with a grammar if one is given."""
    tool: dict[str, Any] = {"name": name, "description": f"Use {name}."}
    if syntax:
        tool["format"] = {"type": "grammar", "grammar": {"syntax": syntax, "definition": definition}}
    return {"type": "custom", "custom": tool}


def choose(name: str) -> Any:
    return {"type": "custom", "custom": {"name": name}}


PATCH, RELEASE, NOTE = custom("patch", "lark", LINES), custom("release", "regex", VERSION), custom("note")
FIELDS = {"on": {"type": "boolean"}}
LIGHT: Any = {
    "type": "function",
    "function": {"name": "light", "parameters": {"type": "object", "properties": FIELDS, "required": ["on"]}},
}


def ask(client: OpenAI, messages: list[Any], **more: Any) -> Any:
    body = {"slipstream": {"response_cache": False}}
    params: dict[str, Any] = {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 90}
    return client.chat.completions.create(**params | {"extra_body": body} | more)


def assert_fits(call: Any) -> None:
    assert call.type == "custom"
    if call.custom.name == "patch":
        *lines, rest = call.custom.input.split("\n")
        assert lines
        assert rest == ""
        assert all(re.fullmatch(r'[+-][ "\\\t.]{1,4}', line) for line in lines)
    elif call.custom.name == "release":
        assert re.fullmatch(VERSION, call.custom.input)


@pytest.mark.parametrize("tool", [PATCH, RELEASE, NOTE], ids=["lark", "regex", "text"])
def test_input_is_text_of_its_format_whole_and_streamed(client: OpenAI, tool: Any) -> None:
    name = tool["custom"]["name"]
    more: Any = {"tools": [LIGHT, tool], "tool_choice": choose(name)}
    answer = ask(client, USER, **more)
    ChatCompletion.model_validate(answer.to_dict())  # which the client itself takes less seriously
    (call,) = answer.choices[0].message.tool_calls
    assert_fits(call)
    assert call.custom.name == name
    assert answer.choices[0].message.content is None
    assert answer.choices[0].finish_reason in ("tool_calls", "length")
    assert answer.slipstream["warnings"] == []
    deltas = [chunk.choices[0].delta for chunk in ask(client, USER, **more, stream=True)]
    assert deltas[0].content is None
    calls = [each for delta in deltas for each in delta.tool_calls or ()]
    first, *rest = [each.to_dict() for each in calls]
    assert first == {"index": 0, "id": first["id"], "type": "custom", "custom": {"name": name, "input": ""}}
    assert all(set(each) == {"index", "custom"} and set(each["custom"]) == {"input"} for each in rest)
    assert len(rest) > 1
    assert "".join(each["custom"]["input"] for each in rest) == call.custom.input
    # The client's own way to put a stream together, up to where it fails on custom tools of any server.
    with client.chat.completions.stream(model=MODEL, messages=USER, temperature=0, max_tokens=90, **more) as stream:
        list(stream)
        (gathered,) = stream.current_completion_snapshot.choices[0].message.tool_calls or ()
    told = gathered.to_dict()
    assert (told["type"], told["custom"]) == ("custom", call.custom.to_dict())
    # And it comes back as the client has it, with a null for the function that it isn't.
    result = {"role": "tool", "tool_call_id": told["id"], "content": "Done."}
    later = ask(client, [*USER, {"role": "assistant", "tool_calls": [told]}, result], tools=more["tools"], max_tokens=4)
    assert_reused(later, answer)


def test_a_loop_reuses_what_it_computed(client: OpenAI) -> None:
    more: Any = {"tools": [PATCH, LIGHT, RELEASE]}
    messages = list(USER)
    before: Any = None
    for name in ("patch", "release"):
        answer = ask(client, messages, **more, tool_choice=choose(name))
        if before is not None:
            assert_reused(answer, before)
        (call,) = answer.choices[0].message.tool_calls
        assert_fits(call)
        messages += [answer.choices[0].message.to_dict(), {"role": "tool", "tool_call_id": call.id, "content": "Done."}]
        before = answer
    streamed = ask(client, messages, **more, tool_choice="none", stream=True, stream_options={"include_usage": True})
    assert_reused(list(streamed)[-1], before)


@pytest.mark.parametrize(
    "choice",
    [
        "required",
        {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [choose("note"), choose("release")]}},
    ],
)
def test_choices_among_tools_of_both_kinds(client: OpenAI, choice: Any) -> None:
    answer = ask(client, USER, tools=[LIGHT, NOTE, RELEASE], tool_choice=choice, parallel_tool_calls=False)
    (call,) = answer.choices[0].message.tool_calls
    name = call.function.name if call.type == "function" else call.custom.name
    assert name in ("light", "note", "release")
    assert call.type == ("function" if name == "light" else "custom")
    if choice != "required":
        assert call.type == "custom"


def test_sessions_keep_custom_tools(http: httpx.Client) -> None:
    body = {"tools": [RELEASE, NOTE, LIGHT], "messages": USER}
    made = http.post("/v1/sessions", json=body)
    assert made.status_code == 201, made.text
    session = made.json()["id"]
    with_session = {"messages": [], "slipstream": {"session_id": session}, "max_tokens": 60}
    asked = {**with_session, "messages": USER, "tool_choice": choose("release")}
    answer = http.post("/v1/chat/completions", json=asked).json()["choices"][0]["message"]
    (call,) = answer["tool_calls"]
    assert re.fullmatch(VERSION, call["custom"]["input"])
    whole = http.get(f"/v1/sessions/{session}").json()
    assert whole["messages"][-1]["tool_calls"] == [call]
    note = {"type": "custom", "custom": {**NOTE["custom"], "format": {"type": "text"}}}
    assert whole["tools"][:2] == [RELEASE, note]
    counts = [
        http.post("/tokenize", json={"messages": whole["messages"], "tools": tools}).json()["count"]
        for tools in (body["tools"], whole["tools"])
    ]
    assert counts[0] == counts[1]
    assert http.delete(f"/v1/sessions/{session}").status_code == 200


@pytest.mark.parametrize(
    ("syntax", "definition", "says"),
    [
        ("regex", "(", "unterminated"),
        ("lark", 'start: "a', "is not understood"),
        ("lark", "start: <[2]>", "is not understood"),
        ("lark", "start: nowhere", 'unknown name: "nowhere"'),
        ("lark", 'begin: "a"', 'unknown name: "start"'),
        ("lark", 'start: ("a"', "Expected token"),
        ("lark", "", 'unknown name: "start"'),
    ],
)
def test_a_grammar_that_is_none_is_refused(client: OpenAI, syntax: str, definition: str, says: str) -> None:
    with pytest.raises(BadRequestError) as raised:
        ask(client, USER, tools=[LIGHT, custom("note", syntax, definition)])
    assert raised.value.param == "tools[1].custom.format.grammar.definition"
    assert says in raised.value.message
    form = {"type": "grammar", "syntax": syntax, "definition": definition}
    tools: Any = [{"type": "function", **LIGHT["function"]}, {"type": "custom", "name": "note", "format": form}]
    with pytest.raises(BadRequestError) as raised:
        client.responses.create(model=MODEL, input="Go.", tools=tools)
    assert raised.value.param == "tools[1].format.definition"
    assert says in raised.value.message


@pytest.mark.parametrize(
    ("syntax", "definition", "why"),
    [
        ("regex", "(?=a)b", "assert is not supported"),
        ("lark", 'start: "a"\n%ignore " "', "%ignore is not supported"),
        ("regex", ENDLESS, "it takes too much to compile"),
    ],
)
def test_a_grammar_that_cant_be_held_is_let_go_with_a_warning(
    client: OpenAI, syntax: str, definition: str, why: str
) -> None:
    tool = custom("note", syntax, definition)
    answer = ask(client, USER, tools=[tool], tool_choice="required", parallel_tool_calls=False)
    assert answer.choices[0].message.tool_calls[0].custom.name == "note"
    assert answer.slipstream["warnings"] == [f"the grammar of the tool 'note' is not enforced: {why}"]
