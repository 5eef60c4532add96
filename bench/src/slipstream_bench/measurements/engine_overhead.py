"""What the engine's own Python takes in a step, host chooser included, over a backend that computes nothing.

    python -m slipstream_bench.measurements.engine_overhead

The stub's rows are noise with one likely token, the same after the same token, so that answers repeat themselves and
drafts come true. What the stub takes to make them is not counted.

With `--device-ms`, its steps take so long beside the host, as on a GPU, and pieces of answers go to an event loop on
another thread, as in a server. Then it's the median time between a step's end and the next launch: the device's idle
time.
"""

import argparse
import asyncio
import json
import queue
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table

from slipstream.backend import Blob, Chunk, Exported, StepCost, StepMeasurements
from slipstream.backend.paged_store import PagedState, PagedStore
from slipstream.engine import EngineCore, EngineRequest, Output, SamplingParams, as_prompt
from slipstream.models import DEFAULT_MODEL, ModelStore
from slipstream.sampling import Choice, Row, choose_on_host
from slipstream.tokenizer import Tokenizer
from slipstream.types import FloatArray, IntArray

SIZES = (8, 16, 32, 64, 128, 256, 512)
PERIOD = 40
"""Tokens after which answers repeat themselves."""


class NoBlocks:
    """Keys and values of nothing."""

    def copy_block(self, source: int, target: int) -> None:
        """Copy nothing."""

    def read_blocks(self, blocks: IntArray) -> Exported:
        """Zeros for each block."""
        return Exported.here(np.zeros((len(blocks), 1), np.uint16))

    def write_blocks(self, blocks: IntArray, contents: Blob) -> None:
        """Write nothing."""


class Stub:
    """A backend whose next token is the last one plus one, around a circle; `chooses` tells whether by itself."""

    fingerprint = "stub"
    exact = True
    largest_draft: int | None = 31

    def __init__(self, vocab_size: int, *, chooses: bool, num_blocks: int = 8192, seconds: float = 0.0) -> None:
        self.vocab_size = vocab_size
        self.chooses = chooses
        self.seconds_a_step = seconds
        self.seconds = 0.0
        """What all steps took."""
        self.ended: float | None = None
        """When the last step was over; None if the next is launched."""
        self.gaps: list[float] = []
        """Seconds between a step's end and the next launch."""
        self.cost = StepCost(StepMeasurements(tuple((size, 0.01 + size * 1e-4) for size in SIZES)))
        self.store = PagedStore(NoBlocks(), PagedState, num_blocks=num_blocks, block_size=32, block_bytes=32)
        rng = np.random.default_rng(0)
        self.noise = (2 * rng.normal(size=(64, vocab_size))).astype(np.float32)

    def launch(self, chunks: Sequence[Chunk]) -> "StubTicket":
        """Start a step."""
        if self.ended is not None:
            self.gaps.append(time.perf_counter() - self.ended)
            self.ended = None
        return StubTicket(self, chunks)


class StubTicket:
    """A step that is done at once, or so many seconds after its launch."""

    queued = False

    def __init__(self, backend: Stub, chunks: Sequence[Chunk]) -> None:
        self.backend = backend
        self._due = time.perf_counter() + backend.seconds_a_step
        self._chunks = chunks
        self._next: list[int] = []
        self._logits: FloatArray

    def wait(self, rows: Sequence[Row] = ()) -> list[Choice]:
        """Make the rows, and choose from them."""
        started = time.perf_counter()
        self._make()
        if self.backend.seconds_a_step:
            time.sleep(max(0.0, self._due - time.perf_counter()))
        self.backend.ended = time.perf_counter()
        self.backend.seconds += self.backend.ended - started
        return self.choose(rows)

    def _make(self) -> None:
        for chunk in self._chunks:
            chunk.state.length += len(chunk.tokens)
            self._next += [(token + 1) % PERIOD + 1000 for token in chunk.tokens[len(chunk.tokens) - chunk.rows :]]
        if not self.backend.chooses:
            noise = self.backend.noise
            self._logits = noise[np.arange(len(self._next)) % len(noise)]
            self._logits[np.arange(len(self._next)), self._next] = 16.0

    def choose(self, rows: Sequence[Row]) -> list[Choice]:
        """Choose the likely tokens, or let the host choose."""
        if self.backend.chooses:
            return [Choice(self._next[row.index]) for row in rows]
        return choose_on_host(self._logits, rows)


