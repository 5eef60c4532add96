"""What eviction costs: tokens computed again on traces of several agents, by the order in which memory is given up.

    python -m slipstream_bench.measurements.eviction

Each trace is turns at given times, so that all orders see the same ones. Conversations share nothing, and are cached
and evicted whole, in blocks. Coding agents have the texts of the workload `coding-35`, four characters a token; their
tools take from a tenth of a second to minutes, and between tasks a person reads for a minute or so; one conversation in
ten is abandoned while a tool runs. Chats wait for a person after each answer. Single questions are asked once. Memory
holds a half, a third or a quarter of what the conversations under way at one time need.

Counts are of tokens that were computed before, and computed again since they had been evicted; work is the same,
weighted by what a token costs in its context. No model runs, so the processor makes no difference.
"""

import argparse
import heapq
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

from slipstream.kv.eviction import AWAITED
from slipstream_bench.coding import coding_script

BLOCK = 32
ANSWER = 40
"""Tokens of an answer."""
DOUBLES = 4000
"""Tokens of context at which a token costs twice as much as at none."""
ABANDONED = 0.1
"""Of the coding agents' conversations."""
TOOL_SECONDS = {"run_tests": (20.0, 1.0), "commit": (1.0, 0.5), "search_code": (0.5, 0.5)}
"""Median, and the spread of its logarithm; other tools take a tenth of a second."""
READING = (60.0, 1.0)
"""Seconds of a person, in the same way."""
MIXES = {
    "16 coding agents": (16, 0, 0.0),
    "16 chats": (0, 16, 0.0),
    "8 coding agents, 8 chats": (8, 8, 0.0),
    "12 coding agents, a question every 15 s": (12, 0, 1 / 15),
}
"""Coding agents, chats, single questions a second."""


@dataclass(frozen=True, slots=True)
class Order:
    """An order of eviction, by what a conversation is worth."""

    name: str
    awaited: float
    """How much more it's worth while its tools run."""
    by_cost: bool = False
    """Whether it's worth more the more a token of it costs to compute again."""

    def value(self, level: float, tokens: int, *, awaited: bool) -> float:
        """The value of a conversation that is used."""
        return level + (self.awaited if awaited else 1.0) * (cost(tokens) if self.by_cost else 1.0)


def cost(tokens: int) -> float:
    """What a token of a conversation costs to compute again, on average."""
    return 1 + tokens / 2 / DOUBLES


ORDERS = (
    Order("least recently used", 1),
    Order("by return", AWAITED),  # as it is in `KVMemory`
    Order("by return, 16", 16),
    Order("by cost", 1, by_cost=True),
    Order("by cost and return", AWAITED, by_cost=True),
)


@dataclass(slots=True)
class Conversation:
    """One from its first turn to its last."""

    number: int
    length: int = 0
    """Tokens so far."""


@dataclass(frozen=True, slots=True, order=True)
class Turn:
    """A turn that comes at a time, in seconds; `before`, `prompt` and `after` are lengths of its conversation."""

    at: float
    conversation: int
    before: int = field(compare=False)
    prompt: int = field(compare=False)
    after: int = field(compare=False)
    awaited: bool = field(compare=False)
    """Whether a tool runs after it."""


def trace(mix: tuple[int, int, float], until: float, seed: int) -> list[Turn]:
    """All turns of so many seconds, in the order of time."""
    coding, chats, questions = mix
    rng = random.Random(seed)
    numbers = iter(range(10**6))
    agents = [coding_agent(rng, until, numbers) for _ in range(coding)]
    agents += [chat(rng, until, numbers) for _ in range(chats)]
    if questions:
        agents.append(single_questions(rng, until, numbers, questions))
    return list(heapq.merge(*agents))


def coding_agent(rng: random.Random, until: float, numbers: Iterator[int]) -> Iterator[Turn]:
    """One coding agent after another on the same desk: a conversation has 35 turns, a task has 5 to 12."""
    at = rng.uniform(0, 120)
    while at < until:
        script = coding_script(rng, 35, lines=(1, 4))
        conversation = Conversation(next(numbers), tokens_of(script.system + json.dumps(script.tools)))
        task, last = rng.randint(5, 12), rng.randint(1, 34) if rng.random() < ABANDONED else 35
        for number, turn in enumerate(script.turns[:last], start=1):
            task = 0 if number == 35 else task - 1
            yield turn_of(at, conversation, tokens_of(turn.user + turn.result), first=not turn.result, awaited=task > 0)
            at += 0.7 + (seconds(rng, TOOL_SECONDS.get(turn.tool, (0.1, 0.5))) if task else seconds(rng, READING))
            task = task or rng.randint(5, 12)


