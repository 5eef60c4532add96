"""Whatever is wrong with a request, the answer has OpenAI's shape, names the field, and says what to do."""

import json
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from tests.server.process import MODEL

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
USER = {"role": "user", "content": "Hello"}


def user(content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}]}


def assert_error(response: httpx.Response, status: int, param: str | None, code: str, says: str) -> None:
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"], error["code"]) == (param, code), error
    assert says in error["message"]


CALL = {"id": "c", "type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    ("path", "body", "param", "code", "says"),
    [
        (CHAT, {}, "messages", "missing_required_parameter", "required"),
        (CHAT, {"messages": []}, "messages", "invalid_value", "at least one"),
        (CHAT, {"messages": "Hi"}, "messages", "invalid_value", "list"),
        (CHAT, {"messages": [{"role": "usr", "content": ""}]}, "messages[0].role", "invalid_value", "'user'"),
        (CHAT, {"messages": [{"content": ""}]}, "messages[0].role", "missing_required_parameter", "required"),
        (CHAT, user(None), "messages[0].content", "missing_required_parameter", "required"),
        (CHAT, user([{"type": "text"}]), "messages[0].content[0].text", "missing_required_parameter", "required"),
        (CHAT, user([{"type": "image_url"}]), "messages[0].content[0]", "unsupported_value", "'text'"),
        (CHAT, user([{"text": "x"}]), "messages[0].content[0].type", "missing_required_parameter", "required"),
        (CHAT, user("\ud800"), "messages", "invalid_value", "valid Unicode"),
        (
            CHAT,
            {"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}]},
            "messages[1].tool_calls[0].function.arguments",
            "missing_required_parameter",
            "required",
        ),
        (
            CHAT,
            {"messages": [USER, {"role": "tool", "content": "4"}]},
            "messages[1].tool_call_id",
            "missing_required_parameter",
            "required",
        ),
        (CHAT, {**user("x"), "temperature": "hot"}, "temperature", "invalid_value", "number"),
        (CHAT, {**user("x"), "temperature": -1}, "temperature", "invalid_value", "between"),
        (CHAT, {**user("x"), "max_completion_tokens": 0}, "max_completion_tokens", "invalid_value", "1"),
        (CHAT, {**user("x"), "n": 0}, "n", "invalid_value", "greater"),
        (CHAT, {**user("x"), "n": 129}, "n", "invalid_value", "128"),
        (CHAT, {**user("x"), "stop": [""]}, "stop", "invalid_value", "empty"),
        (CHAT, {**user("x"), "stop": [1]}, "stop[0]", "invalid_value", "string"),
        (CHAT, {**user("x"), "top_logprobs": 2}, "top_logprobs", "unsupported_value", "logprobs"),
        (CHAT, {**user("x"), "logprobs": True, "top_logprobs": 99}, "top_logprobs", "invalid_value", "20"),
        (CHAT, {**user("x"), "logit_bias": {"9999999": 1}}, "logit_bias", "invalid_value", "vocabulary"),
        (CHAT, {**user("x"), "logit_bias": {"a": 1}}, "logit_bias.a", "invalid_value", "integer"),
        (CHAT, {**user("x"), "tools": [{"type": "function"}]}, "tools", "unsupported_value", "leave"),
        (CHAT, {**user("x"), "tool_choice": "required"}, "tool_choice", "unsupported_value", "leave"),
        (CHAT, {**user("x"), "functions": [{}]}, "functions", "unsupported_value", "leave"),
        (
            CHAT,
            {**user("x"), "response_format": {"type": "json_object"}},
            "response_format",
            "unsupported_value",
            "text",
        ),
        (CHAT, {**user("x"), "slipstream": {"reus": 1}}, "slipstream.reus", "unknown_parameter", "leave it out"),
        (CHAT, {**user("x"), "slipstream": {"reuse": "?"}}, "slipstream.reuse", "invalid_value", "boolean"),
        (CHAT, {**user("x"), "slipstream": {"session_id": "a b"}}, "slipstream.session_id", "invalid_value", "match"),
        (CHAT, user("word " * 9000), "messages", "context_length_exceeded", "shorter"),
        (CHAT, {**user("x"), "max_tokens": 10**6}, "messages", "context_length_exceeded", "fewer"),
        (COMPLETIONS, {"prompt": "word " * 9000}, "prompt", "context_length_exceeded", "shorter"),
        (COMPLETIONS, {"prompt": ""}, "prompt", "invalid_value", "empty"),
        (COMPLETIONS, {"prompt": []}, "prompt", "invalid_value", "list"),
        (COMPLETIONS, {"prompt": [1, "a"]}, "prompt", "invalid_value", "list"),
        (COMPLETIONS, {"prompt": [10**6]}, "prompt", "invalid_value", "vocabulary"),
        (COMPLETIONS, {"prompt": [10**12]}, "prompt", "invalid_value", "list"),
        (COMPLETIONS, {"prompt": ["a"] * 100, "n": 2}, "n", "invalid_value", "128"),
        (COMPLETIONS, {"prompt": "a", "logprobs": 99}, "logprobs", "invalid_value", "20"),
        (COMPLETIONS, {"prompt": "a", "echo": True}, "echo", "unsupported_value", "leave"),
        (COMPLETIONS, {"prompt": "a", "suffix": "b"}, "suffix", "unsupported_value", "leave"),
        (COMPLETIONS, {"prompt": "a", "best_of": 3}, "best_of", "unsupported_value", "n"),
        ("/tokenize", {}, "content", "invalid_value", "one of"),
        ("/tokenize", {"content": "a", "messages": []}, "messages", "invalid_value", "one of"),
        ("/detokenize", {"tokens": "a"}, "tokens", "invalid_value", "list"),
    ],
)
def test_bad_field(http: httpx.Client, path: str, body: Any, param: str, code: str, says: str) -> None:
    for stream in (False, True):
        content = json.dumps(body | {"stream": stream})  # httpx's own way can't send a lone surrogate
        response = http.post(path, content=content, headers={"Content-Type": "application/json"})
        assert_error(response, 400, param, code, says)


@pytest.mark.parametrize(
    ("content", "content_type", "code", "says"),
    [
        (b'{"messages": [', "application/json", "invalid_json", "character 14"),
        (b"", "application/json", "invalid_body", "JSON object"),
        (b"[]", "application/json", "invalid_body", "JSON object"),
        (b"{}", "text/plain", "invalid_body", "Content-Type"),
        (b'{"messages": "\xff"}', "application/json", "bad_request", "UTF-8"),
        (b'{"messages": ' + b"[" * 100_000, "application/json", "bad_request", "nested"),
    ],
)
def test_bad_body(http: httpx.Client, content: bytes, content_type: str, code: str, says: str) -> None:
    response = http.post(CHAT, content=content, headers={"Content-Type": content_type})
    assert_error(response, 400, None, code, says)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_unknown_model(http: httpx.Client, path: str) -> None:
    body = {"model": "gpt-9", "messages": [USER], "prompt": "Hello"}
    assert_error(http.post(path, json=body), 404, "model", "model_not_found", MODEL)


def test_model_may_be_left_out(http: httpx.Client) -> None:
    assert http.post(CHAT, json={"messages": [USER], "max_tokens": 1}).json()["model"] == MODEL


def test_unknown_path_and_method(http: httpx.Client) -> None:
    assert_error(http.get("/v2/nothing"), 404, None, "not_found", CHAT)
    response = http.get(CHAT)
    assert_error(response, 405, None, "method_not_allowed", "POST")
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize("declared", [True, False], ids=["declared", "chunked"])
def test_too_large_a_body(http: httpx.Client, declared: bool) -> None:
    body = b'{"messages": "' + b"x" * (16 * 2**20) + b'"}'
    content = body if declared else iter([body])
    response = http.post(CHAT, content=content, headers={"Content-Type": "application/json"})
    assert_error(response, 413, None, "request_entity_too_large", "16 MiB")


def test_official_client_raises_its_own_errors(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="not served"):
        client.chat.completions.create(model="gpt-9", messages=[])
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=[], stream=True)
    assert (caught.value.param, caught.value.code) == ("messages", "invalid_value")
