"""What Prometheus is told: the engine's own totals, read when asked, and what turns and requests add up to."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import partial
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from slipstream.engine import FinishReason, TurnCounters
from slipstream.runtime import Runtime
from slipstream.server.vllm_names import VLLMNames
from slipstream.sessions.breaks import Kind

_COUNTS = (1, 10, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000)
_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)

# By their names in `TurnCounters`.
_TOTALS = {
    "prompt_tokens": "Prompt tokens.",
    "reused_tokens": "Prompt tokens whose KV was there already.",
    "delta_tokens": "Prompt tokens whose KV had to be computed.",
    "completion_tokens": "Generated tokens.",
    "forced_tokens": "Generated tokens that the grammar left no choice about.",
    "drafted_tokens": "Tokens proposed by prompt lookup.",
    "accepted_tokens": "Proposed tokens that were right.",
    "forward_passes": "Forward passes that choices took part in.",
}
_TIMES = {
    "queue": "Time that a choice waited to be computed.",
    "prefill": "Time to compute a prompt's delta.",
    "decode": "Time from a choice's first token to its last.",
}


class Metrics(Collector):
    """One app's metrics, in a registry of its own. Token counts are per choice, as the engine sees them."""

    def __init__(self, runtime: Runtime) -> None:
        self.registry = CollectorRegistry()
        self._runtime = runtime
        self.registry.register(self)
        ProcessCollector(registry=self.registry)
        counter = partial(Counter, namespace="slipstream", registry=self.registry)
        histogram = partial(Histogram, namespace="slipstream", registry=self.registry, buckets=_SECONDS)
        self._requests = counter("http_requests", "HTTP requests answered.", ("route", "method", "status"))
        self._refused = counter("refusals", "Requests refused for a limit, by the option that sets it.", ("limit",))
        self._finished = counter("choices", "Answers ended, by the reason.", ("finish_reason",))
        self._totals = {name: counter(name, help) for name, help in _TOTALS.items()}
        self._first = histogram("time_to_first_token_seconds", "From a request's parsed body to its first token.")
        self._times = {name: histogram(f"{name}_seconds", help) for name, help in _TIMES.items()}
        self._whole = histogram("choice_seconds", "From a request's parsed body to the end of an answer.")
        self._prompts = histogram("choice_prompt_tokens", "Prompt tokens of a choice.", buckets=_COUNTS)
        self._answers = histogram("choice_completion_tokens", "Generated tokens of a choice.", buckets=_COUNTS)
        per_choice = (self._first, self._whole, self._prompts, self._answers, *self._times.values())
        sources = (self, self._finished, *self._totals.values(), *per_choice)
        self.registry.register(VLLMNames(sources, runtime.model.name))

    def first_piece(self, seconds: float) -> None:
        """A choice had its first token, or its end, so long after its request."""
        self._first.observe(seconds)

    def finished(self, reason: FinishReason, counters: TurnCounters, seconds: float) -> None:
        """A choice had its last piece, so long after its request."""
        self._finished.labels(reason).inc()
        self._whole.observe(seconds)
        self._prompts.observe(counters.prompt_tokens)
        self._answers.observe(counters.completion_tokens)
        for name, total in self._totals.items():
            total.inc(getattr(counters, name))
        for name, time in self._times.items():
            time.observe(getattr(counters, f"{name}_ms") / 1e3)

    def refused(self, limit: str) -> None:
        """A request was refused for a limit."""
        self._refused.labels(limit).inc()

    def answered(self, route: str, method: str, status: int) -> None:
        """An HTTP request was answered; `route` is the path as it was declared."""
        self._requests.labels(route, method, str(status)).inc()

    def collect(self) -> Iterator[Metric]:
        """The engine's own totals, as of now."""
        stats = self._runtime.core.stats()
        kv = stats.kv
        exact = self._runtime.exact
        yield _gauge("exact", "1 if the same request gives the same tokens here, whatever happens around it.", exact)
        yield _counter("engine_steps", "Forward passes of the model.", stats.steps)
        yield _counter("engine_tokens", "Tokens computed, without padding.", stats.tokens_forwarded)
        yield _counter("engine_infer_seconds", "Time in forward passes, first choices included.", stats.infer_seconds)
        yield _counter("engine_busy_seconds", "Time with something to compute.", stats.busy_seconds)
        yield _counter("preemptions", "Choices set back for lack of KV memory.", stats.preemptions)
        yield _gauge("choices_running", "Choices being computed.", stats.running)
        yield _gauge("choices_waiting", "Choices that wait to be computed.", stats.waiting)
        yield _gauge("kv_capacity_tokens", "KV memory.", kv.capacity)
        yield _gauge("kv_free_tokens", "KV memory that nothing holds.", kv.free)
        held = 1 - (kv.free + kv.evictable) / kv.capacity
        yield _gauge("kv_usage", "Share of KV memory that running and pinned sequences hold, from 0 to 1.", held)
        memory = asdict(self._runtime.memory)
        del memory["resident"]  # which is process_resident_memory_bytes
        yield _gauge("memory_bytes", "Resident memory, by what takes it.", memory, "part")
        sequences = {"running": kv.running_sequences, "retained": kv.cached_sequences, "pinned": kv.pinned_sequences}
        yield _gauge("kv_sequences", "Sequences in KV memory.", sequences, "state")
        yield _counter("kv_evictions", "Retained sequences given up for others.", kv.evictions)
        sessions = self._runtime.sessions
        yield _gauge("sessions", "Sessions, named or not.", len(sessions))
        yield _gauge("idle_waiting", "Sessions with something to compute ahead of time.", sessions.ahead.waiting)
        yield _counter("idle_tokens", "Tokens computed ahead of time, while nobody waited.", stats.idle_tokens)
        yield _counter("idle_seconds", "Time that took.", stats.idle_seconds)
        yield _counter("idle_tokens_used", "Prompt tokens that turns found computed ahead.", sessions.ahead.used_tokens)
        yield _counter("idle_seconds_saved", "What they would have cost, at the least.", sessions.ahead.saved_seconds)
        if (disk := sessions.connector) is not None:
            yield _counter("state_saved_tokens", "Tokens whose KV was written to disk.", disk.saved_tokens)
            yield _counter("state_restored_tokens", "Tokens whose KV was read from disk.", disk.restored_tokens)
            yield _gauge("state_bytes", "KV on disk.", disk.saved_bytes)
            yield _gauge("state_unsaved_parts", "Parts of conversations that wait to be written.", disk.unsaved_parts)
        if (cache := self._runtime.core.response_cache) is not None:
            yield _counter("response_cache_hits", "Requests answered from memory.", cache.hits)
            yield _counter("response_cache_misses", "Requests that could have been, but were new.", cache.misses)
            yield _gauge("response_cache_bytes", "Memory of known answers.", cache.total_bytes)
        deaths = "Grammars and foreign templates that took more than --sandbox-seconds or --sandbox-memory."
        yield _counter("sandbox_deaths", deaths, self._runtime.sandbox_deaths, "sandbox")
        renders = {kind: self._runtime.conversations.renders[kind] for kind in ("first", "spliced", "full", "repeated")}
        yield _counter("prompt_renders", "Conversations made into prompts, by how.", renders, "kind")
        breaks = {kind: sessions.turns.breaks.kinds[kind] for kind in get_args(Kind)}
        yield _counter(
            "reuse_breaks", "Turns that computed again what had been computed before, by why.", breaks, "kind"
        )


def _counter(name: str, help: str, value: float | Mapping[str, float], label: str | None = None) -> Metric:
    return _filled(CounterMetricFamily(f"slipstream_{name}", help, labels=label and [label]), value)


def _gauge(name: str, help: str, value: float | Mapping[str, float], label: str | None = None) -> Metric:
    return _filled(GaugeMetricFamily(f"slipstream_{name}", help, labels=label and [label]), value)


def _filled(metric: CounterMetricFamily | GaugeMetricFamily, value: float | Mapping[str, float]) -> Metric:
    """The metric with its value, or with one for each value of its label."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            metric.add_metric([key], each)
    else:
        metric.add_metric([], value)
    return metric
