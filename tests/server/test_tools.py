"""Tool calls and answers of a schema, as the official client sees them: whatever is asked, they fit."""

import asyncio
import json
import re
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from itertools import islice
from typing import Any, NamedTuple

import httpx
import jsonschema
import pytest
from openai import OpenAI

from slipstream_bench import bfcl
from slipstream_bench.measurements import tool_validity
from tests.server.process import MODEL, Server, assert_reused
from tests.waiting import HANG


def function(name: str, properties: dict[str, Any], *, description: str = "", **more: Any) -> dict[str, Any]:
    """A tool; all of its parameters are required unless `required` says otherwise."""
    parameters = {"type": "object", "properties": properties, "required": list(properties), **more}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def named(*names: str, mode: str | None = None) -> Any:
    """`tool_choice` for one function, or with a mode for some of them."""
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return tools[0] if mode is None else {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


CITY = {"type": "string", "maxLength": 12}
WEATHER = function(
    "get_weather", {"city": CITY, "unit": {"type": "string", "enum": ["C", "F"]}}, description="Weather of a city"
)
CLOCK = function("get_time", {"zone": {"type": "string", "maxLength": 8}}, description="Time in a zone")
PARAMETERS = {tool["function"]["name"]: tool["function"]["parameters"] for tool in (WEATHER, CLOCK)}
QUESTION: list[Any] = [{"role": "user", "content": "What is the weather in Oslo?"}]
ONE_CALL: dict[str, Any] = {"tools": [WEATHER, CLOCK], "tool_choice": "required", "parallel_tool_calls": False}
NOTE = function("note", {"text": {"type": "string", "maxLength": 2000}, "done": {"type": "boolean"}})
REPORT = {
    "type": "object",
    "properties": {"city": CITY, "degrees": {"type": "integer", "minimum": -40, "maximum": 40}},
    "required": ["city", "degrees"],
}
REPORT_FORMAT = {"type": "json_schema", "json_schema": {"name": "report", "schema": REPORT, "strict": True}}


def habit(say: str = "", *, call: bool = True) -> list[Any]:
    """A conversation in which every question was answered alike: even a small model goes on like that.

    The answers are what `say` says of the city, and a call of `get_weather`; or else a report in JSON.
    """
    messages: list[Any] = []
    for city in ("Oslo", "Rome", "Paris"):
        arguments = json.dumps({"city": city, "unit": "C"})
        made = {"id": f"call_{city}", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}
        calls = {"content": say.format(city) or None, "tool_calls": [made]}
        answer = calls if call else {"content": json.dumps({"city": city, "degrees": 4})}
        messages += [{"role": "user", "content": f"Weather in {city}?"}, {"role": "assistant", **answer}]
    return [*messages, {"role": "user", "content": "Weather in Berlin?"}]


CALLS = habit()
SAYS_AND_CALLS = habit("I look up {}.")
REPORTS = habit(call=False)


def ask(client: OpenAI, messages: list[Any] = QUESTION, **params: Any) -> Any:
    defaults = {"model": MODEL, "temperature": 0, "max_tokens": 100}
    return client.chat.completions.create(messages=messages, **(defaults | params))


class Said(NamedTuple):
    """A choice, without what differs between two answers to the same request."""

    text: str
    calls: list[tuple[str, str]]
    finish_reason: str


def said(answer: Any) -> list[Said]:
    """What the choices of a response say, having checked the form of their calls."""
    result = []
    for choice in answer.choices:
        calls = choice.message.tool_calls or []
        assert all(call.type == "function" and call.id for call in calls)
        assert choice.message.content is not None or calls
        functions = [(call.function.name, call.function.arguments) for call in calls]
        result.append(Said(choice.message.content or "", functions, choice.finish_reason))
    return result


def collected(chunks: Iterable[Any]) -> list[Said]:
    """The same of a stream, having checked the order in which the pieces of a call come."""
    texts: dict[int, str] = {}
    calls: dict[int, list[list[str]]] = {}
    ends: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            index, delta = choice.index, choice.delta
            assert index not in ends, "a delta after the finish reason"
            texts[index] = texts.get(index, "") + (delta.content or "")
            begun = calls.setdefault(index, [])
            for call in delta.tool_calls or []:
                if call.index == len(begun):
                    assert call.id
                    assert call.type == "function"
                    assert call.function.arguments == ""
                    begun.append([call.function.name, ""])
                else:
                    assert call.index == len(begun) - 1
                    assert call.id is call.type is call.function.name is None
                    begun[-1][1] += call.function.arguments
            if choice.finish_reason is not None:
                ends[index] = choice.finish_reason
    return [
        Said(texts[index], [(name, arguments) for name, arguments in calls[index]], ends[index])
        for index in sorted(ends)
    ]


def assert_fits(calls: list[tuple[str, str]]) -> None:
    for name, arguments in calls:
        jsonschema.validate(json.loads(arguments), PARAMETERS[name])


# What may be called


def test_none_gives_text(client: OpenAI) -> None:
    (choice,) = said(ask(client, CALLS, tools=[WEATHER], tool_choice="none"))
    assert choice.calls == []
    assert choice.finish_reason in ("stop", "length")


def test_auto_calls_or_not_as_the_model_likes(whole_client: OpenAI) -> None:
    (choice,) = said(ask(whole_client, CALLS, tools=[WEATHER], tool_choice="auto"))
    assert choice == Said("", [("get_weather", '{"city": "Berlin", "unit": "C"}')], "tool_calls")
    assert said(ask(whole_client, CALLS, tools=[WEATHER])) == [choice]
    (choice,) = said(ask(whole_client, tools=[WEATHER, CLOCK], tool_choice="auto", max_tokens=20))
    assert choice.text
    assert not choice.calls


def test_text_before_a_call(whole_client: OpenAI) -> None:
    (choice,) = said(ask(whole_client, SAYS_AND_CALLS, tools=[WEATHER], parallel_tool_calls=False))
    assert choice == Said("I look up Berlin.", [("get_weather", '{"city": "Berlin", "unit": "C"}')], "tool_calls")


def test_required_gives_calls_alone(client: OpenAI) -> None:
    (choice,) = said(ask(client, **ONE_CALL))
    assert choice.text == ""
    assert choice.finish_reason == "tool_calls"
    assert_fits(choice.calls)


def test_named_function_is_called_once(client: OpenAI) -> None:
    for name in PARAMETERS:
        (choice,) = said(ask(client, tools=[WEATHER, CLOCK], tool_choice=named(name)))
        assert [called for called, _ in choice.calls] == [name]
        assert (choice.text, choice.finish_reason) == ("", "tool_calls")
        assert_fits(choice.calls)


def test_allowed_tools_are_the_only_ones_called(client: OpenAI) -> None:
    tools = [WEATHER, CLOCK]
    choice = named("get_time", mode="required")
    (forced,) = said(ask(client, CALLS, tools=tools, tool_choice=choice, parallel_tool_calls=False))
    assert [name for name, _ in forced.calls] == ["get_time"]
    (free,) = said(ask(client, CALLS, tools=tools, tool_choice=named("get_time", mode="auto")))
    assert all(name == "get_time" for name, _ in free.calls)
    every = ask(client, CALLS, tools=tools, tool_choice=named("get_time", "get_weather", mode="auto"))
    assert said(every) == said(ask(client, CALLS, tools=tools))


def test_parallel_calls_only_if_wanted(client: OpenAI) -> None:
    params = {"tools": [WEATHER, CLOCK], "tool_choice": "required", "max_tokens": 150}
    for seed in range(3):
        sampled = {"temperature": 1, "seed": seed}
        (alone,) = said(ask(client, **params, **sampled, parallel_tool_calls=False))
        assert len(alone.calls) == 1
        assert alone.finish_reason == "tool_calls"
    (several,) = said(ask(client, **params))
    assert len(several.calls) > 1
    assert_fits(several.calls[:-1])


def test_ids_are_unique(client: OpenAI) -> None:
    messages, ids = list(QUESTION), []
    for _ in range(3):
        answer = ask(client, messages, tools=[WEATHER, CLOCK], tool_choice="required").choices[0].message
        ids += [call.id for call in answer.tool_calls]
        results = [{"role": "tool", "tool_call_id": call.id, "content": "4"} for call in answer.tool_calls]
        messages += [answer.model_dump(), *results]
    choices = ask(client, **ONE_CALL, n=3).choices
    ids += [call.id for choice in choices for call in choice.message.tool_calls]
    assert len(ids) > 6
    assert len(set(ids)) == len(ids)


# Streams

AWKWARD = function("f", {"a": {"type": "string", "enum": ['}}, {"b": "c 1', '}}, {"b": "c 2']}})
"""Its argument looks like the end of a call, and of another, as long as the string has not ended."""


@pytest.mark.parametrize(
    ("messages", "params"),
    [
        pytest.param(QUESTION, ONE_CALL, id="required"),
        pytest.param(QUESTION, {"tools": [WEATHER, CLOCK], "tool_choice": "required"}, id="parallel"),
        pytest.param(QUESTION, {**ONE_CALL, "temperature": 1, "seed": 4, "n": 2}, id="sampled choices"),
        pytest.param(QUESTION, {"tools": [WEATHER], "max_tokens": 30}, id="text"),
        pytest.param(CALLS, {"tools": [WEATHER]}, id="auto"),
        pytest.param(SAYS_AND_CALLS, {"tools": [WEATHER], "max_tokens": 60}, id="text and calls"),
        pytest.param(QUESTION, {"tools": [AWKWARD], "tool_choice": named("f")}, id="awkward arguments"),
        pytest.param(QUESTION, {"tools": [function("ping", {})], "tool_choice": named("ping")}, id="no arguments"),
        pytest.param(QUESTION, {"response_format": REPORT_FORMAT}, id="answer of a schema"),
        pytest.param(CALLS, {"tools": [WEATHER], "response_format": REPORT_FORMAT}, id="call or answer"),
        pytest.param(QUESTION, {**ONE_CALL, "logprobs": True, "top_logprobs": 1}, id="logprobs"),
    ],
)
def test_stream_equals_the_whole(client: OpenAI, messages: list[Any], params: dict[str, Any]) -> None:
    whole = said(ask(client, messages, **params))
    assert collected(ask(client, messages, **params, stream=True)) == whole
    plain = {"extra_body": {"slipstream": {"jump_forward": False, "speculation": False}}}  # a token at a time
    assert collected(ask(client, messages, **params, **plain, stream=True)) == whole


def test_name_comes_first_and_arguments_while_they_are_decoded(client: OpenAI) -> None:
    tool = function("note", {"text": {"type": "string", "minLength": 100, "maxLength": 120}})
    chunks = ask(client, tools=[tool], tool_choice=named("note"), stream=True)
    first, *rest = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert (first.function.name, first.function.arguments) == ("note", "")
    assert len(rest) > 5
    assert all(call.function.arguments for call in rest)
    longest = max(len(call.function.arguments) for call in rest)
    assert longest < sum(len(call.function.arguments) for call in rest) / 2


def test_usage_of_a_stream_of_calls(client: OpenAI) -> None:
    whole = ask(client, **ONE_CALL)
    *others, last = ask(client, **ONE_CALL, stream=True, stream_options={"include_usage": True})
    assert last.choices == []
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in others)


