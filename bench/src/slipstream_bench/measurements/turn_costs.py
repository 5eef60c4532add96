"""What a turn costs as a conversation grows, with KV reuse and without, through HTTP with the official client.

    python -m slipstream_bench.measurements.turn_costs

35 turns of one conversation, about 150 new tokens each, and answers of 32 tokens decoded one by one, so that all
turns do the same work. Every turn is asked with reuse and without, alternately, and the answers must be the same. Then
the time to the first token of a delta of about 130 tokens at a context of 1,300.
"""

import argparse
import random
import statistics
import time
from typing import Any

from openai import OpenAI
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tests.server.process import MODEL, Server, running_server

WORDS = ("river", "stone", "light", "paper", "engine", "garden", "window", "number", "letter", "signal", "winter")
Messages = list[dict[str, Any]]


def words(rng: random.Random, count: int) -> str:
    """Text of about that many tokens."""
    return " ".join(rng.choice(WORDS) for _ in range(count))


def ask(client: OpenAI, messages: Messages, *, reuse: bool, tokens: int) -> tuple[str, dict[str, Any], float, float]:
    """The answer, its `slipstream` object, and seconds to the first token and in all."""
    started = time.perf_counter()
    first = 0.0
    text, report = "", {}
    stream = client.chat.completions.create(
        model=MODEL,
        messages=messages,  # type: ignore[arg-type]
        temperature=0,
        max_tokens=tokens,
        stream=True,
        extra_body={"slipstream": {"reuse": reuse, "speculation": False}, "ignore_eos": True},
    )
    for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            first = first or time.perf_counter() - started
            text += chunk.choices[0].delta.content
        report = getattr(chunk, "slipstream", None) or report
    return text, report, first, time.perf_counter() - started


def growing_conversation(server: Server, client: OpenAI, turns: int, console: Console) -> None:
    """One conversation, turn by turn, with reuse and without."""
    rng = random.Random(0)
    messages: Messages = [{"role": "system", "content": "You are a careful assistant."}]
    table = Table("turn", "prompt", "reused", "delta", "answer", "passes", "reuse, ms", "no reuse, ms", "ratio")
    times: list[float] = []
    busy = infer = wall = engine = 0.0
    for turn in track(range(1, turns + 1), "Turns", console=console):
        messages.append({"role": "user", "content": words(rng, 138)})
        before = server.wait_until_idle()
        text, report, _, seconds = ask(client, messages, reuse=True, tokens=32)
        after = server.wait_until_idle()
        afresh, _, _, seconds_afresh = ask(client, messages, reuse=False, tokens=32)
        assert text == afresh, "an answer depends on what was in memory"
        busy += after["slipstream_engine_busy_seconds_total"] - before["slipstream_engine_busy_seconds_total"]
        infer += after["slipstream_engine_infer_seconds_total"] - before["slipstream_engine_infer_seconds_total"]
        wall += seconds
        engine += sum(report[f"{part}_ms"] for part in ("queue", "prefill", "decode")) / 1e3
        times.append(seconds)
        messages.append({"role": "assistant", "content": text})
        if turn in (1, 2) or turn % 5 == 0:
            counts = (report[f"{name}_tokens"] for name in ("prompt", "reused", "delta", "completion"))
            table.add_row(
                *(str(value) for value in (turn, *counts, report["forward_passes"])),
                f"{seconds * 1e3:.0f}",
                f"{seconds_afresh * 1e3:.0f}",
                f"{seconds_afresh / seconds:.1f}",
            )
    console.print(table)
    middle = statistics.median(times[3:6]), statistics.median(times[-3:])
    console.print(
        f"turns 4-6 {middle[0] * 1e3:.0f} ms, last three {middle[1] * 1e3:.0f} ms: {middle[1] / middle[0]:.2f}x"
    )
    console.print(
        f"outside of infer(): {(busy - infer) / busy:.1%} of the engine's time; "
        f"outside of the engine (client, HTTP, template, tokenizer): {(wall - engine) / wall:.1%} of the turns"
    )


def first_token(client: OpenAI, rounds: int, console: Console) -> None:
    """The time to the first token of a short delta on a longer context, against computing all of it."""
    rng = random.Random(1)
    with_reuse, afresh = [], []
    for _ in range(rounds):
        messages: Messages = [{"role": "user", "content": words(rng, 1130)}]
        text, *_ = ask(client, messages, reuse=True, tokens=16)
        messages += [{"role": "assistant", "content": text}, {"role": "user", "content": words(rng, 118)}]
        _, report, first, _ = ask(client, messages, reuse=True, tokens=8)
        with_reuse.append(first)
        _, _, first, _ = ask(client, messages, reuse=False, tokens=8)
        afresh.append(first)
    ours, fresh = statistics.median(with_reuse) * 1e3, statistics.median(afresh) * 1e3
    console.print(
        f"first token of a delta of {report['delta_tokens']} tokens in a prompt of {report['prompt_tokens']}: "
        f"{ours:.0f} ms; of the whole prompt afresh: {fresh:.0f} ms ({fresh / ours:.1f}x); medians of {rounds}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=35)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    console = Console(width=120)
    with running_server("--kv-memory", "512MiB") as server, server.openai() as client:
        ask(client, [{"role": "user", "content": "Warm up."}], reuse=True, tokens=4)
        growing_conversation(server, client, options.turns, console)
        first_token(client, options.rounds, console)


if __name__ == "__main__":
    main()
