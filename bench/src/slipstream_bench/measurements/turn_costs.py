"""What a turn costs as a conversation grows, with KV reuse and without, through HTTP.

    python -m slipstream_bench.measurements.turn_costs

35 turns of one conversation, about 150 new tokens each, and answers of 32 tokens decoded one by one, so that all
turns do the same work. Every turn is asked with reuse and without, alternately, and the answers must be the same. Then
the time to the first token of a delta of about 130 tokens at a context of 1,300.
"""

import argparse
import asyncio
import random
import statistics
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.progress import track
from rich.table import Table

from slipstream.models import DEFAULT_MODEL
from slipstream_bench.client import Client, Stream
from slipstream_bench.peers.base import Endpoint
from slipstream_bench.peers.slipstream import serving

WORDS = ("river", "stone", "light", "paper", "engine", "garden", "window", "number", "letter", "signal", "winter")
Messages = list[dict[str, Any]]


def words(rng: random.Random, count: int) -> str:
    """Text of about that many tokens."""
    return " ".join(rng.choice(WORDS) for _ in range(count))


async def ask(client: Client, messages: Messages, *, reuse: bool, tokens: int) -> tuple[Stream, dict[str, Any]]:
    """The answer, decoded one by one, and its `slipstream` object."""
    switches = {"reuse": reuse, "speculation": False}
    options = {"temperature": 0, "max_tokens": tokens, "ignore_eos": True, "slipstream": switches}
    stream = await client.ask({"messages": messages, **options})
    assert stream.report is not None
    return stream, stream.report


async def engine_seconds(http: httpx.AsyncClient) -> tuple[float, float]:
    """The engine's time with something to compute, and in forward passes, once no answer is under way."""
    while True:
        families = text_string_to_metric_families((await http.get("/metrics")).text)
        values = {sample.name: sample.value for family in families for sample in family.samples}
        if values["slipstream_choices_running"] == values["slipstream_choices_waiting"] == 0:
            return values["slipstream_engine_busy_seconds_total"], values["slipstream_engine_infer_seconds_total"]
        await asyncio.sleep(0.01)


async def growing_conversation(http: httpx.AsyncClient, client: Client, turns: int, console: Console) -> None:
    """One conversation, turn by turn, with reuse and without."""
    rng = random.Random(0)
    messages: Messages = [{"role": "system", "content": "You are a careful assistant."}]
    table = Table("turn", "prompt", "reused", "delta", "answer", "passes", "reuse, ms", "no reuse, ms", "ratio")
    times: list[float] = []
    busy = infer = engine = 0.0
    for turn in track(range(1, turns + 1), "Turns", console=console):
        messages.append({"role": "user", "content": words(rng, 138)})
        busy_before, infer_before = await engine_seconds(http)
        stream, report = await ask(client, messages, reuse=True, tokens=32)
        busy_after, infer_after = await engine_seconds(http)
        afresh, _ = await ask(client, messages, reuse=False, tokens=32)
        assert stream.answer == afresh.answer, "an answer depends on what was in memory"
        busy += busy_after - busy_before
        infer += infer_after - infer_before
        engine += sum(report[f"{part}_ms"] for part in ("queue", "prefill", "decode")) / 1e3
        times.append(stream.seconds)
        messages.append({"role": "assistant", "content": stream.answer.text})
        if turn in (1, 2) or turn % 5 == 0:
            counts = (report[f"{name}_tokens"] for name in ("prompt", "reused", "delta", "completion"))
            table.add_row(
                *(str(value) for value in (turn, *counts, report["forward_passes"])),
                f"{stream.seconds * 1e3:.0f}",
                f"{afresh.seconds * 1e3:.0f}",
                f"{afresh.seconds / stream.seconds:.1f}",
            )
    console.print(table)
    middle = statistics.median(times[3:6]), statistics.median(times[-3:])
    console.print(
        f"turns 4-6 {middle[0] * 1e3:.0f} ms, last three {middle[1] * 1e3:.0f} ms: {middle[1] / middle[0]:.2f}x"
    )
    console.print(
        f"outside of infer(): {(busy - infer) / busy:.1%} of the engine's time; "
        f"outside of the engine (client, HTTP, template, tokenizer): {1 - engine / sum(times):.1%} of the turns"
    )


async def first_token(client: Client, rounds: int, console: Console) -> None:
    """The time to the first token of a short delta on a longer context, against computing all of it."""
    rng = random.Random(1)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    reports: dict[bool, dict[str, Any]] = {}
    for _ in range(rounds):
        messages: Messages = [{"role": "user", "content": words(rng, 1130)}]
        answered, _ = await ask(client, messages, reuse=True, tokens=16)
        messages += [
            {"role": "assistant", "content": answered.answer.text},
            {"role": "user", "content": words(rng, 118)},
        ]
        for reuse, times in seconds.items():
            stream, report = await ask(client, messages, reuse=reuse, tokens=8)
            assert stream.first_token_seconds is not None
            times.append(stream.first_token_seconds)
            reports[reuse] = report
    ours, fresh = (statistics.median(times) * 1e3 for times in seconds.values())
    console.print(
        f"first token of a delta of {reports[True]['delta_tokens']} tokens "
        f"in a prompt of {reports[True]['prompt_tokens']}: {ours:.0f} ms; "
        f"of the whole prompt afresh: {fresh:.0f} ms ({fresh / ours:.1f}x); medians of {rounds}"
    )


async def run(endpoint: Endpoint, options: argparse.Namespace) -> None:
    console = Console(width=120)
    async with (
        httpx.AsyncClient(base_url=endpoint.base_url.removesuffix("/v1")) as http,
        Client(endpoint, response_cache=True) as client,
    ):
        await ask(client, [{"role": "user", "content": "Warm up."}], reuse=True, tokens=4)
        await growing_conversation(http, client, options.turns, console)
        await first_token(client, options.rounds, console)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=35)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with serving(DEFAULT_MODEL, "--kv-memory", "512MiB", log="turn_costs") as endpoint:
        asyncio.run(run(endpoint, options))


if __name__ == "__main__":
    main()