# Coming back with results


def results_of(answer: Any) -> list[dict[str, Any]]:
    return [{"role": "tool", "tool_call_id": call.id, "content": "4 °C"} for call in answer.tool_calls or []]


def as_sent_back(answer: Any, content: str | None, **style: Any) -> dict[str, Any]:
    """An assistant's message from a client that reads arguments and writes them again."""
    calls = [call.model_dump() for call in answer.tool_calls]
    for call in calls:
        call["function"]["arguments"] = json.dumps(json.loads(call["function"]["arguments"]), **style)
    return {"role": "assistant", "content": answer.content or content, "tool_calls": calls}


@pytest.mark.parametrize(
    ("messages", "params", "content", "style"),
    [
        pytest.param(QUESTION, {"tool_choice": "required"}, None, {"indent": 2}, id="null content, indented"),
        pytest.param(QUESTION, {"tool_choice": "required"}, "", {"separators": (",", ":")}, id="empty content, dense"),
        pytest.param(SAYS_AND_CALLS, {}, None, {"sort_keys": True}, id="text and call, sorted"),
    ],
)
def test_second_turn_reuses_the_first(
    whole_client: OpenAI, messages: list[Any], params: dict[str, Any], content: str | None, style: dict[str, Any]
) -> None:
    unit = {"type": "string", "enum": ["°C", "°F"]}
    tools = [function("get_weather", {"unit": unit, "city": CITY}, description=f"{style} {content}"), CLOCK]
    first = ask(whole_client, messages, tools=tools, parallel_tool_calls=False, **params)
    answer = first.choices[0].message
    turn = [*messages, as_sent_back(answer, content, **style), *results_of(answer)]
    second = ask(whole_client, turn, tools=tools, tool_choice="none", max_tokens=4)
    assert_reused(second, first)
    third = ask(whole_client, [*turn, second.choices[0].message.model_dump(), *QUESTION], tools=tools, max_tokens=1)
    assert_reused(third, second)
    assert third.slipstream["session_id"] == first.slipstream["session_id"]


