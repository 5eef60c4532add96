"""Tokens that turns compute on a model with recurrent states, with an edit, a fork and an answer again.

    python -m slipstream_bench.measurements.checkpoints model.gguf

20 turns of one conversation. In turn 8 the message of turn 5 is another; in turn 12 a second agent goes on from turn 6;
in turn 16 the turn before is answered again. What is new is counted with the tokenizer: the tokens of a prompt behind
what it has in common with any prompt before and its answer. llama-server is asked with the same file, as it is and with
checkpoints as close as it makes them. Then what states take in memory.
"""

import argparse
import asyncio
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from slipstream.backend.hybrid_store import MARKS, HybridStore
from slipstream.backend.paged import PagedBackend
from slipstream.backend.steps import BLOCK_SIZE
from slipstream.config import EngineConfig
from slipstream.models import Model, ModelStore
from slipstream.runtime import BACKENDS, chat_template
from slipstream.tokenizer import Tokenizer
from slipstream_bench.client import Client
from slipstream_bench.peers.base import Endpoint, bench_home
from slipstream_bench.peers.llama_server import LlamaServer
from slipstream_bench.peers.process import free_port, server_process
from slipstream_bench.peers.slipstream import serving

EDIT, FORK, AGAIN, TURNS = 8, 12, 16, 20
ANSWER = 16
"""Tokens of an answer."""
CLOSE = ("--checkpoint-min-step", "0", "--ctx-checkpoints", "256")
_MEMORY = 512 * 2**20
_SYLLABLES = ("ba", "de", "fi", "go", "hu", "ka", "le", "mi", "no", "pu", "ra", "se")
"""Tokens of any vocabulary, so that answers that are made of them come back as they were."""

Messages = list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Turn:
    """A turn's prompt, what of it was new, and what a server computed."""

    prompt: int
    new: int
    computed: int
    seconds: float


class Counter:
    """What is new in prompts, by their tokens."""

    def __init__(self, model: Model) -> None:
        self.tokenizer = Tokenizer.from_file(model.tokenizer_path)
        template = chat_template(model, self.tokenizer)
        assert template is not None
        self._template = template
        self._known: list[list[int]] = []

    def new(self, messages: Messages) -> tuple[int, int]:
        """The tokens of a prompt, and of these those that no prompt and answer before began with."""
        tokens = list(self.tokenizer.encode(self._template.render(messages)))
        return len(tokens), len(tokens) - max((_common(tokens, known) for known in self._known), default=0)

    def answered(self, messages: Messages, answer: str) -> None:
        """Know a prompt, and its answer."""
        prompt = list(self.tokenizer.encode(self._template.render(messages)))
        self._known.append([*prompt, *self.tokenizer.encode(answer, begins=False)])


def _common(first: list[int], second: list[int]) -> int:
    return next(
        (place for place, (a, b) in enumerate(zip(first, second, strict=False)) if a != b),
        min(len(first), len(second)),
    )


async def converse(endpoint: Endpoint, model: Model) -> list[Turn]:
    """The conversation, with one server."""
    rng, counter = random.Random(0), Counter(model)
    bias = {str(counter.tokenizer.encode(text, begins=False)[0]): 100 for text in _SYLLABLES}
    options = {"temperature": 0, "max_tokens": ANSWER, "logit_bias": bias}
    messages: Messages = [{"role": "system", "content": _text(rng, 120)}]
    kept: dict[int, Messages] = {}
    turns = []
    async with Client(endpoint, response_cache=False) as client:
        for number in range(1, TURNS + 1):
            if number == EDIT:
                messages = kept[5][:-1]
            elif number == FORK:
                messages, other = kept[7][:-1], messages
            elif number == FORK + 1:
                messages = other
            question = {"role": "user", "content": _text(rng, 30)}
            messages = kept[AGAIN - 1] if number == AGAIN else [*messages, question]
            kept[number] = messages
            prompt, new = counter.new(messages)
            stream = await client.ask({"messages": messages, **options})
            computed = _computed(stream.report, stream.cached_tokens, stream.usage)
            turns.append(Turn(prompt, new, computed, stream.seconds))
            counter.answered(messages, stream.answer.text)
            messages = [*messages, {"role": "assistant", "content": stream.answer.text}]
    return turns


