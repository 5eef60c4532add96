"""What metrics, logs and limits take of a turn: processor time with all of them, without each, and without any.

    python -m slipstream_bench.measurements.observing_costs

A turn late in a coding agent's conversation, its body with six tools, is asked of several apps in turn, in one
process over an engine whose backend computes nothing, so that little else adds to the time. One app is as served,
with a log of JSON; of the others, parts are taken out. Then the turns of such a conversation are asked of the real
model, for what they take in all.
"""

import argparse
import asyncio
import contextlib
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx
from fastapi import FastAPI
from pydantic_core import from_json
from rich.console import Console
from rich.table import Table
from starlette.types import ASGIApp, Receive, Scope, Send

from slipstream.config import EngineConfig, LimitsConfig, ServerConfig
from slipstream.engine import FinishReason, TurnCounters
from slipstream.models import DEFAULT_MODEL, Model, ModelStore
from slipstream.runtime import BACKENDS, Runtime
from slipstream.server.app import create_app
from slipstream.server.keys import KeyRing
from slipstream.server.log_format import set_up_logs
from slipstream.server.metrics import Metrics
from slipstream.server.turn import LiveTurn
from slipstream_bench.coding import coding_script
from slipstream_bench.conversation import Answer, Conversation
from slipstream_bench.measurements.engine_overhead import Stub

PARTS = ("metrics", "logs", "limits")
VARIANTS = {"all": (), **{f"without {part}": (part,) for part in PARTS}, "without any": PARTS}
TURNS = 20
"""Of the conversation, whose last one is asked."""
Body = dict[str, Any]


class PassOn:
    """ASGI middleware that does nothing."""

    def __init__(self, app: ASGIApp, **_: object) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass everything on."""
        await self._app(scope, receive, send)


class NoMetrics(Metrics):
    """Metrics that nothing is told."""

    def first_piece(self, seconds: float) -> None:
        """Forget it."""

    def finished(self, reason: FinishReason, counters: TurnCounters, seconds: float) -> None:
        """Forget it."""

    def answered(self, route: str, method: str, status: int) -> None:
        """Forget it."""


def no_log(_turn: LiveTurn) -> None:
    """Log nothing."""


def not_measured(body: bytes, _limits: LimitsConfig) -> Any:
    """The JSON of a body, whatever it is."""
    return from_json(body)


TAKEN_OUT: dict[str, dict[str, Any]] = {
    "metrics": {"app.Metrics": NoMetrics, "app.RequestCounter": PassOn},
    "logs": {"app.log_turn": no_log},
    "limits": {"app.Intake": PassOn, "bodies.parsed": not_measured},
}
"""What stands in the place of what, in the server's modules."""


@contextlib.contextmanager
def taken_out(parts: Sequence[str]) -> Iterator[None]:
    """Without these parts."""
    with contextlib.ExitStack() as stack:
        for part in parts:
            for name, stand_in in TAKEN_OUT[part].items():
                stack.enter_context(patch(f"slipstream.server.{name}", stand_in))
        yield


def conversation() -> list[Body]:
    """The bodies of an agent's turns."""
    script = coding_script(random.Random(0), TURNS, lines=(1, 4))
    agent, bodies = Conversation(script, "prescribed"), []
    for turn in range(TURNS):
        messages = list(agent.request(turn)["messages"])
        bodies.append({"messages": messages, "tools": list(script.tools), "tool_choice": "none", "stream": True})
        agent.answered(Answer(agent.prescribed(turn)))
    switches = {"response_cache": False}
    return [{**body, "temperature": 0, "max_tokens": 32, "ignore_eos": True, "slipstream": switches} for body in bodies]


async def processor_seconds(app: FastAPI, runtime: Runtime, bodies: Sequence[Body]) -> float:
    """What a turn takes of the processor, with what is left to do after it."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as http:
        started = time.process_time()
        for body in bodies:
            response = await http.post("/v1/chat/completions", json=body)
            assert response.text.endswith("data: [DONE]\n\n"), response.text
        while runtime.sessions.ahead.waiting or runtime.core.stats().running:
            await asyncio.sleep(0.001)
        return (time.process_time() - started) / len(bodies)


async def compare(runtime: Runtime, rounds: int) -> dict[str, list[float]]:
    """Processor time of a turn for each variant, round by round, in another order each time."""
    body, apps = conversation()[-1], {}
    for name, parts in VARIANTS.items():
        with taken_out(parts):
            apps[name] = create_app(runtime, ServerConfig(), KeyRing())
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    order = list(VARIANTS)
    for number in range(rounds + 1):
        random.Random(number).shuffle(order)
        for name in order:
            with taken_out(VARIANTS[name]):
                seconds = await processor_seconds(apps[name], runtime, [body] * 20)
            if number:  # the first round warms up
                times[name].append(seconds)
    return times


async def scrape(runtime: Runtime) -> float:
    """Processor time of a look at all metrics."""
    app = create_app(runtime, ServerConfig(), KeyRing())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as http:
        started = time.process_time()
        for _ in range(20):
            (await http.get("/metrics")).raise_for_status()
        return (time.process_time() - started) / 20


async def real_turns(runtime: Runtime) -> list[float]:
    """Processor time of each later turn of the conversation."""
    app = create_app(runtime, ServerConfig(), KeyRing())
    return [await processor_seconds(app, runtime, [body]) for body in conversation()][2:]


def stub_runtime(model: Model) -> Runtime:
    """A runtime whose backend computes nothing."""
    stub = Stub(model.manifest.vocab_size, chooses=True)
    with patch.dict(BACKENDS, {model.weights: lambda _model, _config: lambda _progress: stub}):
        manifest = model.manifest.model_copy(update={"context_length": 2**16})
        return Runtime(replace(model, manifest=manifest), EngineConfig())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    model = ModelStore().ensure(DEFAULT_MODEL)
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("w") as log:
        with contextlib.redirect_stderr(log):
            set_up_logs("json")
        with stub_runtime(model) as runtime:
            times = asyncio.run(compare(runtime, options.rounds))
            look = asyncio.run(scrape(runtime))
        with Runtime(model, EngineConfig()) as runtime:
            turns = asyncio.run(real_turns(runtime))
    whole = statistics.median(turns)
    table = Table("variant", "ms a turn", "less than all, ms: median", "quartiles", "of a real turn")
    for name, each in times.items():
        less = [(all - one) * 1e3 for all, one in zip(times["all"], each, strict=True)]
        low, middle, high = statistics.quantiles(less, n=4)
        share = f"{middle / whole / 1e3:.2%}"
        table.add_row(name, f"{statistics.median(each) * 1e3:.2f}", f"{middle:.3f}", f"{low:.3f}, {high:.3f}", share)
    console = Console(width=120)
    console.print(table)
    console.print(f"processor time of a real turn: {whole * 1e3:.0f} ms, from {min(turns):.3f} to {max(turns):.3f} s")
    console.print(f"a look at all metrics: {look * 1e3:.1f} ms")


if __name__ == "__main__":
    main()
