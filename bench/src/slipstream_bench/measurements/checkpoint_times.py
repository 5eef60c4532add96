"""The time of turns with the states that Slipstream keeps along a sequence, and with that at its end alone.

    python -m slipstream_bench.measurements.checkpoint_times model.gguf

For models with recurrent states. A long first prompt, a turn that goes on from its answer, and one with an edit in
the middle of the first prompt, each with a short answer: alternately with states at intervals and marks, and without.
`--message` is how many tokens apart control tokens stand, which are marks; 0 for none. Drafts are off, since they keep
states of their own.
"""

import argparse
import os
import random
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from slipstream.backend import Chunk, Ticket
from slipstream.backend.paged import PagedBackend
from slipstream.config import EngineConfig
from slipstream.engine import EngineCore, EngineRequest, Output, SamplingParams, as_prompt
from slipstream.models import Model, ModelStore
from slipstream.processor import this_processor
from slipstream.runtime import BACKENDS
from slipstream.tokenizer import Tokenizer

KINDS = ("a long first prompt", "the next turn", "an edit in the middle")
ADDED = 60
"""Tokens of the next turn's message, and of the edit."""
ANSWER = 16
_MEMORY = 512 * 2**20


class WithoutStates:
    """A backend that keeps the state at the end of a sequence and none before."""

    def __init__(self, backend: PagedBackend[Any], num_blocks: int) -> None:
        self._backend = backend
        interval, backend.checkpoint_interval = backend.checkpoint_interval, 2**20
        self.store = backend.new_store(num_blocks)
        backend.checkpoint_interval = interval

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def launch(self, chunks: Sequence[Chunk]) -> Ticket:
        """Start a step without marks."""
        return self._backend.launch([replace(chunk, marks=()) for chunk in chunks])


class WithStates(WithoutStates):
    """A backend as it is, with a store of its own."""

    def __init__(self, backend: PagedBackend[Any], num_blocks: int) -> None:
        self._backend = backend
        self.store = backend.new_store(num_blocks)

    def launch(self, chunks: Sequence[Chunk]) -> Ticket:
        """Start a step."""
        return self._backend.launch(chunks)


def turns(
    backend: WithoutStates, model: Model, tokenizer: Tokenizer, prompt: int, message: int, seed: int
) -> list[tuple[float, int]]:
    """The seconds of each kind of turn, and the tokens of its prompt that it computed; memory is empty before."""
    rng = random.Random(seed)
    known = range(min(backend.vocab_size, 40_000))
    plain = [token for token in known if not tokenizer.is_control(token)]
    control = next(token for token in known if tokenizer.is_control(token))

    def tokens(count: int) -> list[int]:
        return [control if message and at % message == 0 else rng.choice(plain) for at in range(count)]

    core = EngineCore(
        backend,
        tokenizer,
        context_length=2 * prompt,
        stop_token_ids=frozenset(model.manifest.stop_token_ids),
    )
    found = []

    def ask(asked: list[int]) -> list[int]:
        done: Future[Output] = Future()
        answer: list[int] = []

        def sink(output: Output) -> None:
            answer.extend(output.token_ids)
            if output.finish_reason is not None:
                done.set_result(output)

        params = SamplingParams(max_tokens=ANSWER, temperature=0.0, ignore_eos=True)
        started = time.perf_counter()
        core.submit(EngineRequest(prompt=as_prompt(asked), params=params, speculation=False), sink)
        output = done.result()
        seconds = time.perf_counter() - started
        assert output.error is None, output.error
        assert output.counters is not None
        found.append((seconds, len(asked) - output.counters.reused_tokens))
        return answer

    first = tokens(prompt)
    answer = ask(first)
    ask([*first, *answer, *tokens(ADDED)])
    ask([*first[: prompt // 2], *tokens(ADDED), *first[prompt // 2 + ADDED :]])
    core.shutdown()
    return found


def main() -> None:
    """Print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--prompt", type=int, default=1500, help="tokens of the first prompt")
    parser.add_argument("--message", type=int, default=90, help="tokens of a message; 0 for a prompt of one")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    model, console = ModelStore().ensure(str(options.path)), Console(width=120)
    config = EngineConfig.model_validate({"kv_memory": _MEMORY})
    backend = BACKENDS[model.weights](model, config)(lambda _: None)
    assert isinstance(backend, PagedBackend)
    assert backend.checkpoint_interval, "the model has no recurrent states"
    tokenizer = Tokenizer.from_file(model.tokenizer_path)
    blocks = backend.store.capacity // 32
    with_states, without = WithStates(backend, blocks), WithoutStates(backend, blocks)
    measured: dict[bool, list[list[tuple[float, int]]]] = {True: [], False: []}
    for number in range(-1, options.rounds):  # the first round warms up
        for kept, each in ((True, with_states), (False, without)):
            found = turns(each, model, tokenizer, options.prompt, options.message, number)
            if number >= 0:
                measured[kept].append(found)
    table = Table("turn", "with states", "computed", "without", "computed")
    for at, kind in enumerate(KINDS):
        cells = []
        for kept in (True, False):
            seconds = [found[at][0] for found in measured[kept]]
            cells += [
                f"{statistics.median(seconds) * 1e3:.0f} ms ({min(seconds) * 1e3:.0f} to {max(seconds) * 1e3:.0f})",
                str(measured[kept][0][at][1]),
            ]
        table.add_row(kind, *cells)
    console.print(table)
    console.print(
        f"{options.rounds} rounds; a state every {backend.checkpoint_interval} tokens, "
        f"{backend.cost.measured.per_state * 1e3:.2f} ms to write one; {this_processor().name}, "
        f"load {os.getloadavg()[0]:.1f}"
    )


if __name__ == "__main__":
    main()
