"""A turn is a span of OpenTelemetry, with spans for its parts, and never what was said."""

import asyncio
from http.server import BaseHTTPRequestHandler
from typing import Any

import httpx
import pytest

from slipstream import Engine
from slipstream.config import EngineConfig, ServerConfig
from slipstream.models import Model
from slipstream.server import app
from slipstream.server.keys import KeyRing
from tests.server.process import MODEL, running_server
from tests.short_model import room_for
from tests.unit.local_server import LocalServer, serving
from tests.waiting import wait_until

sdk = pytest.importorskip("opentelemetry.sdk.trace", reason="needs the extra otel")
export = pytest.importorskip("opentelemetry.sdk.trace.export")
in_memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")

SECRET = "Marmalade is hidden under the third stair"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def test_spans_of_turns(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    exporter, provider = in_memory.InMemorySpanExporter(), sdk.TracerProvider()
    provider.add_span_processor(export.SimpleSpanProcessor(exporter))
    monkeypatch.setattr(app, "otlp_provider", lambda: provider)
    chat = {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 4, "temperature": 0.5, "seed": 3}
    named = {"X-Session-Id": "stair", "traceparent": f"00-{TRACE}-{PARENT}-01"}

    async def use(engine: Engine) -> tuple[dict[str, Any], dict[str, Any]]:
        transport = httpx.ASGITransport(app.create_app(engine, ServerConfig(traces=True), KeyRing()))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            said = (await http.post("/v1/chat/completions", json=chat, headers=named)).raise_for_status().json()
            plain = {"prompt": SECRET, "max_tokens": 3, "n": 2, "ignore_eos": True}
            return said, (await http.post("/v1/completions", json=plain)).raise_for_status().json()

    with Engine(model, EngineConfig.model_validate({"kv_memory": room_for(2000)})) as engine:
        said, plain = asyncio.run(use(engine))
    spans = exporter.get_finished_spans()
    first, second = (span for span in spans if span.kind.name == "SERVER")
    assert (first.name, second.name) == (f"chat {MODEL}", f"text_completion {MODEL}")
    assert (f"{first.context.trace_id:032x}", f"{first.parent.span_id:016x}") == (TRACE, PARENT)
    assert second.parent is None
    report, told = said["slipstream"], first.attributes
    assert told["gen_ai.operation.name"] == "chat"
    assert told["gen_ai.request.model"] == MODEL
    assert told["gen_ai.conversation.id"] == "stair"
    assert told["gen_ai.usage.input_tokens"] == report["prompt_tokens"]
    assert told["gen_ai.usage.output_tokens"] == report["completion_tokens"]
    assert told["gen_ai.usage.cache_read.input_tokens"] == report["reused_tokens"]
    assert told["gen_ai.response.finish_reasons"] == (said["choices"][0]["finish_reason"],)
    assert (told["gen_ai.request.temperature"], told["gen_ai.request.seed"]) == (0.5, 3)
    assert told["gen_ai.request.max_tokens"] == 4
    assert told["slipstream.delta_tokens"] == report["delta_tokens"]
    assert second.attributes["gen_ai.request.choice.count"] == len(plain["choices"]) == 2
    parts = [span for span in spans if span.parent is not None and span.parent.span_id == first.context.span_id]
    assert [span.name for span in sorted(parts, key=lambda span: span.start_time)] == [
        "prepare", "queue", "prefill", "decode",
    ]  # fmt: skip
    assert all(first.start_time <= span.start_time <= span.end_time for span in parts)
    everything = "".join(span.to_json() for span in spans)
    assert SECRET not in everything
    assert said["choices"][0]["message"]["content"] not in everything


class Collector(LocalServer):
    """Takes what exporters send, by OTLP over HTTP."""

    def __init__(self) -> None:
        super().__init__(_Collecting)
        self.received: list[tuple[str, str | None, bytes]] = []
        """Path, content type and body of each request."""


class _Collecting(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.received.append((self.path, self.headers["Content-Type"], body))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None: ...


def test_spans_reach_a_collector(model: Model) -> None:
    """By the standard variables; what is still waiting when the server ends is sent then."""
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="needs the extra otel")
    sent = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
    chat = {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 4}
    with serving(Collector()) as collector:
        variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "50"}
        with running_server("--traces", environment=variables) as server, server.http() as http:
            http.post("/v1/chat/completions", json=chat).raise_for_status()
            wait_until(lambda: bool(collector.received))
            http.post("/v1/chat/completions", json=chat).raise_for_status()
    assert {each[:2] for each in collector.received} == {("/v1/traces", "application/x-protobuf")}
    resources = [
        resource
        for *_, body in collector.received
        for resource in sent.ExportTraceServiceRequest.FromString(body).resource_spans
    ]
    names = [each.value.string_value for r in resources for each in r.resource.attributes if each.key == "service.name"]
    assert set(names) == {"slipstream"}
    spans = [span for resource in resources for scope in resource.scope_spans for span in scope.spans]
    assert [span.name for span in spans if not span.parent_span_id] == [f"chat {MODEL}"] * 2
    assert {span.name for span in spans if span.parent_span_id} >= {"prefill", "decode"}
    assert not [body for *_, body in collector.received if SECRET.encode() in body]
