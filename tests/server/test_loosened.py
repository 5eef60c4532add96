"""Schemas that a grammar can't hold: loosened, reported and checked, or refused if they are strict."""

import json
from typing import Any

import httpx

USER = [{"role": "user", "content": "Call it."}]
TWICE = {"type": "array", "items": {"type": "string", "pattern": "^a$"}, "minItems": 2, "maxItems": 2}
SETS = {"type": "object", "properties": {"set": {**TWICE, "uniqueItems": True}}, "required": ["set"]}
"""Of which no array fits, so that the call can't."""
LOOSENED = (
    "the parameters of the tool 'odd': 'uniqueItems' is not enforced, and the answer is checked once it's complete"
)
FINE = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}


def chat(http: httpx.Client, name: str, **more: Any) -> dict[str, Any]:
    tools = [
        {"type": "function", "function": {"name": "odd", "parameters": SETS}},
        {"type": "function", "function": {"name": "fine", "parameters": FINE}},
    ]
    choice = {"type": "function", "function": {"name": name}}
    response = http.post("/v1/chat/completions", json={"messages": USER, "tools": tools, "tool_choice": choice, **more})
    assert response.status_code == 200, response.text
    return response.json()


def test_a_call_that_does_not_fit_says_so(http: httpx.Client) -> None:
    answer = chat(http, "odd")
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"set": ["a", "a"]}
    loosened, misfit = answer["slipstream"]["warnings"]
    assert loosened == LOOSENED
    assert misfit.startswith(f"the call {call['id']!r} of 'odd' does not fit its schema: set: ['a', 'a']")


def test_an_odd_tool_costs_the_others_nothing(http: httpx.Client) -> None:
    answer = chat(http, "fine")
    assert json.loads(answer["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"]) == {"a": 1}
    assert answer["slipstream"]["warnings"] == []


def test_other_protocols_say_so_too(http: httpx.Client) -> None:
    tool = {"type": "function", "name": "odd", "parameters": SETS}
    body = {"input": "Call it.", "tools": [tool], "tool_choice": {"type": "function", "name": "odd"}}
    warnings = http.post("/v1/responses", json=body).json()["slipstream"]["warnings"]
    assert warnings[0] == LOOSENED
    assert "does not fit" in warnings[1]
    tool = {"name": "odd", "input_schema": SETS}
    body = {"messages": USER, "max_tokens": 60, "tools": [tool], "tool_choice": {"type": "tool", "name": "odd"}}
    warnings = http.post("/v1/messages", json=body).json()["slipstream"]["warnings"]
    assert warnings[0] == LOOSENED
    assert "does not fit" in warnings[1]


MAP = {"type": "object", "additionalProperties": {"const": 1}, "propertyNames": {"pattern": "^[ab]{6}$"}}
AGAIN = {**MAP, "minProperties": 2, "maxProperties": 2}
"""Keys that are too many to be listed, of which this answer has the same one twice."""


def only_a(http: httpx.Client) -> dict[str, float]:
    """The bias of a model that writes nothing else where it may."""
    texts = [http.post("/tokenize", json={"content": "a" * size}).json()["tokens"] for size in range(1, 7)]
    return {str(token): 100.0 for tokens in texts for token in tokens}


def test_a_key_that_comes_twice(http: httpx.Client) -> None:
    bias = only_a(http)
    tool: dict[str, Any] = {"name": "map", "parameters": AGAIN}
    body = {"messages": USER, "tools": [{"type": "function", "function": tool}], "tool_choice": "required"}
    body |= {"parallel_tool_calls": False, "logit_bias": bias, "max_tokens": 80}
    answer = http.post("/v1/chat/completions", json=body).json()
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    assert call["function"]["arguments"] == '{"aaaaaa": 1, "aaaaaa": 1}'
    loosened, misfit, repeated = answer["slipstream"]["warnings"]
    assert loosened.startswith("the parameters of the tool 'map': 'minProperties' is not enforced")
    assert misfit.startswith(f"the call {call['id']!r} of 'map' does not fit its schema: it: ")
    assert repeated == f"the call {call['id']!r} of 'map' has the key 'aaaaaa' twice: readers take the last"
    tool["strict"] = True
    refused = http.post("/v1/chat/completions", json=body).json()["error"]
    assert "the tool 'map' has 'minProperties', which can't be enforced" in refused["message"]
    format = {"type": "json_schema", "json_schema": {"name": "map", "schema": AGAIN}}
    body = {"messages": USER, "response_format": format, "logit_bias": bias, "max_tokens": 80}
    answer = http.post("/v1/chat/completions", json=body).json()
    assert answer["choices"][0]["message"]["content"] == '{"aaaaaa": 1, "aaaaaa": 1}'
    assert answer["slipstream"]["warnings"][-1] == "the answer has the key 'aaaaaa' twice: readers take the last"


def test_a_response_schema(http: httpx.Client) -> None:
    format = {"type": "json_schema", "json_schema": {"name": "sets", "schema": SETS}}
    answer = http.post("/v1/chat/completions", json={"messages": USER, "response_format": format}).json()
    assert answer["choices"][0]["message"]["content"] == '{"set": ["a", "a"]}'
    loosened, misfit = answer["slipstream"]["warnings"]
    assert loosened.startswith("the response schema: 'uniqueItems'")
    assert misfit.startswith("the answer does not fit its schema: set: ")


def test_what_is_no_schema_stops_no_request(http: httpx.Client) -> None:
    parameters = {"type": "object", "properties": {"a": {"type": "nothing"}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    answer = http.post("/v1/chat/completions", json={"messages": USER, "tools": [tool], "max_tokens": 8}).json()
    assert "the tool 'f': 'type' is not enforced" in answer["slipstream"]["warnings"][0]