def test_results_of_parallel_calls_go_back_in_any_order(client: OpenAI) -> None:
    params = {"tools": [WEATHER, CLOCK], "tool_choice": "required", "max_tokens": 80}
    first = ask(client, **params)
    answer = first.choices[0].message
    assert len(answer.tool_calls) > 1
    results = [{**result, "content": f"result {index}"} for index, result in enumerate(results_of(answer))]
    for ordered in (results, results[::-1]):
        second = ask(client, [*QUESTION, answer.model_dump(), *ordered], **params)
        assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.total_tokens


def test_numbers_as_javascript_writes_them_are_the_same(client: OpenAI, http: httpx.Client) -> None:
    tool = function("set", {"value": {"type": "number", "minimum": 0, "maximum": 9}})
    likely = http.post("/tokenize", json={"content": "0.0"}).json()["tokens"]
    params = {"tools": [tool], "tool_choice": named("set"), "max_tokens": 50}
    first = ask(client, **params, logit_bias={str(token): 100 for token in likely})
    answer = first.choices[0].message
    assert answer.tool_calls[0].function.arguments.startswith('{"value": 0.0')
    turn = [*QUESTION, answer.model_dump(), *results_of(answer)]
    turn[1]["tool_calls"][0]["function"]["arguments"] = '{"value":0}'
    second = ask(client, turn, **params)
    assert_reused(second, first)


