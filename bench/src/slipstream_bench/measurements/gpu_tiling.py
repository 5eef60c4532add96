"""Products in other tiles than those that are used: what they take on a GPU, relative to these.

    python -m slipstream_bench.measurements.gpu_tiling --out tiling.json

Times are the device's, over the shapes of `gpu_check`, with whole weights and with those of 4 bits. A tiling that suits
the device better becomes the default of `Tiling`. `--device cpu` shows that it works: with kernels in Triton's
interpreter (`TRITON_INTERPRET=1`), and tiny sizes.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from slipstream.backend.torch.held import Tiling
from slipstream.backend.torch.kernel_operators import KernelOperators
from slipstream.backend.torch.operators import Tensor
from slipstream.backend.torch.quantised import Quantised
from slipstream_bench.gpu_device import FULL, TINY, Device
from slipstream_bench.gpu_operators import quantised

_SHAPES = 4
"""Those of the largest model: kernels are compiled for each tiling and shape."""
_PACKED = ", 4 bits"
"""Such weights are called so."""
_CHANGES = (
    *({"stages": stages, "staged_bytes": 200 << 10} for stages in (2, 3, 4, 6, 8)),
    *({"programs": programs} for programs in (128, 192, 384, 512, 1024)),
    *({"part": part} for part in (256, 1024, 2048)),
    {"block_n": 128},
    {"block_n": 128, "programs": 128},
    {"block_k": 128, "quantised_k": 256},
    {"block_k": 32, "quantised_k": 64},
)
_USED = "as it is"


@dataclass
class Timed:
    """A tiling's products with one weight."""

    weight: str
    tiling: str
    ms: dict[str, float]
    """By rows; empty if the device has no room for its tiles."""
    floor_ms: float


def run(device: Device) -> Iterator[Timed]:
    """Each tiling's products with each weight, until time is up."""
    x: dict[int, Tensor] = {}
    weights: dict[str, list[Tensor] | list[Quantised]] = {}
    for case, (n, k) in [*device.sizes.shapes.items()][:_SHAPES]:
        x[k] = device.random(device.sizes.timed_rows[-1], k)
        whole = device.random(n, k) * 0.02
        make = partial(quantised, "int4", whole)
        weights[case] = device.several(whole, whole.clone)
        weights[f"{case}{_PACKED}"] = device.several(make(), make)
    tilings = {_USED: Tiling()} | {
        ", ".join(f"{name} {value}" for name, value in each.items()): replace(Tiling(), **each) for each in _CHANGES
    }
    for name, tiling in tilings.items():
        product = KernelOperators(tiling).linear
        for weight, copies in weights.items():
            if not device.timely:
                return
            timed = Timed(weight, name, {}, device.floor(copies[0].nbytes))
            try:
                for rows in (device.sizes.timed_rows[0], device.sizes.timed_rows[-1]):
                    works = [partial(product, x[each.shape[1]][:rows], each) for each in copies]
                    timed.ms[str(rows)] = device.device_ms(works)
            except Exception as error:  # Triton's own, for one
                print(f"{weight}, {name}: {error}", file=sys.stderr)
            yield timed


def print_table(timed: list[Timed]) -> None:
    """By tiling and rows, how many times as long products took as they do now: the geometric mean, and the extremes."""
    used = {each.weight: each.ms for each in timed if each.tiling == _USED}
    counts = list(dict.fromkeys(rows for ms in used.values() for rows in ms))
    table = Table(title="times as long, by rows: geometric mean (least to most)")
    for column in ("tiling", "weights", *counts):
        table.add_column(column)
    for tiling in dict.fromkeys(each.tiling for each in timed):
        for packed in (False, True):
            cells = []
            for rows in counts:
                found = [
                    each.ms[rows] / used[each.weight][rows]
                    for each in timed
                    if each.tiling == tiling and rows in each.ms and each.weight.endswith(_PACKED) == packed
                ]
                mean = math.exp(sum(map(math.log, found)) / len(found)) if found else math.nan
                cells.append(f"{mean:.2f} ({min(found):.2f} to {max(found):.2f})" if found else "")
            table.add_row(tiling, "4 bits" if packed else "whole", *cells)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def main() -> None:
    """Time tilings, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seconds", type=float, default=480, help="after which nothing more is timed")
    parser.add_argument("--out", type=Path, default=Path("bench-results/gpu-tiling.json"))
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        sys.exit(f"there is no GPU that torch {torch.__version__} can use, so there is nothing to time")
    device = Device(torch.device(options.device), FULL if on_gpu else TINY, options.seconds)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    timed: list[Timed] = []
    with torch.inference_mode():
        for each in run(device):
            timed.append(each)
            print(f"{each.weight}, {each.tiling}: {each.ms}, floor {each.floor_ms}", file=sys.stderr)
            report = {"machine": device.machine, "results": [asdict(done) for done in timed]}
            options.out.write_text(json.dumps(report, indent=2) + "\n")
    print_table(timed)


if __name__ == "__main__":
    main()
