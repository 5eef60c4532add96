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
NAMED = {"type": "function", "function": {"name": "f"}}


def function(name: str = "f", **definition: Any) -> dict[str, Any]:
    """A tool."""
    return {"type": "function", "function": {"name": name, **definition}}


def custom(name: str = "f", **definition: Any) -> dict[str, Any]:
    """A tool whose input is text."""
    return {"type": "custom", "custom": {"name": name, **definition}}


def with_parameter(schema: dict[str, Any]) -> dict[str, Any]:
    """A request with a strict tool whose one parameter has this schema."""
    parameters = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    tools = [function("fine"), function(parameters=parameters, strict=True)]
    return {**user("x"), "max_tokens": 8, "tools": tools}


def nested(depth: int) -> dict[str, Any]:
    """A schema of objects in objects."""
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def chained(length: int) -> dict[str, Any]:
    """A schema that refers to one that refers to one, and so on."""
    links = {f"d{at}": {"$ref": f"#/$defs/d{at + 1}"} for at in range(length)}
    return {"$ref": "#/$defs/d0", "$defs": {**links, f"d{length}": {"type": "integer"}}}


def with_answer(schema: object) -> dict[str, Any]:
    """A request for an answer that fits this schema."""
    return {
        **user("x"),
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": True}},
    }


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
        (CHAT, user("\ud800"), "messages[0].content", "invalid_value", "valid Unicode"),
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
        (CHAT, {**user("x"), "n": 129}, "n", "limit_exceeded", "128"),
        (CHAT, {**user("x"), "stop": [""]}, "stop", "invalid_value", "empty"),
        (CHAT, {**user("x"), "stop": [1]}, "stop[0]", "invalid_value", "string"),
        (CHAT, {**user("x"), "top_logprobs": 2}, "top_logprobs", "unsupported_value", "logprobs"),
        (CHAT, {**user("x"), "logprobs": True, "top_logprobs": 99}, "top_logprobs", "invalid_value", "20"),
        (CHAT, {**user("x"), "logit_bias": {"9999999": 1}}, "logit_bias", "invalid_value", "vocabulary"),
        (CHAT, {**user("x"), "logit_bias": {"a": 1}}, "logit_bias.a", "invalid_value", "integer"),
        (CHAT, {**user("x"), "functions": [{"name": "f"}]}, "functions", "unsupported_value", "send tools"),
        (CHAT, {**user("x"), "function_call": {"name": "f"}}, "function_call", "unsupported_value", "tool_choice"),
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
        (COMPLETIONS, {"prompt": ["a"] * 100, "n": 2}, "n", "limit_exceeded", "128"),
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


GRAMMAR = {"type": "grammar"}
PARAMETERS = "tools[1].function.parameters"
LONG = [f"{number:099}" for number in range(6000)]
NO_SCHEMA = {"type": "json_schema", "json_schema": {"name": "a"}}


