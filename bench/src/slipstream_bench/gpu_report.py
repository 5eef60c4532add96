"""What `make gpu-check` found, as one table."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

_WIDTH = 160


@dataclass
class Result:
    """One row of the table."""

    part: str
    case: str
    choice: str
    exact: bool | None = None
    """Whether bits were the same for all rows, cuts and neighbours that were tried."""
    note: str = ""
    ms: dict[str, float] = field(default_factory=dict)
    """By number of tokens; of agents' turns, their median and what of a step is whose."""
    floor_ms: float | None = None
    """What reading the weights, or keys and values, takes at the bandwidth of a copy."""


def print_table(machine: dict[str, Any], results: Sequence[Result], before: Sequence[dict[str, Any]]) -> None:
    """All results; beside a time, how many times as long it took at the last run that was kept."""
    last = {(each["part"], each["case"], each["choice"]): each["ms"] for each in before}
    title = f"{machine['device']}, {machine['gb_per_second']} GB/s, torch {machine['torch']}"
    table = Table(title=title if machine["gpu"] else f"{title}. Not a GPU: tiny sizes, no measurement")
    for column in ("part", "case", "choice", "exact", "ms", "floor ms", "note"):
        table.add_column(column)
    for result in results:
        then = last.get((result.part, result.case, result.choice), {})
        times = [
            f"{tokens}: {ms:.3g}" + (f" (x{ms / then[tokens]:.2f})" if then.get(tokens) else "")
            for tokens, ms in result.ms.items()
        ]
        floor = "" if result.floor_ms is None else f"{result.floor_ms:.3g}"
        exact = {True: "yes", False: "no", None: ""}[result.exact]
        table.add_row(result.part, result.case, result.choice, exact, ", ".join(times), floor, result.note)
    # Where it isn't a terminal that says how wide it is, the table would have columns of a few letters.
    Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else _WIDTH).print(table)
