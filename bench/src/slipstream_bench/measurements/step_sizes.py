"""What it costs to keep to one step class: prompts and decoding in steps of all sizes, and in those of the class.

    python -m slipstream_bench.measurements.step_sizes

The same model, the same prompt, alternately; medians. Also whether the answers' logits are the same to the bit however
the prompt was cut, which is what the class is for.
"""

import argparse
import statistics
import time

import numpy as np
from rich.console import Console
from rich.table import Table

from slipstream.backend import Chunk
from slipstream.backend.openvino import OpenVINOBackend
from slipstream.backend.paged import PagedTicket
from slipstream.backend.paged_model import PagedModel
from slipstream.backend.self_test import OF_PROCESSORS
from slipstream.models import DEFAULT_MODEL, ModelStore
from slipstream.processor import this_processor

_DECODED = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--tokens", type=int, default=1024, help="length of the prompt")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    model = PagedModel(ModelStore().ensure(options.model).ir_path)
    backend = OpenVINOBackend(model, kv_memory=512 * 2**20)
    tokens = np.random.default_rng(0).integers(0, backend.vocab_size, options.tokens + _DECODED).astype(np.int32)
    state = backend.store.open(len(tokens))
    candidates = {"all sizes": OF_PROCESSORS, "one class": backend.step_class}
    prompts: dict[str, list[float]] = {name: [] for name in candidates}
    decoded: dict[str, list[float]] = {name: [] for name in candidates}
    differing: dict[str, int] = {}

    def compute(count: int) -> PagedTicket:
        ticket = backend.launch([Chunk(state, tokens[state.length : state.length + count], 1)])
        ticket.wait()
        return ticket

    def prompt(chunk: int) -> bytes:
        backend.store.rewind(state, 0)
        while (left := options.tokens - state.length) > 0:
            ticket = compute(min(chunk, left))
        return bytes(ticket.logits[-1].tobytes())

    for round_number in range(options.rounds + 1):  # the first prepares the sizes
        for name, step_class in candidates.items():
            backend.step_class = step_class
            started = time.perf_counter()
            prompt(step_class.sizes[-1])
            after = time.perf_counter()
            for _ in range(_DECODED):
                compute(1)
            if round_number:
                prompts[name].append(options.tokens / (after - started))
                decoded[name].append((time.perf_counter() - after) / _DECODED)
    for name, step_class in candidates.items():
        backend.step_class = step_class
        differing[name] = sum(prompt(chunk) != prompt(step_class.sizes[-1]) for chunk in (17, 33, 64, 100, 200))

    console = Console()
    processor = this_processor()
    console.print(f"{processor.name} ({', '.join(processor.instruction_sets)}), {backend.model.threads} threads")
    table_out = Table("steps", "sizes", "prompt, tokens/s", "decoding, ms", "of 5 cuts, other bits")
    for name, step_class in candidates.items():
        table_out.add_row(
            name,
            f"{step_class.sizes[0]} to {step_class.sizes[-1]}",
            f"{statistics.median(prompts[name]):,.0f}",
            f"{statistics.median(decoded[name]) * 1e3:.1f}",
            str(differing[name]),
        )
    console.print(table_out)


if __name__ == "__main__":
    main()
