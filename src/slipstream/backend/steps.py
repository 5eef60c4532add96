"""The shape of a step: which sizes a forward pass may have, and how chunks of sequences are laid out in one."""

import bisect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, cycle
from typing import Protocol

import numpy as np
import numpy.typing as npt

from slipstream.backend.logits import JoinedLogits, Logits
from slipstream.backend.paged_store import Blocks
from slipstream.backend.slots import CARRIED_SLOTS, MOST_UNWANTED, SCRATCH_SLOTS, Slots, SlotStates, slot_inputs, writes
from slipstream.sampling import Choice, Row
from slipstream.types import FloatArray, IntArray

BLOCK_SIZE = 32
"""KV slots per block: what OpenVINO's paged attention kernel for CPUs is written for."""

SCRATCH_BLOCK = 0
"""Takes the KV of padding tokens; its content is never read by a real token."""
ZERO_BLOCK = 1
"""Of a model with layers that have tables of their own: never written. These name it for blocks that no token of a step
sees: the kernel reads them, for nothing, but what isn't a number would spread."""

LONE_TOKEN_SIZE = 2
"""A chunk of one token takes another attention kernel than longer ones and gives other logits, so it gets a dummy
second token: its KV slot is overwritten later, and its logits are not read."""

StepInputs = dict[str, npt.NDArray[np.int32 | np.int64]]
"""A step as the model takes it, by name."""


@dataclass(frozen=True, slots=True)
class PagedChunk:
    """The part of one sequence that a step computes: `tokens` int32 [n], n >= 1, of which the last `rows` give logits.

    `past` tokens come before. `block_table` int32 names the blocks in order and has room for one token more, whose slot
    may be overwritten.
    """

    tokens: IntArray
    past: int
    block_table: IntArray
    rows: int
    slots: Slots | None = None
    """Where its recurrent states are; None if it has none, or they don't matter."""
    windows: IntArray | None = None
    """The tables of layers with sliding windows, int32 [blocks, tables], 0 for blocks that none of it sees; if None,
    `block_table` stands for all tables, see `pieces`."""


class Runner(Blocks, Protocol):
    """A model that runs steps of any shape over KV blocks."""

    vocab_size: int
    candidates: "StepClass"
    """The sizes of steps and counts of logit rows that are worth a trial; all are used if no class is exact."""
    window_tables: int
    """How many block tables layers with sliding windows have besides the one of the others; 0 if they share that."""
    queues: bool
    """Whether it does one thing after the other, steps and copies, so that the host need not wait in between."""

    @property
    def states(self) -> SlotStates | None:
        """The memory of recurrent states; None if it has none."""
        ...

    def start(self, inputs: StepInputs) -> None:
        """Start a step; one at a time, unless it `queues` them."""
        ...

    def finish(self) -> Logits:
        """Wait for the first step under way; its rows of logits, valid until the next is started.

        If it `queues` steps, who reads the logits waits.
        """
        ...


