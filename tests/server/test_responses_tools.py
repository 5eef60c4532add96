"""Tools of every type in the Responses API, and what Codex counts on beyond: counts, compaction, words of errors."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from openai import BadRequestError, OpenAI

from tests.server.process import MODEL, Server

FIELDS = {"a": {"type": "string", "maxLength": 6}}
SCHEMA = {"type": "object", "properties": FIELDS, "required": ["a"], "additionalProperties": False}


def function(name: str) -> dict[str, Any]:
    return {"type": "function", "name": name, "description": f"Use {name}", "parameters": SCHEMA, "strict": False}


GROUP = {"type": "namespace", "name": "crew", "description": "Others.", "tools": [function("hire"), function("fire")]}
PATCH = {
    "type": "custom",
    "name": "apply_patch",
    "description": "Edits files.",
    "format": {
        "type": "grammar",
        "syntax": "lark",
        "definition": (
            'start: begin line{1,3} end\nbegin: "*** Begin Patch" LF\nend: "*** End Patch" LF?\n'
            'line: ("+" | "-") /[ "\\\\\\t.]{1,4}/ LF -> line\n\n%import common.LF\n'
        ),
    },
}
VERSION = {
    "type": "custom",
    "name": "version",
    "format": {"type": "grammar", "syntax": "regex", "definition": r'v[0-9]{1,2}\.[0-9] "[^"a-zA-Z]{2}"'},
}
NOTE = {"type": "custom", "name": "note", "description": "Takes a note."}
SHELL = {"type": "local_shell"}
WEB = {"type": "web_search", "external_web_access": False}


def ask(client: OpenAI, **more: Any) -> Any:
    body = {"slipstream": {"response_cache": False}}
    params: dict[str, Any] = {"model": MODEL, "input": "Go.", "temperature": 0, "max_output_tokens": 60}
    return client.responses.create(**params | {"extra_body": body} | more)


def streamed(client: OpenAI, **more: Any) -> tuple[list[Any], Any]:
    events = list(ask(client, stream=True, **more))
    return events, events[-1].response


def comparable(item: Any) -> Any:
    return {name: value for name, value in item.to_dict().items() if name not in ("id", "call_id")}


def test_tools_of_a_namespace_are_called_and_taken_back_by_both_names(client: OpenAI) -> None:
    more: Any = {"tools": [GROUP, WEB], "tool_choice": {"type": "function", "namespace": "crew", "name": "fire"}}
    response = ask(client, **more)
    (call,) = response.output
    assert (call.type, call.namespace, call.name) == ("function_call", "crew", "fire")
    events, again = streamed(client, **more)
    assert [comparable(item) for item in again.output] == [comparable(call)]
    added = next(event for event in events if event.type == "response.output_item.added")
    assert (added.item.namespace, added.item.name) == ("crew", "fire")
    given = [{"role": "user", "content": "Go."}, call.to_dict()]
    given += [{"type": "function_call_output", "call_id": call.call_id, "output": "Done."}]
    later = ask(client, tools=[GROUP, WEB], input=given)
    assert later.usage.input_tokens_details.cached_tokens >= response.usage.total_tokens


@pytest.mark.parametrize("tool", [PATCH, VERSION, NOTE], ids=["lark", "regex", "text"])
def test_input_of_a_custom_tool_is_text_of_its_format(client: OpenAI, tool: dict[str, Any]) -> None:
    more: Any = {"tools": [function("f"), tool], "tool_choice": {"type": "custom", "name": tool["name"]}}
    response = ask(client, **more, max_output_tokens=90)
    (call,) = response.output
    assert (call.type, call.name) == ("custom_tool_call", tool["name"])
    if tool is PATCH:
        first, *lines = call.input.removesuffix("\n").split("\n")
        *lines, last = lines
        assert (first, last) == ("*** Begin Patch", "*** End Patch")
        assert lines
        assert all(line[0] in "+-" and 2 <= len(line) <= 5 and set(line[1:]) <= set(' "\\\t.') for line in lines)
    elif tool is VERSION:
        import re

        assert re.fullmatch(tool["format"]["definition"], call.input)
    events, again = streamed(client, **more, max_output_tokens=90)
    assert [comparable(item) for item in again.output] == [comparable(call)]
    deltas = [event.delta for event in events if event.type == "response.custom_tool_call_input.delta"]
    assert "".join(deltas) == call.input
    (done,) = [event for event in events if event.type == "response.custom_tool_call_input.done"]
    assert done.input == call.input
    given = [{"role": "user", "content": "Go."}, call.to_dict()]
    given += [{"type": "custom_tool_call_output", "call_id": call.call_id, "output": "Done."}]
    later = ask(client, tools=more["tools"], input=given)
    assert later.usage.input_tokens_details.cached_tokens >= response.usage.total_tokens


def test_local_shell(client: OpenAI) -> None:
    more: Any = {"tools": [SHELL], "tool_choice": {"type": "local_shell"}}
    response = ask(client, **more)
    (call,) = response.output
    assert call.type == "local_shell_call"
    assert call.action.type == "exec"
    _, again = streamed(client, **more)
    assert [comparable(item) for item in again.output] == [comparable(call)]
    given = [{"role": "user", "content": "Go."}, call.to_dict()]
    given += [{"type": "local_shell_call_output", "id": call.call_id, "output": "Done."}]
    if response.status == "completed":
        later = ask(client, tools=[SHELL], input=given)
        assert later.usage.input_tokens_details.cached_tokens >= response.usage.total_tokens


def test_tools_that_others_host_are_left_out_unless_they_are_required(client: OpenAI) -> None:
    response = ask(client, tools=[WEB, function("f"), {"type": "image_generation"}])
    assert [warning.split(",")[0] for warning in response.slipstream["warnings"]] == [
        "tools[0] is of type 'web_search'",
        "tools[2] is of type 'image_generation'",
    ]
    assert response.usage.input_tokens == ask(client, tools=[function("f")]).usage.input_tokens
    for choice in ("required", {"type": "web_search"}):
        with pytest.raises(BadRequestError, match="tool_choice"):
            ask(client, tools=[WEB], tool_choice=choice)


def test_items_of_tools_that_others_ran_say_nothing(client: OpenAI) -> None:
    question = {"role": "user", "content": "Go."}
    search = {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": {"type": "search"}}
    assert ask(client, input=[search, question]).usage.input_tokens == ask(client).usage.input_tokens


def test_grammar_that_cant_be_expressed_is_let_go_with_a_warning(client: OpenAI) -> None:
    tool = {**NOTE, "format": {"type": "grammar", "syntax": "regex", "definition": "(?=a)b"}}
    response = ask(client, tools=[tool], tool_choice="required")
    assert response.slipstream["warnings"] == [
        "the grammar of the tool 'note' is not enforced: assert is not supported"
    ]
    assert response.output[0].type == "custom_tool_call"
    with pytest.raises(BadRequestError, match=r"tools\[0\]\.format\.definition"):
        ask(client, tools=[{**NOTE, "format": {"type": "grammar", "syntax": "lark"}}])


def test_picture_in_a_result_does_not_end_the_conversation(client: OpenAI) -> None:
    call = {"type": "function_call", "call_id": "a", "name": "f", "arguments": '{"a": "b"}'}

    def count(*output: dict[str, Any]) -> int:
        given = [{"role": "user", "content": "Go."}, call]
        given += [{"type": "function_call_output", "call_id": "a", "output": list(output)}]
        return client.responses.input_tokens.count(model=MODEL, input=given).input_tokens  # type: ignore[arg-type]

    picture = {"type": "input_image", "image_url": "data:image/png;base64,iVBO", "detail": "auto"}
    stand_in = {"type": "input_text", "text": "[input_image: left out, because this model reads text alone]"}
    assert count(picture) == count(stand_in)
    with pytest.raises(BadRequestError, match="read text alone"):
        ask(client, input=[{"role": "user", "content": [picture]}])
    made = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"a": "b"}'}}
    shown = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBO"}}
    chat: Any = [{"role": "user", "content": "Go."}, {"role": "assistant", "tool_calls": [made]}]
    chat += [{"role": "tool", "tool_call_id": "a", "content": [shown]}]
    assert client.chat.completions.create(model=MODEL, messages=chat, max_tokens=2).usage


def test_input_tokens_are_those_of_the_later_prompt(client: OpenAI) -> None:
    more: Any = {"model": MODEL, "instructions": "Be brief.", "tools": [GROUP, function("f")]}
    counted = client.responses.input_tokens.count(input="Go.", **more)
    assert counted.object == "response.input_tokens"
    first = client.responses.create(input="Go.", max_output_tokens=16, **more)
    assert first.usage is not None
    assert counted.input_tokens == first.usage.input_tokens
    goes_on: Any = {"input": "On.", "previous_response_id": first.id}
    second = client.responses.create(**goes_on, max_output_tokens=16, **more)
    assert second.usage is not None
    assert client.responses.input_tokens.count(**goes_on, **more).input_tokens == second.usage.input_tokens


def test_compaction(client: OpenAI, server: Server) -> None:
    more: Any = {"instructions": "Be brief.", "tools": [function("f")]}
    first = ask(client, input="Remember the number 7.", **more)
    compacted: Any = client.responses.compact(
        model=MODEL, input="And 8.", previous_response_id=first.id, extra_body=more | {"max_output_tokens": 24}
    )
    assert compacted.object == "response.compaction"
    *said, summary = compacted.output
    assert [item.content[0].text for item in said] == ["Remember the number 7.", "And 8."]
    assert (summary.type, bool(summary.encrypted_content)) == ("compaction", True)
    assert compacted.usage.input_tokens_details.cached_tokens >= first.usage.total_tokens
    items = [*(item.to_dict() for item in compacted.output), {"role": "user", "content": "Go on."}]
    later = ask(client, input=items, **more)
    assert later.usage.output_tokens > 0
    with pytest.raises(BadRequestError, match="was made by another server"):
        ask(client, input=[{"type": "compaction", "encrypted_content": "gAAAA+?"}])


def test_prompt_that_is_too_long_is_refused_in_words_that_clients_look_for(client: OpenAI) -> None:
    long = "word " * 12_000
    with pytest.raises(BadRequestError, match="exceeds the context window") as raised:
        ask(client, input=long)
    assert raised.value.code == "context_length_exceeded"
    events, response = streamed(client, input=long)
    assert [event.type for event in events] == ["response.created", "response.in_progress", "response.failed"]
    assert response.error.code == "context_length_exceeded"
    with pytest.raises(
        BadRequestError, match=r"maximum context length is \d+ tokens. However, you requested"
    ) as raised:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": long}], max_tokens=9)
    assert raised.value.code == "context_length_exceeded"
    assert json.dumps(raised.value.body)


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[OpenAI]:
    with server.openai() as client:
        yield client
