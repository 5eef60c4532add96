"""A step as the engine sees it: what each request has of it."""

from collections.abc import Iterable
from dataclasses import dataclass

from slipstream.backend import Ticket
from slipstream.engine.scheduler import Work
from slipstream.sampling import Row


class Part:
    """A request's part of a step, whose rows begin with the step's row `first`."""

    __slots__ = ("computed", "error", "first", "item", "sequence")

    def __init__(self, item: Work, first: int) -> None:
        assert item.active.sequence is not None
        self.item = item
        self.sequence = item.active.sequence
        self.computed = self.sequence.computed + item.count
        """How many tokens are computed after the step, without the draft."""
        self.first = first
        self.error: Exception | None = None
        """What went wrong while rows were asked for, such as a grammar that met a limit."""


@dataclass(frozen=True, slots=True)
class Step:
    """A step under way."""

    parts: list[Part]
    ticket: Ticket
    tokens: int
    started: float
    """When it was launched, a `perf_counter` time."""


def parts_of(work: Iterable[Work]) -> list[Part]:
    """The parts of a step that is about to be launched."""
    parts, first = [], 0
    for item in work:
        parts.append(Part(item, first))
        first += item.rows
    return parts


def early_rows(parts: Iterable[Part]) -> list[Row]:
    """The rows of a step whose choice can be made at once, with their masks."""
    rows: list[Row] = []
    for part in parts:
        if part.item.chooses:
            try:
                rows += part.item.active.early_rows(part.item.draft, part.first)
            except Exception as error:
                part.error = error
    return rows