@dataclass(frozen=True, slots=True)
class StepClass:
    """Step sizes and counts of logit rows among which no token's bits depend on the one that its step had.

    A matrix product chooses its kernel, and with it the order of its sums, by the number of rows. So the same token
    can come out differently in a step of 64 tokens than in one of 96. Steps of one class all give the same bits: tokens
    are padded to one of `sizes`, logit rows to one of `row_counts`, both rising; what exceeds them takes several steps.
    """

    sizes: tuple[int, ...]
    row_counts: tuple[int, ...]

    def run(self, runner: Runner, chunks: Sequence[PagedChunk]) -> FloatArray:
        """Compute the chunks; float32 logits [sum of rows, vocab_size] in order, valid until the next run."""
        return self.start(runner, chunks)(())[0].host()[: sum(chunk.rows for chunk in chunks)]

    def start(
        self,
        runner: Runner,
        chunks: Sequence[PagedChunk],
        done: Callable[[list[PagedChunk]], object] = lambda _: None,
    ) -> Callable[[Sequence[Row]], tuple[Logits, list[Choice]]]:
        """Start to compute the chunks; what it returns waits for the logits, and runs further steps if need be.

        It's called with rows to choose from. There may be more rows of logits than the chunks ask for, at the end.
        `done` is called after each step with what it computed.
        """
        steps = list(self.cut(chunks))
        recurrent, windows = runner.states is not None, runner.window_tables
        first, *others = (self.lay_out(step, recurrent=recurrent, windows=windows) for step in steps)
        runner.start(first[0])
        at_once = runner.queues and not any(chunk.rows for chunk in chunks)
        for inputs, _ in others if at_once else ():
            runner.start(inputs)

        def finish(rows: Sequence[Row]) -> tuple[Logits, list[Choice]]:
            found, counts = [runner.finish()], [first[1]]
            for step, (inputs, wanted) in zip(steps, others, strict=False):
                done(step)
                found[-1] = found[-1].kept(counts[-1])
                if not at_once:
                    runner.start(inputs)
                found.append(runner.finish())
                counts.append(wanted)
            logits = found[0] if len(found) == 1 else JoinedLogits(found, counts)
            choices = logits.choose(rows)  # a device begins with it right after the step
            done(steps[-1])
            return logits, choices

        return finish

    def cut(self, chunks: Sequence[PagedChunk]) -> Iterator[list[PagedChunk]]:
        """The chunks, cut into as few steps of the class as their order allows; rows of logits keep their order."""
        current: list[PagedChunk] = []
        carried = cycle(CARRIED_SLOTS)
        size_left, rows_left, scratch_left = self._room
        for chunk in chunks:
            rest: PagedChunk | None = chunk
            while rest is not None:
                silent = len(rest.tokens) - rest.rows
                count = _writable(rest, min(len(rest.tokens), size_left, silent + rows_left))
                scratch = _scratch(rest, count) if count > 0 else 0
                if count < 1 or size_left < LONE_TOKEN_SIZE or (scratch > scratch_left and current):
                    yield current
                    current, (size_left, rows_left, scratch_left) = [], self._room
                    continue
                part, rest = _cut(rest, count, carried)
                current.append(part)
                scratch_left -= scratch
                size_left -= max(LONE_TOKEN_SIZE, count)
                rows_left -= part.rows
                if rest is not None:  # it reads what this part leaves
                    yield current
                    current, (size_left, rows_left, scratch_left) = [], self._room
        if current:
            yield current

    @property
    def _room(self) -> tuple[int, int, int]:
        """What a step holds: tokens, rows of logits, and unwanted states, one of which padding takes."""
        return self.sizes[-1], self.row_counts[-1], SCRATCH_SLOTS - 1

    def lay_out(
        self, chunks: Sequence[PagedChunk], *, recurrent: bool = False, windows: int = 0
    ) -> tuple[StepInputs, int]:
        """The inputs of a step of chunks that fit into one; also how many of its logit rows are wanted.

        What is missing to the next step size is a sequence of dummies in the scratch block; missing rows repeat one.
        """
        size = next_size(self.sizes, sum(max(LONE_TOKEN_SIZE, len(chunk.tokens)) for chunk in chunks))
        wanted = sum(chunk.rows for chunk in chunks)
        rows = next_size(self.row_counts, wanted)
        return lay_out(chunks, size, rows, recurrent=recurrent, windows=windows), wanted


def run(runner: Runner, inputs: StepInputs) -> FloatArray:
    """Run a step; float32 logits [logit rows, vocab_size], valid until the next."""
    runner.start(inputs)
    return runner.finish().host()


def pieces(blocks: int | IntArray, windows: int) -> IntArray:
    """The blocks, int32 [..., 1 + windows], that one stands for where a table stands for all: its own, side by side."""
    number = np.asarray(blocks, np.int32)[..., None]
    return np.where(
        number == SCRATCH_BLOCK, SCRATCH_BLOCK, number * (1 + windows) + np.arange(1 + windows, dtype=np.int32)
    )


