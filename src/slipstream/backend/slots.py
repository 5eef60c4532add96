"""Where a step finds recurrent states and where it leaves them, as the runtime's operators take it.

A slot holds the recurrent state of a sequence after some of its tokens, in all layers. A chunk reads one slot and
writes others: along the way and at its end. What it has to write but nobody wants goes to scratch slots.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Protocol

import numpy as np

from slipstream.backend.store import Blob
from slipstream.types import IntArray

EMPTY_SLOT = 0
"""The state of no tokens, all zeros; never written."""
SCRATCH_SLOTS = 32
"""Slots from 1 on for states that nobody wants. The operators write no slot twice in a step."""
CARRIED_SLOTS = (1 + SCRATCH_SLOTS, 2 + SCRATCH_SLOTS)
"""For the state of a chunk that is cut between two steps, in turns: one may be read while the other is written. The
operators read no slot that the step writes, unless it's the sequence's own and the first that it writes."""
FIRST_SLOT = 1 + CARRIED_SLOTS[-1]
MOST_UNWANTED = SCRATCH_SLOTS // 2
"""States that a chunk may write for nobody in one step, so that others are written at odd places."""


class SlotStates(Protocol):
    """The memory of recurrent states, by slot."""

    slot_bytes: int
    """Memory that a slot takes, in all layers."""

    def allocate(self, num_slots: int) -> None:
        """Have so many slots, all zero, in place of those before."""
        ...

    def copy(self, source: int, target: int) -> None:
        """Copy a slot's content to another."""
        ...

    def read(self, slot: int) -> Blob:
        """A copy of what a slot holds, [words]."""
        ...

    def write(self, slot: int, content: Blob) -> None:
        """Fill a slot with what `read` gave."""
        ...


@dataclass(frozen=True, slots=True)
class Slots:
    """The slots of a chunk.

    `source` holds the state before it. `kept` are pairs of a length of the sequence and the slot for its state then,
    rising; the last is the chunk's end.
    """

    source: int
    kept: tuple[tuple[int, int], ...]

    def cut(self, length: int, carried: int) -> tuple["Slots", "Slots"]:
        """Those of the part up to a length of the sequence, and of the rest, which reads what the first one leaves.

        That's the slot `carried`, unless the state at that length is kept.
        """
        first = tuple(each for each in self.kept if each[0] <= length)
        rest = self.kept[len(first) :]
        if not first or first[-1][0] < length:
            first = (*first, (length, carried))
        return Slots(self.source, first), Slots(first[-1][1], rest)


@dataclass(frozen=True, slots=True)
class Writes:
    """The states that a chunk writes: where the operators begin to count, after how many tokens each, and which."""

    offset: int
    interval: int
    slots: tuple[int | None, ...]
    """None for those that nobody wants."""

    @property
    def unwanted(self) -> int:
        """How many scratch slots it takes."""
        return self.slots.count(None)


def writes(past: int, size: int, kept: Sequence[tuple[int, int]]) -> Writes:
    """What a chunk of `size` tokens after `past` has to write so that `kept` are.

    The operators write at equal intervals and at the end. So states at odd places may take many writes.
    """
    slots = {length - past: slot for length, slot in kept}
    inner = [place for place in slots if place < size]
    interval = size + 1
    if len(inner) > 1:
        interval = gcd(*(later - inner[0] for later in inner[1:]))
    offset = -inner[0] % interval if inner else 0
    places = [*range(interval - offset, size, interval), size]
    return Writes(offset, interval, tuple(slots.get(place) for place in places))


def fit_one_step(past: int, lengths: Iterable[int]) -> bool:
    """Whether a step after `past` tokens may leave the states at these lengths, of which the last is its end."""
    kept = [(length, EMPTY_SLOT) for length in sorted(lengths)]
    return writes(past, kept[-1][0] - past, kept).unwanted <= MOST_UNWANTED


def slot_inputs(chunks: Sequence[tuple[int, int, Slots | None]]) -> dict[str, IntArray]:
    """The inputs of a step, by name, for chunks of which each has `past`, `size` and slots.

    A chunk without slots begins from nothing and leaves nothing.
    """
    scratch = iter(range(1, 1 + SCRATCH_SLOTS))
    tables, plans = [], []
    for past, size, slots in chunks:
        plan = writes(past, size, slots.kept if slots else ())
        plans.append(plan)
        source = slots.source if slots else EMPTY_SLOT
        tables.append([source, *(next(scratch) if slot is None else slot for slot in plan.slots)])
    return {
        "la.block_indices": np.array([slot for table in tables for slot in table], np.int32),
        "la.block_indices_begins": np.cumsum([0, *map(len, tables)], dtype=np.int32),
        "la.past_lens": np.array([plan.offset for plan in plans], np.int32),
        "la.cache_interval": np.array([plan.interval for plan in plans], np.int32),
    }