def _computed(report: dict[str, Any] | None, cached: int | None, usage: dict[str, Any]) -> int:
    if report is not None:
        return int(report["delta_tokens"])
    assert cached is not None
    return int(usage["prompt_tokens"]) - cached


def _text(rng: random.Random, syllables: int) -> str:
    return "".join(rng.choice(_SYLLABLES) for _ in range(syllables))


@contextmanager
def llama_server(path: Path, model: Model, *options: str) -> Iterator[Endpoint]:
    """llama-server with a file, on a free port."""
    port, peer = free_port(), LlamaServer(model)
    command = [str(peer.binaries / "llama-server"), "-m", str(path), "--host", "127.0.0.1", "--port", str(port)]
    log = bench_home() / "checkpoints-llama-server.log"
    with server_process([*command, *options], f"http://127.0.0.1:{port}/health", log) as group:
        yield Endpoint(f"http://127.0.0.1:{port}/v1", model.name, group, "")


def memory(model: Model, console: Console) -> int:
    """Print what states take, and return the interval."""
    config = EngineConfig.model_validate({"kv_memory": _MEMORY})
    backend = BACKENDS[model.weights](model, config)(lambda _: None)
    assert isinstance(backend, PagedBackend)
    store, slots = backend.store, backend.model.states
    assert isinstance(store, HybridStore), "the model has no recurrent states"
    assert slots is not None
    token = backend.model.block_bytes / BLOCK_SIZE
    states = 10_000 // store.interval
    console.print(
        f"a state: {slots.slot_bytes / 1024:,.0f} KiB, the keys and values of "
        f"{slots.slot_bytes / token:.0f} tokens; one every {store.interval} tokens, which take "
        f"{store.interval * backend.cost.token(0):.2f} s to compute again"
    )
    console.print(
        f"10,000 tokens: keys and values {10_000 * token / 2**20:.1f} MiB, {states} states at intervals "
        f"{states * slots.slot_bytes / 2**20:.1f} MiB, {MARKS} at marks {MARKS * slots.slot_bytes / 2**20:.2f} MiB"
    )
    return store.interval


def main() -> None:
    """Print turns, totals and memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    options = parser.parse_args()
    model, console = ModelStore().ensure(str(options.path)), Console(width=120)
    interval = memory(model, console)
    with serving(model.name, "--kv-memory", str(_MEMORY), log="checkpoints") as endpoint:
        ours = asyncio.run(converse(endpoint, model))
    with llama_server(options.path, model) as endpoint:
        theirs = asyncio.run(converse(endpoint, model))
    with llama_server(options.path, model, *CLOSE) as endpoint:
        close = asyncio.run(converse(endpoint, model))
    table = Table("turn", "prompt", "new", "Slipstream", "new", "llama-server", "new", "with close checkpoints")
    for number, (a, b, c) in enumerate(zip(ours, theirs, close, strict=True), start=1):
        table.add_row(*map(str, (number, a.prompt, a.new, a.computed, b.new, b.computed, c.new, c.computed)))
    totals = [
        [sum(getattr(turn, name) for turn in turns) for name in ("new", "computed")] for turns in (ours, theirs, close)
    ]
    table.add_row("all", str(sum(turn.prompt for turn in ours)), *(str(each) for pair in totals for each in pair))
    console.print(table)
    console.print(f"load {os.getloadavg()[0]:.1f}")
    assert all(turn.computed <= turn.new + interval for turn in ours), "a turn computed more than what is new"


if __name__ == "__main__":
    main()