def lay_out(
    chunks: Sequence[PagedChunk], size: int, row_count: int, *, recurrent: bool = False, windows: int = 0
) -> StepInputs:
    """A step of exactly `size` tokens and `row_count` rows of logits; the chunks must fit.

    With `recurrent` it says where states in slots are, too; with `windows`, it has so many more tables.
    """
    lengths = [max(LONE_TOKEN_SIZE, len(chunk.tokens)) for chunk in chunks]
    pasts = [chunk.past for chunk in chunks]
    input_ids = np.zeros(size, np.int64)
    position_ids = np.zeros(size, np.int64)
    is_real = np.zeros(size, np.int32)
    wanted: list[int] = []
    tables: list[IntArray] = []
    slots = [chunk.slots for chunk in chunks]
    begin = 0
    for chunk, length in zip(chunks, lengths, strict=True):
        real = len(chunk.tokens)
        input_ids[begin : begin + real] = chunk.tokens
        is_real[begin : begin + real] = 1
        position_ids[begin : begin + length] = np.arange(chunk.past, chunk.past + length)
        wanted.extend(range(begin + real - chunk.rows, begin + real))
        tables.append(_tables(chunk, -(-(chunk.past + length) // BLOCK_SIZE), windows))
        begin += length
    if padding := size - begin:
        position_ids[begin:] = np.arange(padding)
        lengths.append(padding)
        pasts.append(0)
        tables.append(np.full((-(-padding // BLOCK_SIZE), 1 + windows), SCRATCH_BLOCK, np.int32))
        slots.append(None)
    rows = np.full(row_count, wanted[-1] if wanted else 0, np.int64)
    rows[: len(wanted)] = wanted
    states = slot_inputs(list(zip(pasts, lengths, slots, strict=True))) if recurrent else {}
    block_tables = np.ascontiguousarray(np.concatenate(tables, dtype=np.int32).T)
    return states | {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "past_lens": np.array(pasts, np.int32),
        "subsequence_begins": _offsets(lengths),
        "block_indices": block_tables[0],
        "block_tables": block_tables,
        "block_indices_begins": _offsets([len(table) for table in tables]),
        "max_context_len": np.array(max(p + n for p, n in zip(pasts, lengths, strict=True)), np.int32),
        "logit_rows": rows,
        "is_real": is_real,
    }


def _tables(chunk: PagedChunk, count: int, windows: int) -> IntArray:
    """The first so many blocks in all tables of a chunk, int32 [count, 1 + windows]."""
    table = chunk.block_table[:count]
    if not windows:
        return table[:, None]
    if chunk.windows is None:
        return pieces(table, windows)
    rows = chunk.windows[:count]
    return np.column_stack((table, np.where(rows > 0, rows, ZERO_BLOCK)))


def next_size(sizes: Sequence[int], count: int) -> int:
    """The smallest of the rising `sizes` that holds `count`, which must not exceed the largest."""
    return sizes[bisect.bisect_left(sizes, count)]


def states_written(chunk: PagedChunk) -> int:
    """How many recurrent states a step writes for a chunk, wanted or not."""
    if chunk.slots is None:
        return 0
    return len(writes(chunk.past, max(LONE_TOKEN_SIZE, len(chunk.tokens)), chunk.slots.kept).slots)


def _cut(chunk: PagedChunk, count: int, carried: Iterator[int]) -> tuple[PagedChunk, PagedChunk | None]:
    """The first `count` tokens of a chunk, and the rest if there is any, which finds its state in a `carried` slot."""
    if count == len(chunk.tokens):
        return chunk, None
    rest, past = min(chunk.rows, len(chunk.tokens) - count), chunk.past + count
    first, second = chunk.slots.cut(past, next(carried)) if chunk.slots else (None, None)
    return (
        replace(chunk, tokens=chunk.tokens[:count], rows=chunk.rows - rest, slots=first),
        replace(chunk, tokens=chunk.tokens[count:], past=past, rows=rest, slots=second),
    )


def _writable(chunk: PagedChunk, count: int) -> int:
    """How many of the first `count` tokens a step may compute: all, or up to a state that is kept.

    The operators write states at equal intervals. So where those that are kept lie at odd places, a step that has to
    leave all of them would write too many that nobody wants.
    """
    if count < 1 or _scratch(chunk, count) <= MOST_UNWANTED:
        return count
    assert chunk.slots is not None
    ends = [at - chunk.past for at, _ in chunk.slots.kept if at - chunk.past < count]
    return next(end for end in reversed(ends) if _scratch(chunk, end) <= MOST_UNWANTED)


def _scratch(chunk: PagedChunk, count: int) -> int:
    """How many states the first `count` tokens of a chunk write that nobody wants."""
    if chunk.slots is None:
        return 0
    kept = (
        chunk.slots.cut(chunk.past + count, CARRIED_SLOTS[0])[0].kept if count < len(chunk.tokens) else chunk.slots.kept
    )
    return writes(chunk.past, max(LONE_TOKEN_SIZE, count), kept).unwanted


def _offsets(lengths: Sequence[int]) -> IntArray:
    return np.fromiter(chain((0,), lengths), np.int32, len(lengths) + 1).cumsum(dtype=np.int32)
