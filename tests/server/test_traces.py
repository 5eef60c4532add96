"""A turn is a span of OpenTelemetry, with spans for its parts, and never what was said."""

import asyncio
from typing import Any

import httpx
import pytest

from slipstream import Engine
from slipstream.config import EngineConfig, ServerConfig
from slipstream.models import Model
from slipstream.server import app
from slipstream.server.keys import KeyRing
from tests.server.process import MODEL
from tests.short_model import room_for

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
