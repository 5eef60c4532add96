"""Memory of keys and values where some layers have sliding windows: with tables of their own, and with one for all.

    python -m slipstream_bench.measurements.windows MODEL --tokens 32768

Each is measured in a process of its own, which computes so many tokens of one conversation.
"""

import argparse
import multiprocessing
import os
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np

from slipstream.backend import Chunk, paged_model, tables
from slipstream.backend.openvino import OpenVINOBackend
from slipstream.models import ModelStore

_CHUNK = 512


def main() -> None:
    """Print what each takes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--kv-memory", type=int, default=4096, help="in MiB")
    options = parser.parse_args()
    model = ModelStore().ensure(options.model)
    for one_table in (True, False):
        arguments = model.ir_path, options.tokens, options.kv_memory * 2**20, one_table
        process = multiprocessing.get_context("spawn").Process(target=measure, args=arguments)
        process.start()
        process.join()


def measure(graph: Path, tokens: int, kv_memory: int, one_table: bool) -> None:
    """Compute a conversation, and print what its keys and values take."""
    with (
        patch.object(paged_model, "can_be_lowered", lambda _: False),
        patch.object(paged_model, "set_apart", (lambda _: None) if one_table else tables.set_apart),
    ):
        model = paged_model.PagedModel(graph)
    backend = OpenVINOBackend(model, kv_memory=kv_memory)
    store, text = backend.store, np.random.default_rng(0).integers(17, 40_000, tokens).astype(np.int32)
    state, resident, started = store.open(tokens), _resident(), time.process_time()
    while state.length < tokens:
        backend.launch([Chunk(state, text[state.length : state.length + _CHUNK], 1)]).wait()
    seconds, resident = time.process_time() - started, _resident() - resident
    store.trim(state)
    held = store.held([state]) * store.bytes_per_token
    kind = "one table" if one_table else f"{1 + model.window_tables} tables"
    print(
        f"{kind}: {tokens:,} tokens in {seconds:.0f} s of processor time; "
        f"resident {resident / 2**20:,.1f} MiB more, held at the end {held / 2**20:,.1f} MiB; "
        f"{kv_memory / 2**20:,.0f} MiB hold {store.capacity:,} tokens",
        flush=True,
    )


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
