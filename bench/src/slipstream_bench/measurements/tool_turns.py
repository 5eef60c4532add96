"""What forced tokens and drafts bring on tool calls, through HTTP: one agent with 35 turns, and eight agents at once.

    python -m slipstream_bench.measurements.tool_turns

The one agent's conversation is led twice, turn by turn alternately: with jump-forward and speculation, and without. The
eight agents run all at once with speculation and without it, round by round alternately.
"""

import argparse
import asyncio
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from slipstream.models import DEFAULT_MODEL
from slipstream_bench.client import Client
from slipstream_bench.coding import SYSTEM, coding_script
from slipstream_bench.peers.base import Endpoint
from slipstream_bench.peers.slipstream import serving
from slipstream_bench.records import TurnResult
from slipstream_bench.runner import all_at_once
from slipstream_bench.script import Script

FAST = {"jump_forward": True, "speculation": True}
PLAIN = {"jump_forward": False, "speculation": False}
FORCED_ONLY = {"jump_forward": True, "speculation": False}


def client_of(endpoint: Endpoint, switches: Mapping[str, bool]) -> Client:
    """Requests with parts of the server switched on or off."""
    return Client(replace(endpoint, extra_body={"slipstream": switches}), response_cache=True)


def script_of(name: str, turns: int, seed: int = 0) -> Script:
    """The bench's coding agent; `name` makes it unlike all others, so that it shares KV with none."""
    return replace(coding_script(random.Random(seed), turns), system=f"Agent {name}. {SYSTEM}")


async def one_agent(endpoint: Endpoint, turns: int, console: Console) -> None:
    async with client_of(endpoint, FAST) as fast, client_of(endpoint, PLAIN) as plain:
        agents = {
            "forced tokens and drafts": fast.agent(0, script_of("1001", turns), "tools"),
            "neither": plain.agent(0, script_of("2002", turns), "tools"),
        }
        later: dict[str, list[TurnResult]] = {name: [] for name in agents}
        for turn in track(range(turns), "One agent", console=console):
            for name, agent in agents.items():
                result = await agent.take(turn)
                if turn:
                    later[name].append(result)
    table = Table(
        "later turns", "median, ms", "prompt", "delta", "tokens", "passes", "per token", "forced", "drafted", "accepted"
    )
    medians = []
    for name, results in later.items():
        reports = [result.report for result in results if result.report]
        medians.append(statistics.median(result.seconds for result in results))
        counts = _totals(reports)
        table.add_row(
            name,
            f"{medians[-1] * 1e3:.0f}",
            f"to {reports[-1]['prompt_tokens']}",
            f"{counts['delta_tokens'] / len(reports):.0f} a turn",
            *(str(counts[key]) for key in ("completion_tokens", "forward_passes")),
            f"{counts['forward_passes'] / counts['completion_tokens']:.3f}",
            *(str(counts[f"{key}_tokens"]) for key in ("forced", "drafted", "accepted")),
        )
    console.print(table)
    console.print(f"later-turn median: {medians[0] / medians[1]:.2f} of the one without")


async def many_agents(endpoint: Endpoint, agents: int, rounds: int, console: Console) -> None:
    ways = {"drafts and forced tokens": FAST, "forced tokens": FORCED_ONLY, "neither": PLAIN}
    totals: dict[str, list[float]] = {name: [] for name in ways}
    for number in track(range(rounds), f"{agents} agents", console=console):
        for way, (name, switches) in enumerate(ways.items()):
            async with client_of(endpoint, switches) as client:
                scripts = [script_of(f"{number}{way}{index:02}", 6, seed=index) for index in range(agents)]
                team = [client.agent(index, script, "tools") for index, script in enumerate(scripts)]
                started = time.perf_counter()
                await all_at_once(team, lambda _: None)
                totals[name].append(time.perf_counter() - started)
    table = Table(f"{agents} agents at once, 6 turns each", "seconds in all, median of rounds", "rounds")
    for name, seconds in totals.items():
        table.add_row(name, f"{statistics.median(seconds):.2f}", " ".join(f"{value:.2f}" for value in seconds))
    console.print(table)
    ratios = [a / b for a, b in zip(totals["drafts and forced tokens"], totals["forced tokens"], strict=True)]
    console.print(f"with drafts against forced tokens alone, round by round: {statistics.median(ratios):.2f}")


def _totals(reports: Iterable[Mapping[str, Any]]) -> Counter[str]:
    """Counts of tokens and passes of all turns."""
    total: Counter[str] = Counter()
    for report in reports:
        total.update({key: value for key, value in report.items() if key.endswith(("tokens", "passes"))})
    return total


async def run(endpoint: Endpoint, options: argparse.Namespace) -> None:
    console = Console(width=130)
    async with client_of(endpoint, FAST) as client:
        await client.agent(0, script_of("0000", 1), "tools").take(0)
    await one_agent(endpoint, options.turns, console)
    await many_agents(endpoint, options.agents, options.rounds, console)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=35)
    parser.add_argument("--agents", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with serving(DEFAULT_MODEL, "--kv-memory", "2GiB", log="tool_turns") as endpoint:
        asyncio.run(run(endpoint, options))


if __name__ == "__main__":
    main()