@pytest.mark.parametrize(
    ("body", "param", "code", "says"),
    [
        ({"tools": [{"type": "function"}]}, "tools[0].function", "missing_required_parameter", "required"),
        ({"tools": [{"type": "custom"}]}, "tools[0].custom", "missing_required_parameter", "required"),
        ({"tools": [custom(format={"type": "xml"})]}, "tools[0].custom.format.type", "invalid_value", "'grammar'"),
        ({"tools": [custom(format=GRAMMAR)]}, "tools[0].custom.format.grammar", "missing_required_parameter", "is"),
        (
            {"tools": [custom(format={**GRAMMAR, "grammar": {"syntax": "bnf", "definition": ""}})]},
            "tools[0].custom.format.grammar.syntax",
            "invalid_value",
            "'lark' or 'regex'",
        ),
        (
            {"tools": [custom(format={**GRAMMAR, "grammar": {"syntax": "regex", "definition": "("}})]},
            "tools[0].custom.format.grammar.definition",
            "invalid_value",
            "no regex grammar",
        ),
        (
            {"tools": [custom(format={**GRAMMAR, "grammar": {"syntax": "lark", "definition": "x" * 600_000}})]},
            "tools[0].custom.format",
            "schema_too_large",
            "--max-schema",
        ),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "invalid_value", "'function' or 'custom'"),
        ({"tools": [function(), function("")]}, "tools[1].function.name", "invalid_value", "at least 1"),
        ({"tools": [function('a"b')]}, "tools[0].function.name", "invalid_value", "match"),
        ({"tools": [function("f"), function("f")]}, "tools[1].function.name", "invalid_value", "rename"),
        ({"tools": [function(parameters="{}")]}, "tools[0].function.parameters", "invalid_value", "dictionary"),
        ({"tool_choice": "required"}, "tool_choice", "unsupported_value", "no tools"),
        ({"tools": [], "tool_choice": NAMED}, "tool_choice", "unsupported_value", "no tools"),
        ({"tools": [function("g")], "tool_choice": NAMED}, "tool_choice", "invalid_value", "tools has g"),
        (
            {
                "tools": [function("g")],
                "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [NAMED]}},
            },
            "tool_choice",
            "invalid_value",
            "tools has g",
        ),
        ({"response_format": {"type": "xml"}}, "response_format.type", "invalid_value", "'json_schema'"),
        (
            {"response_format": {"type": "json_schema"}},
            "response_format.json_schema.schema",
            "missing_required_parameter",
            "required",
        ),
        (
            {"response_format": NO_SCHEMA},
            "response_format.json_schema.schema",
            "missing_required_parameter",
            "required",
        ),
        (with_parameter({"type": "array", "uniqueItems": True}), PARAMETERS, "unsupported_schema", "'uniqueItems'"),
        (with_parameter({"type": "text"}), PARAMETERS, "unsupported_schema", "'type'"),
        (with_parameter({"$ref": "#/$defs/Missing"}), PARAMETERS, "unsupported_schema", "'$ref'"),
        (with_parameter({"$ref": "https://example.org/s"}), PARAMETERS, "unsupported_schema", "'$ref'"),
        (with_parameter({"type": "string", "pattern": "("}), PARAMETERS, "unsupported_schema", "'pattern'"),
        (with_parameter({"type": "string", "pattern": r"(a)\1"}), PARAMETERS, "unsupported_schema", "'pattern'"),
        (with_parameter({"enum": []}), PARAMETERS, "unsupported_schema", "nothing fits"),
        (with_parameter({"enum": LONG}), PARAMETERS, "schema_too_large", "--max-schema"),
        (with_answer(chained(9999)), "response_format.json_schema.schema", "unsupported_schema", "'$ref'"),
        (with_answer({"not": {}}), "response_format.json_schema.schema", "unsupported_schema", "nothing fits"),
        (with_answer("object"), "response_format.json_schema.schema", "invalid_value", "dictionary"),
        (with_answer({"enum": LONG}), "response_format.json_schema.schema", "schema_too_large", "--max-schema"),
    ],
)
def test_bad_tools(http: httpx.Client, body: dict[str, Any], param: str, code: str, says: str) -> None:
    for stream in (False, True):
        response = http.post(CHAT, json={**user("x"), **body, "stream": stream})
        assert_error(response, 400, param, code, says)


@pytest.mark.parametrize(
    "choice",
    [
        *("sometimes", 3, {"type": "custom"}, {"type": "function"}, {"type": "allowed_tools"}),
        *({"type": "custom", "custom": {}}, {"type": "custom", "custom": {"name": "nobody"}}),
        {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [{"type": "custom"}]}},
    ],
)
def test_bad_tool_choice(http: httpx.Client, choice: object) -> None:
    response = http.post(CHAT, json={**user("x"), "tools": [function()], "tool_choice": choice})
    assert response.status_code == 400
    assert response.json()["error"]["param"].partition(".")[0] == "tool_choice"
    assert "literal" not in response.text