def chat(rng: random.Random, until: float, numbers: Iterator[int]) -> Iterator[Turn]:
    """One chat of 3 to 12 questions after another, by a person."""
    at = rng.uniform(0, 120)
    while at < until:
        conversation = Conversation(next(numbers), 100)
        for number in range(rng.randint(3, 12)):
            asked = int(seconds(rng, (150.0, 1.0)))
            yield turn_of(at, conversation, asked, first=not number, awaited=False)
            at += 0.7 + seconds(rng, READING)


def single_questions(rng: random.Random, until: float, numbers: Iterator[int], rate: float) -> Iterator[Turn]:
    """Questions about a text, each asked once."""
    at = rng.expovariate(rate)
    while at < until:
        yield turn_of(at, Conversation(next(numbers), 100), int(seconds(rng, (600.0, 0.5))), first=True, awaited=False)
        at += rng.expovariate(rate)


def turn_of(at: float, conversation: Conversation, new: int, *, first: bool, awaited: bool) -> Turn:
    """The next turn of a conversation, with so many new tokens."""
    before = 0 if first else conversation.length
    prompt = conversation.length + new + 1
    conversation.length = prompt + ANSWER
    return Turn(at, conversation.number, before, prompt, conversation.length, awaited)


def tokens_of(text: str) -> int:
    """About how many tokens a text has."""
    return len(text) // 4


def seconds(rng: random.Random, by: tuple[float, float]) -> float:
    """A time drawn by its median and the spread of its logarithm."""
    median, spread = by
    return median * rng.lognormvariate(0, spread)


def needed(turns: list[Turn]) -> int:
    """The tokens of all conversations that are under way at one time, at the most."""
    last = {turn.conversation: turn.at for turn in turns}
    lengths: dict[int, int] = {}
    most = 0
    for turn in turns:
        lengths[turn.conversation] = turn.after
        most = max(most, sum(lengths.values()))
        if last[turn.conversation] == turn.at:
            del lengths[turn.conversation]
    return most


def replay(turns: list[Turn], capacity: int, order: Order) -> tuple[int, float]:
    """How many tokens are computed again in so much memory, enough for the longest, and the work that they are."""
    capacity = max(capacity, *(turn.after for turn in turns))
    cached: dict[int, tuple[float, int]] = {}  # the value and length of each conversation, least recently used first
    held, level = 0, 0.0
    again, work = 0, 0.0
    for turn in turns:
        _, kept = cached.pop(turn.conversation, (0.0, 0))
        held += blocks(turn.after) - blocks(kept)
        lost = max(0, turn.before - kept)
        again, work = again + lost, work + lost * cost(2 * kept + lost)
        while held > blocks(capacity):
            victim = min(cached, key=lambda conversation: cached[conversation][0])
            evicted, length = cached.pop(victim)
            held, level = held - blocks(length), max(level, evicted)
        cached[turn.conversation] = order.value(level, turn.after, awaited=turn.awaited), turn.after
    return again, work


def blocks(tokens: int) -> int:
    """The blocks that tokens take."""
    return -(-tokens // BLOCK)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="how long a trace is")
    parser.add_argument("--seeds", type=int, default=10, help="how many traces of each kind")
    options = parser.parse_args()
    first, *others = ORDERS
    table = Table("trace", "memory", f"tokens again, {first.name}", *(f"{each.name}: tokens, work" for each in others))
    for name, mix in MIXES.items():
        traces = [trace(mix, 60 * options.minutes, seed) for seed in range(options.seeds)]
        for part in (2, 3, 4):
            found = []
            for order in ORDERS:
                each = [replay(turns, needed(turns) // part, order) for turns in traces]
                found.append((sum(tokens for tokens, _ in each), sum(work for _, work in each)))
            (tokens, work), *rest = found
            ratios = (f"{other / max(1, tokens):.2f}, {effort / max(1e-9, work):.2f}" for other, effort in rest)
            table.add_row(name, f"1/{part}", f"{tokens:,}", *ratios)
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
