"""`slipstream top`: what a running server does now."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from slipstream.cli.remote import LOCAL, ApiKey, Url, server_at

if TYPE_CHECKING:
    import httpx

_TOKENS = (
    ("prompts", "prompt_tokens_total", "reused_tokens_total", "reused"),
    ("generated", "completion_tokens_total", "forced_tokens_total", "forced by grammars"),
    ("drafted", "drafted_tokens_total", "accepted_tokens_total", "right"),
)
_MOST_KINDS = 4
"""Kinds of broken reuse, and of refusals, that are shown: those with most."""


def top(
    url: Url = LOCAL,
    api_key: ApiKey = "none",
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Print what is and was since the start, and end.")] = False,
) -> None:
    """Show what a running server does: what runs and waits, what memory holds, and what turns cost and reuse.

    With API keys it takes one of an operator, as /metrics does. Ctrl-C ends it.

    Examples:

      slipstream top

      slipstream top --once --url http://127.0.0.1:9000
    """
    with server_at(url, api_key) as http:
        now = Snapshot.take(http)
        if once:
            Console().print(frame(now, None))
            return
        before = now
        try:
            with Live(frame(now, None), screen=True, auto_refresh=False) as live:
                while True:
                    time.sleep(interval)
                    before, now = now, Snapshot.take(http)
                    live.update(frame(now, before), refresh=True)
        except KeyboardInterrupt:
            Console().print(frame(now, before))


@dataclass(frozen=True)
class Snapshot:
    """What a server said of itself at one moment."""

    taken: float
    """In seconds, of the clock that only runs forward."""
    model: str
    health: Mapping[str, Any]
    metrics: Mapping[str, float]
    """Values by name and label, as `slipstream_reuse_breaks_total evicted`."""

    @classmethod
    def take(cls, http: "httpx.Client") -> "Snapshot":
        """Ask a server; raises `httpx.HTTPError`."""
        from prometheus_client.parser import text_string_to_metric_families  # takes a while

        health = http.get("/health")
        if health.status_code != 503:  # with which a server that is unwell answers
            health.raise_for_status()
        model = http.get("/v1/models").raise_for_status().json()["data"][0]["id"]
        metrics = {
            " ".join([sample.name, *sample.labels.values()]): sample.value
            for family in text_string_to_metric_families(http.get("/metrics").raise_for_status().text)
            for sample in family.samples
            if not sample.name.endswith("_bucket")
        }
        return cls(time.monotonic(), model, health.json(), metrics)

    def get(self, name: str) -> float:
        """A value, by its name without `slipstream_`; 0 for one that isn't there."""
        return self.metrics.get(f"slipstream_{name}", 0.0)

    def labelled(self, name: str) -> dict[str, float]:
        """The values of a metric by its label."""
        start = f"slipstream_{name} "
        return {key.removeprefix(start): value for key, value in self.metrics.items() if key.startswith(start)}


def frame(now: Snapshot, before: Snapshot | None) -> Group:
    """What to show: totals since the server's start, or what was added since the moment `before`."""
    return Group(_head(now), Text(), _memory(now), Text(), _work(_Change(now, before)))


class _Change:
    """What was added to totals since an earlier moment, or since the start."""

    def __init__(self, now: Snapshot, before: Snapshot | None) -> None:
        self.now = now
        self._before = before
        self.seconds = now.taken - before.taken if before is not None else None

    def __call__(self, name: str) -> float:
        return self.now.get(name) - (self._before.get(name) if self._before is not None else 0.0)

    def rate(self, name: str) -> str:
        """So much, or so much a second."""
        count = self(name)
        return f"{count:,.0f}" if not self.seconds else f"{count / self.seconds:,.1f}/s"

    def share(self, part: str, whole: str) -> str:
        """How much of one total another is."""
        total = self(whole)
        return f"{self(part) / total:.0%}" if total else "-"

    def mean(self, name: str) -> str:
        """The mean of a histogram of seconds."""
        count = self(f"{name}_count")
        return f"{self(f'{name}_sum') / count * 1e3:,.0f} ms" if count else "-"

    def most(self, name: str) -> Iterator[tuple[str, float]]:
        """The labels to whose totals most was added."""
        earlier = self._before.labelled(name) if self._before is not None else {}
        added = {label: value - earlier.get(label, 0.0) for label, value in self.now.labelled(name).items()}
        ranked = sorted(added.items(), key=lambda item: -item[1])
        return ((label, count) for label, count in ranked[:_MOST_KINDS] if count)


def _head(now: Snapshot) -> Text:
    status = now.health["status"]
    exact = "exact" if now.health["exact"] else "not exact"
    return Text.assemble(
        (now.model, "bold"),
        "  ",
        (status, "green" if status == "ok" else "bold red"),
        f"  {exact}  running {now.get('choices_running'):,.0f}  waiting {now.get('choices_waiting'):,.0f}",
        f"  sessions {now.get('sessions'):,.0f}",
    )


def _memory(now: Snapshot) -> Table:
    capacity, free = now.get("kv_capacity_tokens"), now.get("kv_free_tokens")
    held = now.get("kv_usage") * capacity
    states = now.labelled("kv_sequences")
    table = _grid()
    table.add_row(
        "KV memory", ProgressBar(total=capacity, completed=capacity - free, width=30), f"{capacity:,.0f} tokens"
    )
    table.add_row(
        "", f"in use {held:,.0f}", f"{states.get('running', 0):.0f} running, {states.get('pinned', 0):.0f} pinned"
    )
    table.add_row("", f"kept {capacity - free - held:,.0f}", f"{states.get('retained', 0):.0f} conversations")
    table.add_row("", f"free {free:,.0f}", f"{now.get('kv_evictions_total'):,.0f} evictions since the start")
    memory = now.health["memory"]
    parts = ", ".join(f"{part} {memory[part] / 2**20:,.0f}" for part in ("model", "kv", "other"))
    table.add_row("process", f"{memory['resident'] / 2**20:,.0f} MiB", parts)
    if "slipstream_state_bytes" in now.metrics:
        unsaved = f"{now.get('state_unsaved_parts'):,.0f} parts to write"
        table.add_row("disk", f"{now.get('state_bytes') / 2**20:,.0f} MiB", unsaved)
    return table


def _work(change: _Change) -> Table:
    table = _grid()
    since = f"in {change.seconds:.1f} s" if change.seconds else "since the start"
    table.add_row("answers", change.rate("decode_seconds_count"), since)
    for title, whole, part, what in _TOKENS:
        table.add_row(title, change.rate(whole), f"tokens, {change.share(part, whole)} {what}")
    table.add_row("first token", change.mean("time_to_first_token_seconds"), "from the request, on average")
    table.add_row("whole answer", change.mean("choice_seconds"), f"of which queued {change.mean('queue_seconds')}")
    busy = change("engine_busy_seconds_total")
    if change.seconds:
        table.add_row("engine", f"{busy / change.seconds:.0%} busy", f"{change.rate('engine_steps_total')} steps")
    for title, name in (("reuse broken", "reuse_breaks_total"), ("refused", "refusals_total")):
        for label, count in change.most(name):
            table.add_row(title, f"{count:,.0f}", label)
    return table


def _grid() -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", min_width=13)
    table.add_column(justify="left", min_width=30)
    table.add_column(style="dim")
    return table