def test_streamed_call_is_found_by_the_next_turn(client: OpenAI) -> None:
    chunks = list(ask(client, **ONE_CALL, stream=True, extra_body={"slipstream": {"response_cache": False}}))
    deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    arguments = "".join(delta.function.arguments for delta in deltas)
    call = {"name": deltas[0].function.name, "arguments": arguments}
    answer = {"role": "assistant", "tool_calls": [{"id": deltas[0].id, "type": "function", "function": call}]}
    result = {"role": "tool", "tool_call_id": deltas[0].id, "content": "rain"}
    second = ask(client, [*QUESTION, answer, result], **ONE_CALL)
    first = chunks[-1].slipstream
    assert second.slipstream["reused_tokens"] >= first["prompt_tokens"] + first["completion_tokens"]


# Answers of a schema


@pytest.mark.parametrize("tools", [{}, {"tools": [WEATHER], "tool_choice": "none"}], ids=["alone", "beside tools"])
def test_answer_of_a_schema(client: OpenAI, tools: dict[str, Any]) -> None:
    for sampling in ({}, {"temperature": 1, "seed": 1}):
        (choice,) = said(ask(client, response_format=REPORT_FORMAT, **tools, **sampling))
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.text), REPORT)


def test_any_json_object(client: OpenAI) -> None:
    (choice,) = said(ask(client, REPORTS, response_format={"type": "json_object"}))
    assert choice.finish_reason == "stop"
    assert isinstance(json.loads(choice.text), dict)  # what is in it is up to the model, and differs by processor


def test_schema_beside_tools_leaves_the_choice(whole_client: OpenAI) -> None:
    params = {"tools": [WEATHER], "response_format": REPORT_FORMAT, "parallel_tool_calls": False}
    (call,) = said(ask(whole_client, CALLS, **params))
    assert_fits(call.calls)
    assert call == Said("", call.calls, "tool_calls")
    (answer,) = said(ask(whole_client, REPORTS, **params))
    jsonschema.validate(json.loads(answer.text), REPORT)
    assert answer == Said(answer.text, [], "stop")


def test_schema_beside_required_tools_gives_a_call(client: OpenAI) -> None:
    (choice,) = said(ask(client, **ONE_CALL, response_format=REPORT_FORMAT))
    assert_fits(choice.calls)
    assert choice == Said("", choice.calls, "tool_calls")


# Schemas as real tools have them, and worse

WORD = {"type": "string", "maxLength": 8}
DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}


