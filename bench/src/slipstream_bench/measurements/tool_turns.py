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
from dataclasses import dataclass, field
from typing import Any

from openai import AsyncOpenAI
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tests.server.process import MODEL, Server, running_server

from slipstream_bench.coding import SYSTEM, TOOLS, coding_script
from slipstream_bench.script import ScriptedTurn

FAST = {"jump_forward": True, "speculation": True}
PLAIN = {"jump_forward": False, "speculation": False}
FORCED_ONLY = {"jump_forward": True, "speculation": False}


def turns_of(count: int, seed: int = 0) -> tuple[ScriptedTurn, ...]:
    """Of the bench's coding agent."""
    return coding_script(random.Random(seed), count).turns


@dataclass
class Agent:
    """A conversation, and what its turns cost; `name` makes it unlike all others, so that it shares KV with none."""

    client: AsyncOpenAI
    name: str
    switches: dict[str, bool]
    messages: list[dict[str, Any]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    reports: list[dict[str, Any]] = field(default_factory=list)

    async def take(self, turn: ScriptedTurn) -> None:
        """Hand over the result of the last call, and get the next one."""
        if not self.messages:
            self.messages.append({"role": "system", "content": f"Agent {self.name}. {SYSTEM}"})
            self.messages.append({"role": "user", "content": turn.user})
        else:
            (call,) = self.messages[-1]["tool_calls"]
            self.messages.append({"role": "tool", "tool_call_id": call["id"], "content": turn.result})
        started = time.perf_counter()
        completion = await self.client.chat.completions.create(
            model=MODEL,
            messages=self.messages,  # type: ignore[arg-type]
            tools=TOOLS,  # type: ignore[arg-type]
            tool_choice={"type": "function", "function": {"name": turn.tool}},
            temperature=0,
            max_tokens=200,
            extra_body={"slipstream": self.switches},
        )
        self.seconds.append(time.perf_counter() - started)
        self.reports.append(completion.slipstream)  # type: ignore[attr-defined]
        self.messages.append(completion.choices[0].message.model_dump(exclude_none=True))

    def totals(self) -> Counter[str]:
        """Counters of all turns but the first."""
        return sum(
            (Counter({k: v for k, v in r.items() if k.endswith(("tokens", "passes"))}) for r in self.reports[1:]),
            Counter(),
        )


async def one_agent(client: AsyncOpenAI, turns: int, console: Console) -> None:
    agents = [Agent(client, "1001", FAST), Agent(client, "2002", PLAIN)]
    for turn in track(turns_of(turns), "One agent", console=console):
        for agent in agents:
            await agent.take(turn)
    table = Table(
        "later turns", "median, ms", "prompt", "delta", "tokens", "passes", "per token", "forced", "drafted", "accepted"
    )
    medians = []
    for agent, name in zip(agents, ("forced tokens and drafts", "neither"), strict=True):
        medians.append(statistics.median(agent.seconds[1:]))
        counts = agent.totals()
        table.add_row(
            name,
            f"{medians[-1] * 1e3:.0f}",
            f"to {agent.reports[-1]['prompt_tokens']}",
            f"{statistics.mean(report['delta_tokens'] for report in agent.reports[1:]):.0f} a turn",
            *(str(counts[key]) for key in ("completion_tokens", "forward_passes")),
            f"{counts['forward_passes'] / counts['completion_tokens']:.3f}",
            *(str(counts[f"{key}_tokens"]) for key in ("forced", "drafted", "accepted")),
        )
    console.print(table)
    console.print(f"later-turn median: {medians[0] / medians[1]:.2f} of the one without")


async def many_agents(client: AsyncOpenAI, agents: int, rounds: int, console: Console) -> None:
    ways = {"drafts and forced tokens": FAST, "forced tokens": FORCED_ONLY, "neither": PLAIN}
    totals: dict[str, list[float]] = {name: [] for name in ways}

    async def lead(agent: Agent, seed: int) -> None:
        for turn in turns_of(6, seed):
            await agent.take(turn)

    for number in track(range(rounds), f"{agents} agents", console=console):
        for way, (name, switches) in enumerate(ways.items()):
            team = [Agent(client, f"{number}{way}{index:02}", switches) for index in range(agents)]
            started = time.perf_counter()
            await asyncio.gather(*(lead(agent, seed) for seed, agent in enumerate(team)))
            totals[name].append(time.perf_counter() - started)
    table = Table(f"{agents} agents at once, 6 turns each", "seconds in all, median of rounds", "rounds")
    for name, seconds in totals.items():
        table.add_row(name, f"{statistics.median(seconds):.2f}", " ".join(f"{value:.2f}" for value in seconds))
    console.print(table)
    ratios = [a / b for a, b in zip(totals["drafts and forced tokens"], totals["forced tokens"], strict=True)]
    console.print(f"with drafts against forced tokens alone, round by round: {statistics.median(ratios):.2f}")


async def run(server: Server, options: argparse.Namespace) -> None:
    console = Console(width=130)
    async with server.async_openai() as client:
        await Agent(client, "0000", FAST).take(turns_of(1)[0])
        await one_agent(client, options.turns, console)
        await many_agents(client, options.agents, options.rounds, console)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=35)
    parser.add_argument("--agents", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with running_server("--kv-memory", "2GiB") as server:
        asyncio.run(run(server, options))


if __name__ == "__main__":
    main()