def test_pattern_that_cannot_be_enforced_says_why(http: httpx.Client) -> None:
    response = http.post(CHAT, json=with_parameter({"type": "string", "pattern": r"\bword\b"}))
    assert_error(response, 400, PARAMETERS, "unsupported_schema", "the tool 'f' has 'pattern'")


def test_too_deep_a_schema(http: httpx.Client) -> None:
    answer = "response_format.json_schema.schema"
    for body, param in ((with_parameter(nested(400)), PARAMETERS), (with_answer(nested(400)), answer)):
        response = http.post(CHAT, json=body)
        assert_error(response, 400, param, "schema_too_complex", "has a schema that is nested too deeply")


def test_tools_that_are_not_called_need_no_grammar(http: httpx.Client) -> None:
    body = with_parameter({"type": "text"})
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [function("fine")]}}
    for choice in ("none", allowed, function("fine")):
        assert http.post(CHAT, json={**body, "tool_choice": choice}).status_code == 200


@pytest.mark.parametrize(
    "pattern",
    [
        pytest.param("^[ab]((a{50,60}){50,60}){50,60}$", id="while it is forced"),
        pytest.param("^(((a{1,99}){1,99}){1,99}){1,99}$", id="while it is sampled"),
    ],
)
def test_grammar_too_complex_to_follow(http: httpx.Client, pattern: str) -> None:
    body = complex_call(http, pattern)
    response = http.post(CHAT, json=body)
    assert_error(response, 400, "tools", "schema_too_complex", "simplify")
    assert "<grammar>" not in response.text
    events = http.post(CHAT, json=body | {"stream": True}).text.split("\n\n")
    assert '"code": "schema_too_complex"' in events[-2]
    assert http.get("/health").status_code == 200


def test_grammar_too_complex_from_the_start(http: httpx.Client) -> None:
    body = complex_call(http, "^((a{50,60}){50,60}){50,60}$")
    for stream in (False, True):
        response = http.post(CHAT, json=body | {"stream": stream})
        assert_error(response, 400, PARAMETERS, "schema_too_complex", "simplify")


@pytest.mark.parametrize("first", ["", "[ab]"], ids=["from the start", "while it is followed"])
def test_answer_too_complex_to_follow(http: httpx.Client, first: str) -> None:
    endless = {"type": "string", "pattern": f"^{first}((a{{50,60}}){{50,60}}){{50,60}}$"}
    response = http.post(CHAT, json={**with_answer(endless), "max_tokens": 200})
    assert_error(response, 400, "response_format.json_schema.schema", "schema_too_complex", "simplify")


def test_grammar_that_was_too_complex_for_one_answer_is_good_for_others(http: httpx.Client) -> None:
    body = complex_call(http, "^(((a{1,100}){1,100}){1,100}){1,100}$")
    harmless = {key: value for key, value in body.items() if key != "logit_bias"} | {"temperature": 0}
    before = http.post(CHAT, json=harmless)
    assert http.post(CHAT, json=body).status_code == 400
    after = http.post(CHAT, json=harmless)
    assert (before.status_code, after.status_code) == (200, 200)


def complex_call(http: httpx.Client, pattern: str) -> dict[str, Any]:
    """A request whose answer is to go on and on along the pattern."""
    (likely,) = http.post("/tokenize", json={"content": "aaaa"}).json()["tokens"]
    body = with_parameter({"type": "string", "pattern": pattern})
    return body | {"tool_choice": function("f"), "max_tokens": 200, "logit_bias": {likely: 100}}


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
    body = b'{"messages": "' + b"x" * (8 * 2**20) + b'"}'
    content = body if declared else iter([body])
    response = http.post(CHAT, content=content, headers={"Content-Type": "application/json"})
    assert_error(response, 413, None, "request_entity_too_large", "8.0MiB")


def test_official_client_raises_its_own_errors(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="not served"):
        client.chat.completions.create(model="gpt-9", messages=[])
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=[], stream=True)
    assert (caught.value.param, caught.value.code) == ("messages", "invalid_value")