@dataclass(frozen=True)
class Case:
    """What runs at once."""

    name: str
    sequences: int
    params: dict[str, float]
    chooses: bool
    drafts: bool = False


CASES = [
    Case("64 sequences, greedy", 64, {"temperature": 0}, chooses=False),
    Case("64 sequences, temperature and top_p", 64, {"temperature": 0.8, "top_p": 0.95}, chooses=False),
    Case("64 sequences, temperature", 64, {"temperature": 0.8}, chooses=False),
    Case("64 sequences, backend chooses", 64, {"temperature": 0.8, "top_p": 0.95}, chooses=True),
    Case("8 drafting sequences, greedy", 8, {"temperature": 0}, chooses=False, drafts=True),
    Case("8 drafting sequences, backend chooses", 8, {"temperature": 0}, chooses=True, drafts=True),
]


def measure(
    case: Case, tokenizer: Tokenizer, tokens: int, vocab_size: int, seconds: float = 0.0
) -> tuple[float, float, float]:
    """Milliseconds of the engine's Python for each step, or between two; rows of a step; tokens that a step brings."""
    events = asyncio.new_event_loop()
    serving = threading.Thread(target=events.run_forever)
    serving.start()
    stub = Stub(vocab_size, chooses=case.chooses, seconds=seconds)
    core = EngineCore(stub, tokenizer, context_length=8192, stop_token_ids=frozenset({0}))
    ended: queue.SimpleQueue[Output] = queue.SimpleQueue()

    def sink(output: Output) -> None:
        if seconds:
            events.call_soon_threadsafe(json.dumps, {"choices": [{"index": 0, "delta": {"content": output.text}}]})
        if output.finish_reason:
            ended.put(output)

    def run(count: int) -> None:
        for index in range(case.sequences):
            prompt = as_prompt([5000 + index, *(1000 + at % PERIOD for at in range(200))])
            params = SamplingParams(max_tokens=count, seed=index, ignore_eos=True, **case.params)  # type: ignore[arg-type]
            request = EngineRequest(prompt=prompt, params=params, speculation=case.drafts, reuse=False)
            core.submit(request, sink)
        outputs = [ended.get() for _ in range(case.sequences)]
        assert all(output.error is None for output in outputs), outputs[0].error

    run(20)
    before, of_stub = core.stats(), stub.seconds
    run(tokens)
    core.shutdown()
    events.call_soon_threadsafe(events.stop)
    serving.join()
    events.close()
    after = core.stats()
    steps = after.steps - before.steps
    own = (after.busy_seconds - before.busy_seconds) - (stub.seconds - of_stub)
    rows = (after.tokens_forwarded - before.tokens_forwarded - 201 * case.sequences) / steps
    taken = statistics.median(stub.gaps) if seconds else own / steps
    return taken * 1e3, rows, tokens * case.sequences / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--vocabulary", type=int, default=49_152)
    parser.add_argument("--device-ms", type=float, default=0.0)
    options = parser.parse_args()
    tokenizer = Tokenizer.from_file(ModelStore().ensure(DEFAULT_MODEL).tokenizer_path)
    table = Table("what runs", "ms a step, median", "rounds", "rows a step", "tokens a step")
    for case in CASES:
        device = options.device_ms / 1e3
        found = [measure(case, tokenizer, options.tokens, options.vocabulary, device) for _ in range(options.rounds)]
        times = [each[0] for each in found]
        table.add_row(
            case.name,
            f"{statistics.median(times):.2f}",
            " ".join(f"{time:.2f}" for time in sorted(times)),
            f"{found[0][1]:.0f}",
            f"{found[0][2]:.1f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
