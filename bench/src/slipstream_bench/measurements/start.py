"""What a server's start takes, and the memory that it has then: as it reports it, and as the system says.

    python -m slipstream_bench.measurements.start --model smollm2-135m

The server is started several times, asked one thing, and ended. The first start may measure and make what later ones
find; so the model is first started once without being counted. Last, the model is loaded by itself in a process, and
the anonymous memory that it takes is printed: the system takes pages of files back when it needs them.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
from rich.console import Console

from slipstream.backend.paged_model import PagedModel
from slipstream.backend.self_test import SELF_TEST_BLOCKS, Probe
from slipstream.models import DEFAULT_MODEL, ModelStore
from slipstream.processor import give_back_memory

_PROMPT = "word " * 60


@dataclass(frozen=True, slots=True)
class Start:
    """One start; memory in bytes."""

    seconds: float
    """Until it's ready."""
    processor_seconds: float
    reported: dict[str, int]
    """By part, after a prompt was answered."""
    resident: int
    """Then, as the system says."""


def main() -> None:
    """Print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    model = ModelStore().ensure(options.model)
    if options.alone:
        print(anonymous_bytes_of(model.path / "openvino_model.xml"))
        return
    start(model.name)
    starts = [start(model.name) for _ in range(options.rounds)]
    console = Console(width=120)
    seconds, processor = (
        statistics.median(getattr(each, name) for each in starts) for name in ("seconds", "processor_seconds")
    )
    console.print(f"{model.name}, {model.size / 2**20:,.0f} MiB on disk; load {os.getloadavg()[0]:.1f}")
    console.print(f"ready in {seconds:.1f} s, with {processor:.1f} s of processor time")
    last = starts[-1]
    parts = ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in last.reported.items())
    console.print(f"memory in MiB: {parts}; the system says {last.resident / 2**20:,.0f}")
    command = [sys.executable, "-m", "slipstream_bench.measurements.start", "--model", model.name, "--alone"]
    alone = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    console.print(f"the model by itself takes {int(alone) / 2**20:,.0f} MiB")


def start(model: str) -> Start:
    """Start a server, ask it something, and end it."""
    command = [sys.executable, "-m", "slipstream", "serve", "--model", model, "--port", "0"]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = next(found[0] for line in process.stdout if (found := re.findall(r"http://\S+", line)))
        seconds, processor = time.perf_counter() - began, _processor_seconds(process.pid)
        with httpx.Client(base_url=url, timeout=600) as http:
            body = {"model": model, "prompt": _PROMPT, "max_tokens": 1}
            http.post("/v1/completions", json=body).raise_for_status()
            reported = http.get("/health").raise_for_status().json()["memory"]
            resident = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    finally:
        process.terminate()
        process.wait()
    return Start(seconds, processor, reported, resident)


def anonymous_bytes_of(graph: Path) -> int:
    """What a model takes that is loaded and has run in this process."""
    before = _anonymous_bytes()
    model = PagedModel(graph)
    model.allocate(SELF_TEST_BLOCKS)
    probe = Probe(model, first_block=1)
    for size in (8, 64):
        probe.trial(size, 8)  # only then are weights in the order that kernels read
    model.give_back_files()
    give_back_memory()
    return _anonymous_bytes() - before


def _anonymous_bytes() -> int:
    (kilobytes,) = re.findall(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    return int(kilobytes) * 1024


def _processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
