"""Requests that no client would send, over all endpoints: `python -m tests.fuzz URL COUNT [SEED]`.

Bodies begin as good ones and are spoilt: other types, depths, sizes, encodings, halves of surrogate pairs, NaN, text
that spells control tokens, schemas. The answer may be anything but a server's error, a broken connection or none.
"""

import copy
import json
import random
import sys
from collections import Counter
from dataclasses import dataclass
from typing import Any

import httpx

from tests.waiting import HANG

TEXTS = (
    *(
        "",
        " ",
        "Hello",
        "\0",
        "a" * 300,
        "\n" * 50,
        "\N{WATER WAVE}\N{HEBREW LETTER ALEF}",
        "\ud83c",
        "\udf0a",
        "%s{0}",
    ),
    *("<|im_start|>", "<|im_end|>\n<|im_start|>system\n", "<tool_call>", "<|endoftext|>", "</think>", "{{ messages }}"),
    *(
        "../../etc/passwd",
        "'; DROP TABLE sessions; --",
        "null",
        "NaN",
        "-1",
        "[" * 50,
        '{"a": 1}',
        "\\u0000",
        "\x7f\x85",
    ),
)
NUMBERS = (0, -1, 1, 2, 3.5, 1e308, -1e-300, 2**31, 2**63, -(2**63), 2**64, 10**30, 1e400, float("nan"), float("inf"))
KINDS = ("string", "integer", "number", "boolean", "null", "array", "object", "text", 3, None, ["string", "null"])
PATTERNS = (
    "^a+$",
    "(",
    "a{1000}",
    "^((a{1,99}){1,99}){1,99}$",
    "[^\\s]*",
    "(?=b)",
    "\\p{L}",
    ".*.*.*x",
    "^$",
    "\\d{3}",
)
USER = {"role": "user", "content": "Hello"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {}}}}}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
SAMPLING = {"temperature": 1, "top_p": 0.9, "top_k": 5, "seed": 3, "stop": ["x"], "logit_bias": {"5": 1}, "n": 1}
TALK = [
    {"role": "system", "content": "Be brief."},
    USER,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c", "content": "1"},
    {"role": "user", "content": [{"type": "text", "text": "And?"}]},
]
ANSWER = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
GOOD: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        **SAMPLING, "messages": TALK, "tools": [TOOL], "tool_choice": "auto", "response_format": ANSWER,
        "logprobs": True, "top_logprobs": 2, "chat_template_kwargs": {"a": 1}, "slipstream": {"session_id": "s"},
        "stream": False, "stream_options": {"include_usage": True}, "parallel_tool_calls": False,
        "reasoning_effort": "low",
    },
    "/v1/completions": {**SAMPLING, "prompt": ["Hello", [1, 2, 3]], "logprobs": 2, "echo": False, "best_of": 1},
    "/v1/responses": {
        "input": [USER, {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                  {"type": "function_call_output", "call_id": "c", "output": "1"}],
        "instructions": "Be brief.", "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}}],
        "text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "object"}}}, "store": True,
        "metadata": {"a": "b"}, "previous_response_id": None, "conversation": None, "reasoning": {"effort": "low"},
    },
    "/v1/messages": {
        "messages": [USER,
                     {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "f", "input": {}}]},
                     {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "1"}]}],
        "system": [{"type": "text", "text": "Be brief."}], "tools": [{"name": "f", "input_schema": {"type": "object"}}],
        "tool_choice": {"type": "auto"}, "stop_sequences": ["x"], "thinking": {"type": "disabled"}, "top_k": 5,
    },
    "/v1/messages/count_tokens": {"messages": [USER], "system": "Be brief."},
    "/v1/responses/input_tokens": {"input": [USER]},
    "/v1/sessions": {"id": "s", "messages": [USER], "tools": [TOOL], "pinned": False, "ttl_seconds": 60},
    "/v1/sessions/s/messages": {"messages": [USER]},
    "/v1/sessions/s/fork": {"id": "t", "keep": 1},
    "/v1/sessions/s/rollback": {"keep": 0},
    "/v1/conversations": {"items": [USER]},
    "/tokenize": {"messages": TALK, "tools": [TOOL]},
    "/detokenize": {"tokens": [1, 2, 3]},
}  # fmt: skip
OTHERS = (
    *(
        ("GET", path)
        for path in ("/health", "/v1/models", "/metrics", "/v1/sessions", "/v1/sessions/s", "/openapi.json")
    ),
    *(("GET", path) for path in ("/v1/sessions?limit=x", "/v1/responses/r", "/v1/responses/r/input_items?limit=-1")),
    *(("DELETE", path) for path in ("/v1/sessions/s", "/v1/sessions/t", "/v1/responses/r", "/v1/conversations/s")),
    *(("POST", path) for path in ("/v1/sessions/s/save", "/v1/sessions/s/load", "/v1/models", "/v1/%00/x")),
    *(("PATCH", "/v1/sessions/s"), ("PUT", "/v1/chat/completions"), ("GET", "/v1/models/%F0%9F"), ("HEAD", "/health")),
)
LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")


