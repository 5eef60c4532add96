"""OpenTelemetry: a span for each turn, by the semantic conventions for generative AI, and spans for its parts.

Needs the extra `otel`. Spans have what the log's line of a turn has, and never what was said.
See https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/.
"""

import os
import time
from importlib.metadata import version
from itertools import pairwise
from typing import TYPE_CHECKING

from slipstream.errors import SlipstreamError
from slipstream.server.turn import LiveTurn
from slipstream.server.turn_log import facts_of

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider
    from opentelemetry.util.types import AttributeValue

_PARAMS = ("max_tokens", "temperature", "top_p", "top_k", "seed", "frequency_penalty", "presence_penalty")
_PARTS = ("prepare", "queue", "prefill", "decode")


def otlp_provider() -> "TracerProvider":
    """Spans go where the standard variables OTEL_EXPORTER_OTLP_… say, by OTLP over HTTP, beside everything else.

    Raises `SlipstreamError` if the extra is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise SlipstreamError("--traces needs more packages: pip install 'slipstream[otel]'") from error
    os.environ.setdefault("OTEL_SERVICE_NAME", "slipstream")
    provider = TracerProvider(resource=Resource.create())
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


class Traces:
    """Makes spans of turns that are over."""

    def __init__(self, provider: "TracerProvider", model: str) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._tracer = provider.get_tracer("slipstream", version("slipstream"))
        self._propagator = TraceContextTextMapPropagator()
        self._model = model

    def record(self, turn: LiveTurn) -> None:
        """Make the spans of a turn, which go on from the client's own if its request had a `traceparent`."""
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        first = turn.choices[0]
        end = time.time_ns()
        start = end - _nanoseconds(turn.seconds)
        operation = "chat" if first.session_turn is not None else "text_completion"
        span = self._tracer.start_span(
            f"{operation} {self._model}",
            context=self._propagator.extract(turn.headers),
            kind=SpanKind.SERVER,
            attributes=self._attributes(turn, operation),
            start_time=start,
        )
        if errors := [choice.outputs[-1].error for choice in turn.choices if choice.outputs[-1].error is not None]:
            span.set_attribute("error.type", type(errors[0]).__name__)
            span.set_status(Status(StatusCode.ERROR))
        # The first choice's parts, counted back and on from its first token.
        answered = start + _nanoseconds(turn.first_token_seconds)
        counters, inside = first.counters, set_span_in_context(span)
        prefill = answered - _nanoseconds(counters.prefill_ms / 1e3)
        queue = prefill - _nanoseconds(counters.queue_ms / 1e3)
        decoded = answered + _nanoseconds(counters.decode_ms / 1e3)
        for name, (begun, over) in zip(_PARTS, pairwise((start, queue, prefill, answered, decoded)), strict=True):
            if over > begun:
                self._tracer.start_span(name, context=inside, start_time=begun).end(over)
        span.end(end)

    def _attributes(self, turn: LiveTurn, operation: str) -> "dict[str, AttributeValue]":
        request, facts = turn.choices[0].request, facts_of(turn)
        params = {f"gen_ai.request.{name}": getattr(request.params, name) for name in _PARAMS}
        count = len(turn.choices)
        named = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "slipstream",
            "gen_ai.request.model": self._model,
            "gen_ai.response.model": self._model,
            "gen_ai.request.choice.count": count if count > 1 else None,
            "gen_ai.conversation.id": facts["session_id"],
            "gen_ai.response.finish_reasons": [str(choice.outputs[-1].finish_reason) for choice in turn.choices],
            "gen_ai.usage.input_tokens": facts["prompt_tokens"],
            "gen_ai.usage.output_tokens": facts["completion_tokens"],
            "gen_ai.usage.cache_read.input_tokens": facts["reused_tokens"],
        }
        own = {f"slipstream.{name}": value for name, value in facts.items()}
        return {name: value for name, value in (params | named | own).items() if value not in (None, "")}


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
