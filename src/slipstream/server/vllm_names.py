"""The metrics under the names that vLLM's dashboards and routers read, where they mean the same."""

from collections.abc import Iterator, Mapping, Sequence

from prometheus_client.core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

_NAMES: Mapping[str, tuple[str, ...]] = {
    "slipstream_choices_running": ("num_requests_running",),
    "slipstream_choices_waiting": ("num_requests_waiting",),
    "slipstream_preemptions": ("num_preemptions",),
    "slipstream_kv_usage": ("kv_cache_usage_perc",),  # from 0 to 1 there, too
    "slipstream_prompt_tokens": ("prompt_tokens", "prefix_cache_queries"),
    "slipstream_reused_tokens": ("prefix_cache_hits",),
    "slipstream_completion_tokens": ("generation_tokens",),
    "slipstream_drafted_tokens": ("spec_decode_num_draft_tokens",),
    "slipstream_accepted_tokens": ("spec_decode_num_accepted_tokens",),
    "slipstream_choices": ("request_success",),  # which counts those that were cancelled, too
    "slipstream_choice_prompt_tokens": ("request_prompt_tokens",),
    "slipstream_choice_completion_tokens": ("request_generation_tokens",),
    "slipstream_time_to_first_token_seconds": ("time_to_first_token_seconds",),
    "slipstream_choice_seconds": ("e2e_request_latency_seconds",),
    "slipstream_queue_seconds": ("request_queue_time_seconds",),
    "slipstream_prefill_seconds": ("request_prefill_time_seconds",),
    "slipstream_decode_seconds": ("request_decode_time_seconds",),
}
"""Ours, and theirs behind `vllm:`."""
_REASONS = {"cancelled": "abort"}


class VLLMNames(Collector):
    """What other collectors have, under vLLM's names and with its labels, for one model."""

    def __init__(self, sources: Sequence[Collector], model: str) -> None:
        self._sources = sources
        self._labels = {"model_name": model, "engine": "0"}

    def collect(self) -> Iterator[Metric]:
        """The metrics that vLLM has, too."""
        for source in self._sources:
            for metric in source.collect():
                for name in _NAMES.get(metric.name, ()):
                    help = f"{metric.documentation} The same as {metric.name}."
                    renamed = Metric(f"vllm:{name}", help, metric.type)
                    renamed.samples = [self._sample(each, metric.name, renamed.name) for each in metric.samples]
                    yield renamed

    def _sample(self, sample: Sample, old: str, new: str) -> Sample:
        labels = dict(sample.labels)
        if (reason := labels.pop("finish_reason", None)) is not None:
            labels["finished_reason"] = _REASONS.get(reason, reason)
        return sample._replace(name=sample.name.replace(old, new, 1), labels=self._labels | labels)