@dataclass
class Request:
    """One that was made up."""

    method: str
    path: str
    content: bytes
    headers: dict[str, str]


class Fuzzer:
    """Makes up requests; the same ones for the same seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def request(self) -> Request:
        """The next one."""
        pick = self._random
        if pick.random() < 0.1:
            method, path = pick.choice(OTHERS)
            content = json.dumps(self.value(2)).encode() if method in ("POST", "PATCH", "PUT") else b""
            return Request(method, path, content, {"Content-Type": "application/json"})
        path = pick.choice(list(GOOD))
        body: Any = copy.deepcopy(GOOD[path])
        for name in list(body):
            if name not in ("messages", "input", "prompt", "tokens") and pick.random() < 0.5:
                del body[name]
        for _ in range(pick.choice((0, 1, 1, 1, 2, 4))):
            self._spoil(body)
        if pick.random() < 0.25:
            self._put_schema(body)
        if path in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"):
            body.update({name: 3 for name in LIMITS if name in body or pick.random() < 0.9} | {"max_tokens": 3})
            body["max_output_tokens"] = 3
            if pick.random() < 0.3:
                body["stream"] = True
        if isinstance(body.get("n"), int):
            body["n"] = min(body["n"], 2)
        return Request("POST", path, self._encoded(body), self._headers())

    def value(self, depth: int) -> Any:
        """Any JSON, and what is none."""
        pick = self._random
        kind = pick.randrange(8 if depth else 5)
        if kind < 2:
            return pick.choice(TEXTS)
        if kind == 2:
            return pick.choice(NUMBERS)
        if kind < 5:
            return pick.choice((None, True, False, [], {}, ""))
        if kind == 5:
            return {pick.choice(TEXTS): self.value(depth - 1) for _ in range(pick.randrange(4))}
        return [self.value(depth - 1) for _ in range(pick.choice((1, 2, 3, 40)))]

    def schema(self, depth: int) -> Any:
        """Any JSON Schema, or what looks like one."""
        pick = self._random

        def part() -> Any:
            return self.schema(depth - 1) if depth else pick.choice(({}, True, {"type": "null"}))

        made: dict[str, Any] = {}
        for _ in range(pick.choice((0, 1, 2, 3))):
            made |= pick.choice((
                lambda: {"type": pick.choice(KINDS)},
                lambda: {"const": self.value(1)},
                lambda: {"enum": [self.value(1) for _ in range(pick.choice((0, 1, 3, 200)))]},
                lambda: {"pattern": pick.choice(PATTERNS), "type": "string"},
                lambda: {pick.choice(("minimum", "maximum", "multipleOf", "minLength", "maxItems", "minItems")):
                         pick.choice(NUMBERS)},
                lambda: {"type": "object", "properties": {pick.choice(TEXTS): part() for _ in range(3)}},
                lambda: {"type": "array", "items": part(), "uniqueItems": True},
                lambda: {pick.choice(("anyOf", "oneOf", "allOf")): [part(), part()]},
                lambda: {"$ref": pick.choice(("#", "#/$defs/a", "#/$defs/b", "x", "#/properties/a", 3))},
                lambda: {"$defs": {"a": {"$ref": "#/$defs/a"}, "b": part()}},
                lambda: {"required": self.value(2), "additionalProperties": part(), "format": pick.choice(TEXTS)},
                lambda: {"patternProperties": {pick.choice(PATTERNS): part()}, "propertyNames": part()},
                lambda: self._deep(pick.choice((50, 300))),
            ))()  # fmt: skip
        return made

    def _deep(self, depth: int) -> dict[str, Any]:
        schema: dict[str, Any] = {"type": "string"}
        for _ in range(depth):
            schema = {"type": "array", "items": schema}
        return schema

    def _put_schema(self, body: dict[str, Any]) -> None:
        schema = self.schema(3)
        if isinstance(tools := body.get("tools"), list) and tools and isinstance(tools[0], dict):
            tool = tools[0]
            place = tool["function"] if isinstance(tool.get("function"), dict) else tool
            place["input_schema" if "input_schema" in tool else "parameters"] = schema
            body["tool_choice"] = "required" if "function" in tool else {"type": "any"}
        elif "text" in body:
            body["text"] = {"format": {"type": "json_schema", "name": "a", "schema": schema}}
        else:
            body["response_format"] = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}

    def _spoil(self, body: dict[str, Any]) -> None:
        """Replace, remove, double or deepen something somewhere."""
        pick = self._random
        at: Any = body
        while True:
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            if not keys:
                return
            key = pick.choice(keys)
            if not isinstance(at[key], dict | list) or not at[key] or pick.random() < 0.3:
                break
            at = at[key]
        match pick.randrange(5):
            case 0:
                del at[key]
            case 1 if isinstance(at, list):
                at.extend(copy.deepcopy(at[key]) for _ in range(pick.choice((1, 30, 600))))
            case 2:
                at[key] = [at[key]]
            case _:
                at[key] = self.value(3)

    def _encoded(self, body: Any) -> bytes:
        pick = self._random
        content = json.dumps(body, ensure_ascii=pick.random() < 0.7).encode("utf-8", "surrogatepass")
        if pick.random() < 0.85:
            return content
        return pick.choice((
            content[: pick.randrange(len(content))],
            content.replace(b"e", b"\xff", 1),
            content.decode("utf-8", "replace").encode("utf-16"),
            b'{"messages": ' + b"[" * 10_000,
            content + content,
            bytes(pick.randrange(256) for _ in range(pick.randrange(200))),
        ))  # fmt: skip

    def _headers(self) -> dict[str, str]:
        pick = self._random
        headers = {"Content-Type": "application/json"}
        if pick.random() < 0.03:
            headers["Content-Type"] = pick.choice(("text/plain", "", "application/json; charset=utf-16", "x" * 200))
        if pick.random() < 0.1:
            headers["X-Session-Id"] = pick.choice(("s", "t", "a b", "x" * 300, "\\", "../x"))
        if pick.random() < 0.02:
            headers["Content-Encoding"] = "gzip"
        return headers


def fault(http: httpx.Client, request: Request) -> tuple[int, str | None]:
    """The status of the answer to a request, and what is wrong with it, if anything is."""
    try:
        response = http.request(request.method, request.path, content=request.content, headers=request.headers)
    except httpx.HTTPError as error:
        return 0, repr(error)
    if response.status_code >= 500 or '"internal_error"' in response.text:
        return response.status_code, response.text[-400:]
    if response.headers.get("content-type") == "application/json" and request.method != "HEAD":
        response.json()
    return response.status_code, None


def run(http: httpx.Client, count: int, seed: int) -> Counter[int]:
    """Send so many requests; the statuses of the answers. Raises `AssertionError` with the request at fault."""
    fuzzer, statuses = Fuzzer(seed), Counter[int]()
    for number in range(count):
        request = fuzzer.request()
        status, wrong = fault(http, request)
        statuses[status] += 1
        assert wrong is None, (number, request, wrong)
        if number % 20 == 0:
            assert http.get("/health").status_code == 200, (number, request)
    return statuses


if __name__ == "__main__":
    url, count, *seed = sys.argv[1:]
    with httpx.Client(base_url=url, timeout=HANG) as client:
        print(run(client, int(count), int(seed[0]) if seed else 0))
