"""A step as the engine sees it."""

from collections.abc import Iterable
from dataclasses import dataclass

from slipstream.backend import Ticket
from slipstream.engine.scheduler import Work
from slipstream.sampling import Row


@dataclass(frozen=True, slots=True)
class Step:
    """A step under way."""

    work: list[Work]
    ticket: Ticket
    tokens: int
    started: float
    """When it was launched, a `perf_counter` time."""


def early_rows(work: Iterable[Work]) -> list[Row]:
    """The rows of a step whose choice can be made at once, with their masks."""
    rows: list[Row] = []
    for item in work:
        if item.chooses:
            try:
                rows += item.active.early_rows(item.draft, item.first)
            except Exception as error:
                item.error = error
    return rows
