"""The workloads: which agents talk, for how long, and how their turns mix. Deterministic from a seed.

Rounds of a run differ in their texts, so that nothing of one is a repeat of another: what a server knows of the rounds
before doesn't shorten a turn, except where a workload is about repeats.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from slipstream_bench import bfcl
from slipstream_bench.coding import coding_script, long_head
from slipstream_bench.script import Script

Order = Literal["taking turns", "one after another", "all at once"]


@dataclass(frozen=True, slots=True)
class Workload:
    """Conversations of some agents with one server."""

    name: str
    description: str
    agents: int
    turns: int
    """Of each agent; at least, where conversations are of different lengths."""
    make: Callable[[random.Random], list[Script]]
    order: Order = "taking turns"
    later: Literal["turns", "agents"] = "turns"
    """What the median over later turns is taken of: turns 2 to n of each agent, or all turns of agents 2 to n."""
    rewrites: bool = False
    """Whether the client writes each answer anew in its own way, and half way drops old results."""
    response_cache: bool = False
    """Whether a server may answer exact repeats from memory."""

    def scripts(self, seed: int, round_number: int) -> list[Script]:
        """One for each agent."""
        return self.make(random.Random(f"{seed} {self.name} {round_number}"))

    def cut(self, turns: int) -> "Workload":
        """The same, but for turns of an agent after so many."""

        def make(rng: random.Random) -> list[Script]:
            return [replace(script, turns=script.turns[:turns]) for script in self.make(rng)]

        return replace(self, turns=min(self.turns, turns), make=make)

    def is_later(self, agent: int, turn: int) -> bool:
        """Whether the median over later turns has this one; both count from 0."""
        return (turn if self.later == "turns" else agent) > 0


def _fleet(rng: random.Random) -> list[Script]:
    return [coding_script(rng, 6) for _ in range(8)]


def _shared_prefix(rng: random.Random) -> list[Script]:
    head = long_head(rng, 60)
    return [coding_script(rng, 2, head=head) for _ in range(12)]


_ALL = (
    Workload(
        "agent-6",
        "One agent, 6 turns: each brings a tool result and answers with the next call.",
        agents=1,
        turns=6,
        make=lambda rng: [coding_script(rng, 6)],
    ),
    Workload(
        "coding-35",
        "One agent, 35 turns, a context of up to about 6,000 tokens.",
        agents=1,
        turns=35,
        make=lambda rng: [coding_script(rng, 35, lines=(1, 4))],
    ),
    Workload(
        "fleet-8",
        "8 unrelated agents of 6 turns, one request at a time in rotation.",
        agents=8,
        turns=6,
        make=_fleet,
    ),
    Workload(
        "fleet-8-concurrent",
        "8 unrelated agents of 6 turns, all at once.",
        agents=8,
        turns=6,
        make=_fleet,
        order="all at once",
    ),
    Workload(
        "shared-prefix",
        "12 agents of 2 turns, one after another, sharing a long system message.",
        agents=12,
        turns=2,
        make=_shared_prefix,
        order="one after another",
        later="agents",
    ),
    Workload(
        "rewrite",
        "One agent, 12 turns. Its client changes white space and key order of each answer, and drops old results "
        "half way.",
        agents=1,
        turns=12,
        make=lambda rng: [coding_script(rng, 12)],
        rewrites=True,
    ),
    Workload(
        "repeat",
        "The same 6-turn conversation three times. The only workload with a response cache.",
        agents=3,
        turns=6,
        make=lambda rng: [coding_script(rng, 6)] * 3,
        order="one after another",
        later="agents",
        response_cache=True,
    ),
    Workload(
        "bfcl-multi-turn",
        "Three conversations of the Berkeley Function-Calling Leaderboard, with its user messages, its tools, and the "
        "results of its true calls.",
        agents=3,
        turns=6,
        make=lambda rng: bfcl.scripts(rng, count=3, least_turns=6),
        order="one after another",
    ),
    Workload(
        "growth",
        "One agent with two tools, from 400 to about 7,500 tokens of context.",
        agents=1,
        turns=35,
        make=lambda rng: [coding_script(rng, 35, lines=(7, 7), tools=2)],
    ),
)
WORKLOADS: Mapping[str, Workload] = {workload.name: workload for workload in _ALL}