def thing(properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The schema of an object; all properties are required unless `required` says otherwise."""
    return {"type": "object", "properties": properties, "required": list(properties), **more}


def either(**kinds: dict[str, Any]) -> list[dict[str, Any]]:
    """Schemas told apart by their `kind`."""
    return [thing({"kind": {"const": kind}, **properties}) for kind, properties in kinds.items()]


OPTIONAL_NODE = {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/Node"}]}
TREES = {"type": "array", "items": {"$ref": "#/$defs/Tree"}, "minItems": 1, "maxItems": 2}


VALUES: dict[str, dict[str, Any]] = {
    "nested": thing({"b": thing({"c": thing({"d": DIGIT, "e": WORD})})}),
    "optional": thing({"b": DIGIT, "c": WORD, "d": DIGIT}, required=["c"]),
    "array": {"type": "array", "items": WORD, "minItems": 2, "maxItems": 3},
    "array of objects": {"type": "array", "items": thing({"b": DIGIT}), "minItems": 1, "maxItems": 2},
    "array of arrays": {"type": "array", "items": {"type": "array", "items": DIGIT, "maxItems": 2}, "maxItems": 2},
    "tuple": {"type": "array", "prefixItems": [WORD, DIGIT], "items": False, "minItems": 2},
    "enum": {"enum": ["a", 1, 2.5, None, True, [1], {"b": None}]},
    "enum with a type": {"type": "string", "enum": ["naïve", '"quoted"', "back\\slash", "line\nend", "</tool_call>"]},
    "const": {"const": {"b": [1, "zwei", None]}},
    "anyOf": {"anyOf": [WORD, DIGIT, thing({"b": WORD})]},
    "oneOf": {"oneOf": either(circle={"radius": DIGIT}, square={"side": DIGIT})},
    "anyOf beside properties": thing({"b": DIGIT}, anyOf=[{"required": ["c"]}, {"required": ["b"]}]),
    "allOf": {"allOf": [thing({"b": DIGIT}), thing({"c": WORD})]},
    "pattern": {"type": "string", "pattern": r"^[A-Z]{2}-\d{3,4}$"},
    "pattern found anywhere": {"type": "string", "pattern": "[0-9]x", "maxLength": 12},
    "date": {"type": "string", "format": "date"},
    "date-time": {"type": "string", "format": "date-time", "maxLength": 30},
    "email": {"type": "string", "format": "email", "maxLength": 20},
    "uuid": {"type": "string", "format": "uuid"},
    "ipv4": {"type": "string", "format": "ipv4"},
    "lengths": {"type": "string", "minLength": 3, "maxLength": 5},
    "integer": {"type": "integer", "minimum": -7, "maximum": 1200},
    "integer, exclusive": {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 3},
    "multipleOf": {"type": "integer", "multipleOf": 25, "minimum": 0, "maximum": 1000},
    "number": {"type": "number", "minimum": 0.25, "maximum": 0.75},
    "number, exclusive": {"type": "number", "exclusiveMinimum": -1, "exclusiveMaximum": 0},
    "boolean": {"type": "boolean"},
    "null": {"type": "null"},
    "types": {"type": ["string", "integer", "null"], "maxLength": 6, "minimum": 0, "maximum": 99},
    "map": {"type": "object", "additionalProperties": DIGIT, "maxProperties": 2},
    "map by pattern": {
        "type": "object",
        "patternProperties": {"^x[0-9]$": DIGIT},
        "additionalProperties": False,
        "maxProperties": 2,
    },
    "map by listed keys": {
        "type": "object",
        "propertyNames": {"enum": ["a.b", "c d"]},
        "additionalProperties": DIGIT,
        "minProperties": 1,
        "maxProperties": 1,
    },
    "map by length of keys": {
        "type": "object",
        "propertyNames": {"minLength": 2, "maxLength": 4},
        "additionalProperties": DIGIT,
        "minProperties": 1,
        "maxProperties": 1,
    },
    "set": {"type": "array", "items": {"enum": ["a", "b", "c", "d"]}, "minItems": 3, "uniqueItems": True},
    "open object": thing({"b": DIGIT}, additionalProperties=WORD, maxProperties=3),
    "unicode": thing({"größe": {"enum": ["groß", "小", "🙂"]}, "名前": DIGIT}),
    "awkward names": thing({'say "hi"': DIGIT, "a\\b": DIGIT, "x/y~z": DIGIT, "}}": DIGIT}),
    "title and friends": {**WORD, "title": "T", "default": "d", "examples": ["e"], "deprecated": True, "x-own": [1]},
}
WHOLE: dict[str, Any] = {
    "nothing said": None,
    "empty": {},
    "no properties": {"type": "object", "properties": {}},
    "without type": {"properties": {"a": DIGIT}, "required": ["a"]},
    "definitions": thing(
        {"a": {"$ref": "#/$defs/B"}}, **{"$defs": {"B": thing({"c": {"$ref": "#/$defs/C"}}), "C": DIGIT}}
    ),
    "recursive": {"$defs": {"Node": thing({"value": DIGIT, "next": OPTIONAL_NODE})}, **thing({"a": OPTIONAL_NODE})},
    "tree": {"$defs": {"Tree": {"anyOf": [DIGIT, TREES]}}, **thing({"a": TREES})},
    "recursive to the root": thing(
        {"a": DIGIT, "b": {"type": "array", "items": {"$ref": "#"}, "maxItems": 1}}, required=["a"]
    ),
    "draft 7": {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "definitions": {"B": {"type": "array", "items": [WORD, DIGIT], "additionalItems": False, "minItems": 2}},
        **thing({"a": {"$ref": "#/definitions/B"}}),
    },
    "allOf of definitions": {
        "$defs": {"Base": thing({"a": DIGIT})},
        "allOf": [{"$ref": "#/$defs/Base"}, thing({"b": DIGIT})],
        "maxProperties": 2,
    },
    "reference beside properties": {
        "$defs": {"Base": thing({"a": DIGIT})},
        "$ref": "#/$defs/Base",
        **thing({"b": DIGIT}),
        "maxProperties": 2,
    },
    "reference beside its description": {
        "$defs": {"Base": thing({"a": DIGIT})},
        **thing({"a": {"$ref": "#/$defs/Base", "description": "d", "default": {"a": 1}}}),
    },
    "set of a reference": {
        "$defs": {"Color": {"enum": ["red", "green"]}},
        **thing({"a": {"type": "array", "items": {"$ref": "#/$defs/Color"}, "minItems": 2, "uniqueItems": True}}),
    },
    "required but not described": thing({"a": DIGIT}, required=["a", "b"]),
    "hints that are no formats": thing(
        {name: {**WORD, "format": name} for name in ("password", "path", "binary", "decimal")}
    ),
    "numbers' formats": thing({"a": {**DIGIT, "format": "int32"}, "b": {"type": "boolean", "format": "x"}}),
    "many": thing({f"parameter_{index}": DIGIT if index % 2 else {"type": "boolean"} for index in range(12)}),
}
SCHEMAS = [pytest.param(thing({"a": value}), id=name) for name, value in VALUES.items()] + [
    pytest.param(*schema.values, id=name, marks=schema.marks)
    if hasattr(schema, "marks")
    else pytest.param(schema, id=name)
    for name, schema in WHOLE.items()
]


CHECKER = jsonschema.FormatChecker()


@CHECKER.checks("date", raises=ValueError)
def is_date(value: object) -> bool:
    """By RFC 3339, whose years begin with 0; Python's begin with 1, so another leap year stands for that."""
    return not isinstance(value, str) or bool(date.fromisoformat(re.sub("^0000", "0004", value)))


@pytest.mark.parametrize("schema", SCHEMAS)
def test_calls_fit(client: OpenAI, schema: dict[str, Any] | None) -> None:
    definition = {"name": "réglage_設定", "description": "Naïve «réglage» 🙂"}
    tool = {"type": "function", "function": definition | ({} if schema is None else {"parameters": schema})}
    params = {"tools": [tool], "tool_choice": named("réglage_設定"), "max_tokens": 200}
    samplings: list[dict[str, Any]] = [{}, {"temperature": 1, "seed": 1}]
    with ThreadPoolExecutor(len(samplings)) as threads:
        answers = list(threads.map(lambda sampling: ask(client, **params, **sampling), samplings))
    for answer in answers:
        (choice,) = said(answer)
        ((_, arguments),) = choice.calls
        assert choice == Said("", [("réglage_設定", arguments)], "tool_calls")
        values = json.loads(arguments)
        assert isinstance(values, dict)
        jsonschema.validate(values, schema or {"maxProperties": 0}, format_checker=CHECKER)
        assert "\n" not in arguments


def test_nullable_as_openapi_spells_it(client: OpenAI, http: httpx.Client) -> None:
    tool = function("f", {"a": {"type": "string", "enum": ["x"], "nullable": True}})
    params = {"tools": [tool], "tool_choice": named("f")}
    assert said(ask(client, **params))[0].calls == [("f", '{"a": "x"}')]
    (null,) = http.post("/tokenize", json={"content": " null"}).json()["tokens"]
    assert said(ask(client, **params, logit_bias={str(null): 100}))[0].calls == [("f", '{"a": null}')]


def test_keys_are_counted_once(client: OpenAI, http: httpx.Client) -> None:
    rest = {"patternProperties": {"^x[123]$": DIGIT}, "additionalProperties": False, "minProperties": 2}
    tool = function("f", {"a": {"type": "object", **rest, "maxProperties": 3}})
    (one,) = http.post("/tokenize", json={"content": "1"}).json()["tokens"]
    ((_, arguments),) = said(ask(client, tools=[tool], tool_choice=named("f"), logit_bias={str(one): 100}))[0].calls
    assert len(json.loads(arguments)["a"]) >= 2


def test_leaderboard_sample(server: Server) -> None:
    try:
        cases = list(islice(tool_validity.cases(), 0, None, 40))
    except subprocess.CalledProcessError:
        pytest.skip(f"{bfcl.PACKAGE} is not at hand")

    async def verdicts() -> list[str]:
        turns = asyncio.Semaphore(8)

        async def one(case: bfcl.Case, choice: Any, temperature: float) -> str:
            async with turns:
                return await tool_validity.verdict(http, case, choice, temperature, max_tokens=120)

        async with httpx.AsyncClient(base_url=f"{server.url}/v1", timeout=HANG) as http:
            work = (one(case, choice, float(index % 2)) for index, (_, case, choice) in enumerate(cases))
            return await asyncio.gather(*work)

    found = asyncio.run(verdicts())
    assert len(found) > 20
    assert [verdict for verdict in found if verdict != "valid" and not verdict.startswith("cut off")] == []
    assert found.count("valid") > len(found) / 2


# The same answer, however it's computed


SAMPLED = {"temperature": 0.9, "seed": 5}
SHORT_OF_TOKENS = {"tools": [NOTE], "tool_choice": named("note"), "max_tokens": 40}


@pytest.mark.parametrize(
    ("messages", "params"),
    [
        pytest.param(QUESTION, ONE_CALL, id="required"),
        pytest.param(QUESTION, ONE_CALL | SAMPLED, id="required, sampled"),
        pytest.param(CALLS, {"tools": [WEATHER, CLOCK], "max_tokens": 60}, id="auto"),
        pytest.param(SAYS_AND_CALLS, {"tools": [WEATHER], "max_tokens": 60, **SAMPLED}, id="text and calls, sampled"),
        pytest.param(QUESTION, {"response_format": REPORT_FORMAT, **SAMPLED}, id="answer of a schema, sampled"),
        pytest.param(QUESTION, SHORT_OF_TOKENS, id="closed in time"),
        pytest.param(QUESTION, SHORT_OF_TOKENS | SAMPLED, id="closed in time, sampled"),
    ],
)
def test_switches_change_the_cost_alone(client: OpenAI, messages: list[Any], params: dict[str, Any]) -> None:
    answers, reports = {}, {}
    # From now on the prompt is known, which may take several passes.
    ask(client, messages, **params, extra_body={"slipstream": {"response_cache": False}})
    for jump_forward in (False, True):
        for speculation in (False, True):
            switches = {"jump_forward": jump_forward, "speculation": speculation, "response_cache": False}
            answer = ask(client, messages, **params, extra_body={"slipstream": switches})
            answers[jump_forward, speculation] = said(answer)
            report = reports[jump_forward, speculation] = answer.slipstream
            assert jump_forward or report["forced_tokens"] == 0
            assert speculation or report["drafted_tokens"] == report["accepted_tokens"] == 0
            assert report["accepted_tokens"] <= report["drafted_tokens"]
    plain, jumping, drafting, both = (
        reports[switches] for switches in ((False, False), (True, False), (False, True), (True, True))
    )
    assert all(answer == answers[False, False] for answer in answers.values())
    assert len({report["completion_tokens"] for report in reports.values()}) == 1
    assert plain["forward_passes"] - plain["completion_tokens"] in (0, 1)  # one more to see that the text has ended
    assert jumping["forward_passes"] == plain["forward_passes"] - jumping["forced_tokens"]
    assert drafting["forward_passes"] <= plain["forward_passes"]
    assert both["forward_passes"] <= jumping["forward_passes"]
    if params is ONE_CALL:
        assert jumping["forced_tokens"] > 10
        assert both["forward_passes"] < plain["forward_passes"] / 2


def test_stop_token_among_forced_ones(client: OpenAI, http: httpx.Client) -> None:
    tokens = http.post("/tokenize", json={"content": '{"name'}).json()["tokens"]
    answers = [
        said(ask(client, **ONE_CALL, extra_body={"stop_token_ids": tokens, "slipstream": {"jump_forward": jump}}))
        for jump in (False, True)
    ]
    assert answers[0] == answers[1]


def test_different_requests_at_once_answer_as_each_would_alone(server: Server) -> None:
    requests: list[dict[str, Any]] = [
        {"messages": QUESTION, **ONE_CALL, "max_tokens": 60},
        {"messages": QUESTION, **ONE_CALL, "max_tokens": 60, "temperature": 1, "seed": 3},
        {"messages": CALLS, "tools": [WEATHER], "max_tokens": 60},
        {"messages": QUESTION, "max_tokens": 40},
        {"messages": SAYS_AND_CALLS, "tools": [WEATHER], "max_tokens": 50, "temperature": 0.7, "seed": 8},
        {"messages": QUESTION, "response_format": REPORT_FORMAT, "max_tokens": 60},
    ]

    async def answers() -> tuple[list[Any], list[Any]]:
        async with server.async_openai() as client:

            async def one(request: dict[str, Any], *, reuse: bool = True) -> Any:
                extra = {"slipstream": {"reuse": reuse}}
                answer = await client.chat.completions.create(
                    model=MODEL, **({"temperature": 0} | request), extra_body=extra
                )
                return said(answer), answer.usage.completion_tokens

            together = await asyncio.gather(*(one(request) for request in requests))
            return together, [await one(request, reuse=False) for request in requests]

    together, alone = asyncio.run(answers())
    assert together == alone


# With other parts of the protocol


def test_logprobs_of_a_call_are_those_of_its_tokens(client: OpenAI) -> None:
    plain = ask(client, **ONE_CALL)
    answer = ask(client, **ONE_CALL, logprobs=True, top_logprobs=2)
    assert said(answer) == said(plain)
    entries = answer.choices[0].logprobs.content
    assert len(entries) == answer.usage.completion_tokens == plain.usage.completion_tokens
    text = b"".join(bytes(entry.bytes) for entry in entries).decode()
    assert said(answer)[0].calls[0][1] in text
    assert all(entry.logprob <= 0 and len(entry.top_logprobs) == 2 for entry in entries)
    chunks = ask(client, **ONE_CALL, logprobs=True, top_logprobs=2, stream=True)
    pieces = [chunk.choices[0].logprobs for chunk in chunks]
    assert [entry for piece in pieces if piece for entry in piece.content] == entries


def test_choices_call_by_their_own_seeds(client: OpenAI) -> None:
    params = {**ONE_CALL, "temperature": 1.3}
    together = said(ask(client, **params, seed=21, n=2))
    assert together == [said(ask(client, **params, seed=21 + index))[0] for index in range(2)]


def test_call_is_closed_in_time(client: OpenAI) -> None:
    for max_tokens in (40, 41, 60):
        params = {"tools": [NOTE], "tool_choice": named("note"), "max_tokens": max_tokens}
        (choice,) = said(ask(client, **params))
        ((_, arguments),) = choice.calls
        jsonschema.validate(json.loads(arguments), NOTE["function"]["parameters"])
        assert collected(ask(client, **params, stream=True)) == [choice]


def test_room_that_is_left_changes_nothing(whole_client: OpenAI) -> None:
    size = {"type": "string", "enum": ["大", "小"]}
    tools = [function("get_weather", {"city": CITY, "unit": size}, description=WEATHER["function"]["description"])]
    for params in ({}, {"response_format": REPORT_FORMAT}):
        choices = [
            said(ask(whole_client, SAYS_AND_CALLS, tools=tools, max_tokens=limit, parallel_tool_calls=False, **params))[
                0
            ]
            for limit in (50, 75, 100, 1000)
        ]
        assert choices[0].finish_reason == "tool_calls"
        assert choices == choices[:1] * len(choices)


def test_call_that_is_cut_off_says_so(client: OpenAI) -> None:
    tool = function("note", {"text": {"type": "string", "minLength": 200, "maxLength": 220}})
    params = {"tools": [tool], "tool_choice": named("note"), "max_tokens": 30}
    (choice,) = said(ask(client, **params))
    assert choice.finish_reason == "length"
    ((name, arguments),) = choice.calls
    assert name == "note"
    assert arguments.startswith('{"text": "')
    with pytest.raises(ValueError, match="Unterminated"):
        json.loads(arguments)
    assert collected(ask(client, **params, stream=True)) == [choice]
    (begun,) = said(ask(client, **{**params, "max_tokens": 5}))
    assert begun.finish_reason == "length"


def test_stop_string_inside_a_call_leaves_no_call_to_run(client: OpenAI) -> None:
    tool = function("note", {"text": {"enum": ["one, two"]}})
    cut_off = Said("", [("note", '{"text": "one')], "stop")
    whole = Said("", [("note", '{"text": "one, two"}')], "tool_calls")
    for stop, expected in ((", two", cut_off), ("\n</tool_call>", whole), ("never", whole)):
        params = {"tools": [tool], "tool_choice": named("note"), "stop": stop}
        assert said(ask(client, **params)) == [expected]
        assert collected(ask(client, **params, stream=True)) == [expected]
    before = said(ask(client, tools=[tool], tool_choice=named("note"), stop="note"))
    assert before == [Said('<tool_call>\n{"name": "', [], "stop")], "no call has begun, so it's text"


def test_cut_off_call_can_be_sent_back(client: OpenAI) -> None:
    tool = function("note", {"text": {"type": "string", "minLength": 200, "maxLength": 220}})
    params = {"tools": [tool], "tool_choice": named("note"), "max_tokens": 30}
    first = ask(client, **params)
    answer = first.choices[0].message
    second = ask(client, [*QUESTION, answer.model_dump(), *results_of(answer)], **params)
    assert_reused(second, first)
