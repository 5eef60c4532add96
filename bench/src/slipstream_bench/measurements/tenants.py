"""What a tenant notices of another: by the time to its first token, and beside one who takes all that it can get.

    python -m slipstream_bench.measurements.tenants

Known prompts: one tenant sends a prompt, then another sends the same and one that nobody sent, in alternate order. If
its first token came sooner for the same, it could find out what others ask. As a check of the measurement itself, the
first tenant sends its prompt again, too. Flood: turns of one tenant alone, and while another has 64 long requests
under way all the time, alternately. Each tenant may take half of the machine, so a turn may take twice as long.
"""

import argparse
import asyncio
import contextlib
import random
import statistics
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from slipstream.models import DEFAULT_MODEL
from slipstream.server.keys import add_key
from slipstream_bench.client import Client, Stream
from slipstream_bench.measurements.turn_costs import words
from slipstream_bench.peers.base import Endpoint
from slipstream_bench.peers.slipstream import serving

PROMPT_TOKENS = 300
FLOOD = 64
TURNS = 2
"""One after the other, alone and beside the flood."""


async def ask(client: Client, text: str, tokens: int, **options: Any) -> Stream:
    """An answer of so many tokens, decoded one by one."""
    messages = [{"role": "user", "content": text}]
    switches = {"speculation": False, "response_cache": False}
    body = {"messages": messages, "temperature": 0, "max_tokens": tokens, "ignore_eos": True, "slipstream": switches}
    return await client.ask({**body, **options})


async def first_token(client: Client, text: str) -> tuple[float, int]:
    """Seconds to the first token of an answer, and how much of the prompt was reused."""
    stream = await ask(client, text, 2)
    assert stream.first_token_seconds is not None
    assert stream.report is not None
    return stream.first_token_seconds, stream.report["reused_tokens"]


async def known_prompts(alice: Client, mallory: Client, rounds: int, console: Console) -> None:
    """Another's prompts beside new ones, for the one who must not tell them apart."""
    rng = random.Random(0)
    seconds: dict[str, list[float]] = {"another's": [], "new": [], "her own": []}
    for number in track(range(rounds + 2), "Known prompts", console=console):
        texts = {"another's": words(rng, PROMPT_TOKENS), "new": words(rng, PROMPT_TOKENS)}
        await first_token(alice, texts["another's"])
        found = {}
        for kind in sorted(texts, reverse=bool(number % 2)):
            found[kind] = await first_token(mallory, texts[kind])
        found["her own"] = await first_token(alice, texts["another's"])
        assert number == 0 or abs(found["another's"][1] - found["new"][1]) < 8, "something of another was reused"
        if number >= 2:  # the first of each order warm up
            for kind, (time, _) in found.items():
                seconds[kind].append(time)
    for kind, times in seconds.items():
        console.print(f"first token of a prompt of {PROMPT_TOKENS} words, {kind}: {told(times)}")
    pairs = list(zip(seconds["another's"], seconds["new"], strict=True))
    sooner = sum(known < new for known, new in pairs)
    console.print(f"another's less new: {told([known - new for known, new in pairs])}; sooner in {sooner} of {rounds}")


async def flood(alice: Client, mallory: Client, rounds: int, console: Console) -> None:
    """Turns alone and beside a flood."""
    rng = random.Random(1)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for number in track(range(rounds + 1), "Flood", console=console):
        for flooded in (False, True):
            async with flooding(mallory, rng) if flooded else contextlib.nullcontext():
                times = [(await ask(alice, words(rng, PROMPT_TOKENS), 32)).seconds for _ in range(TURNS)]
            if number:
                seconds[flooded].append(statistics.mean(times))
    ratios = [beside / alone for alone, beside in zip(*seconds.values(), strict=True)]
    console.print(f"a turn of {PROMPT_TOKENS} words and 32 tokens alone: {told(seconds[False])}")
    console.print(f"beside {FLOOD} requests of another tenant: {told(seconds[True])}")
    low, middle, high = statistics.quantiles(ratios, n=4)
    console.print(f"{middle:.2f} times as long ({low:.2f}-{high:.2f}, at most {max(ratios):.2f})")


@contextlib.asynccontextmanager
async def flooding(client: Client, rng: random.Random) -> AsyncIterator[None]:
    """A tenant that has as many requests under way all the time as are computed at once, and sends another for each."""

    async def go_on() -> None:
        while True:
            await ask(client, words(rng, PROMPT_TOKENS), 48)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(go_on()) for _ in range(FLOOD)]
        await asyncio.sleep(2)  # until they are all there, and the first are answered
        yield
        for task in tasks:
            task.cancel()
    await asyncio.sleep(1)  # until the server has let go of them


def told(seconds: Sequence[float]) -> str:
    """The median and the quartiles."""
    low, middle, high = (value * 1e3 for value in statistics.quantiles(seconds, n=4))
    return f"{middle:.1f} ms ({low:.1f} to {high:.1f})"


async def run(endpoint: Endpoint, keys: Sequence[str], options: argparse.Namespace) -> None:
    console = Console(width=120)
    async with (
        Client(replace(endpoint, api_key=keys[0]), response_cache=True) as alice,
        Client(replace(endpoint, api_key=keys[1]), response_cache=True) as mallory,
    ):
        await known_prompts(alice, mallory, options.rounds, console)
        await flood(alice, mallory, options.floods, console)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--floods", type=int, default=8)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "keys.toml"
        keys = [add_key(file, tenant) for tenant in ("alice", "mallory")]
        with serving(DEFAULT_MODEL, "--api-keys-file", str(file), log="tenants") as endpoint:
            asyncio.run(run(endpoint, keys, options))


if __name__ == "__main__":
    main()
