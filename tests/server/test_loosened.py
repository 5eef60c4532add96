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
