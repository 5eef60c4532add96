"""A server that answers OpenAI's chat completions at once, with the shortest call that its schema allows."""

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.unit.local_server import LocalServer, serving


class StandIn(LocalServer):
    """What it was asked is in `requests`; requests after the first `fails_after` get an error."""

    def __init__(self, fails_after: int | None = None) -> None:
        super().__init__(_Handler)
        self.requests: list[dict[str, Any]] = []
        self.fails_after = fails_after

    @property
    def url(self) -> str:
        return f"{super().url}/v1"


def stand_in(fails_after: int | None = None) -> AbstractContextManager[StandIn]:
    return serving(StandIn(fails_after))


class _Handler(BaseHTTPRequestHandler):
    server: StandIn

    def do_GET(self) -> None:
        self._send(b'{"data": [{"id": "the-model"}]}', "application/json")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body)
        if self.server.fails_after is not None and len(self.server.requests) > self.server.fails_after:
            self.send_error(500, "out of luck")
            return
        prompt = len(json.dumps(body["messages"]))
        usage = {
            "prompt_tokens": prompt,
            "completion_tokens": 7,
            "prompt_tokens_details": {"cached_tokens": prompt - 9},
        }
        chunks = [*_deltas(body), {"choices": [], "usage": usage}]
        events = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
        self._send(events.encode(), "text/event-stream")

    def _send(self, content: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def _deltas(body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if "tools" in body:
        name = body["tool_choice"]["function"]["name"]
        (parameters,) = (t["function"]["parameters"] for t in body["tools"] if t["function"]["name"] == name)
        pieces = [
            {"tool_calls": [{"index": 0, "id": "call_1", "function": {"name": name, "arguments": ""}}]},
            {"tool_calls": [{"index": 0, "function": {"arguments": json.dumps(_instance(parameters))}}]},
        ]
    else:
        text = json.dumps(_instance(body["response_format"]["json_schema"]["schema"]))
        pieces = [{"role": "assistant", "content": ""}, {"content": text[:5]}, {"content": text[5:]}]
    yield from ({"choices": [{"index": 0, "delta": piece}]} for piece in pieces)


def _instance(schema: dict[str, Any]) -> Any:
    if "enum" in schema:
        return schema["enum"][0]
    match schema["type"]:
        case "object":
            return {name: _instance(value) for name, value in schema["properties"].items()}
        case "integer":
            return schema["minimum"]
        case "boolean":
            return True
        case _:
            return "x"
