"""The shape of a step: which sizes a forward pass may have, and how pieces of sequences are laid out in one."""

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Protocol

import numpy as np
import numpy.typing as npt

from slipstream.backend.base import BlockContents, FloatArray, IntArray, Piece

BLOCK_SIZE = 32
"""KV slots per block: what OpenVINO's paged attention kernel for CPUs is written for."""

SCRATCH_BLOCK = 0
"""Takes the KV of padding tokens; its content is never read by a real token."""

LONE_TOKEN_SIZE = 2
"""A piece of one token takes another attention kernel than longer ones and gives other logits, so it gets a dummy
second token: its KV slot is overwritten later, and its logits are not read."""

StepInputs = dict[str, npt.NDArray[np.int32 | np.int64]]
"""A step as the model takes it, by name."""


class Runner(Protocol):
    """A model that runs steps of any shape over KV blocks."""

    vocab_size: int

    def run(self, inputs: StepInputs) -> FloatArray:
        """Run a step; float32 logits [logit rows, vocab_size], valid until the next."""
        ...

    def copy_block(self, source: int, target: int) -> None:
        """Copy the keys and values of one block to another, in all layers."""
        ...

    def read_blocks(self, blocks: IntArray) -> BlockContents:
        """A copy of what the blocks hold."""
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

    def run(self, runner: Runner, pieces: Sequence[Piece]) -> FloatArray:
        """Compute the pieces; float32 logits [sum of logit_rows, vocab_size] in order, valid until the next run."""
        steps = list(self.cut(pieces))
        if len(steps) == 1:
            return self._run_one(runner, steps[0])
        return np.concatenate([self._run_one(runner, step).copy() for step in steps])

    def _run_one(self, runner: Runner, pieces: Sequence[Piece]) -> FloatArray:
        inputs, wanted = self.lay_out(pieces)
        return runner.run(inputs)[:wanted]

    def cut(self, pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
        """The pieces, cut into as few steps of the class as their order allows; rows of logits keep their order."""
        current: list[Piece] = []
        size_left, rows_left = self.sizes[-1], self.row_counts[-1]
        for piece in pieces:
            rest: Piece | None = piece
            while rest is not None:
                silent = len(rest.tokens) - rest.logit_rows
                count = min(len(rest.tokens), size_left, silent + rows_left)
                if count < 1 or size_left < LONE_TOKEN_SIZE:
                    yield current
                    current, size_left, rows_left = [], self.sizes[-1], self.row_counts[-1]
                    continue
                part, rest = _cut(rest, count)
                current.append(part)
                size_left -= max(LONE_TOKEN_SIZE, count)
                rows_left -= part.logit_rows
        if current:
            yield current

    def lay_out(self, pieces: Sequence[Piece]) -> tuple[StepInputs, int]:
        """The inputs of a step of pieces that fit into one; also how many of its logit rows are wanted.

        What is missing to the next step size is a sequence of dummies in the scratch block; missing rows repeat one.
        """
        size = next_size(self.sizes, sum(max(LONE_TOKEN_SIZE, len(piece.tokens)) for piece in pieces))
        wanted = sum(piece.logit_rows for piece in pieces)
        return lay_out(pieces, size, next_size(self.row_counts, wanted)), wanted


def lay_out(pieces: Sequence[Piece], size: int, row_count: int) -> StepInputs:
    """A step of exactly `size` tokens and `row_count` rows of logits; the pieces must fit."""
    lengths = [max(LONE_TOKEN_SIZE, len(piece.tokens)) for piece in pieces]
    pasts = [piece.past for piece in pieces]
    input_ids = np.zeros(size, np.int64)
    position_ids = np.zeros(size, np.int64)
    wanted: list[int] = []
    tables: list[IntArray] = []
    begin = 0
    for piece, length in zip(pieces, lengths, strict=True):
        real = len(piece.tokens)
        input_ids[begin : begin + real] = piece.tokens
        position_ids[begin : begin + length] = np.arange(piece.past, piece.past + length)
        wanted.extend(range(begin + real - piece.logit_rows, begin + real))
        tables.append(piece.block_table[: -(-(piece.past + length) // BLOCK_SIZE)])
        begin += length
    if padding := size - begin:
        position_ids[begin:] = np.arange(padding)
        lengths.append(padding)
        pasts.append(0)
        tables.append(np.full(-(-padding // BLOCK_SIZE), SCRATCH_BLOCK, np.int32))
    rows = np.full(row_count, wanted[-1] if wanted else 0, np.int64)
    rows[: len(wanted)] = wanted
    return {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "past_lens": np.array(pasts, np.int32),
        "subsequence_begins": _offsets(lengths),
        "block_indices": np.concatenate(tables, dtype=np.int32),
        "block_indices_begins": _offsets([len(table) for table in tables]),
        "max_context_len": np.array(max(p + n for p, n in zip(pasts, lengths, strict=True)), np.int32),
        "logit_rows": rows,
    }


def next_size(sizes: Sequence[int], count: int) -> int:
    """The smallest of the rising `sizes` that holds `count`, which must not exceed the largest."""
    return sizes[bisect.bisect_left(sizes, count)]


def _cut(piece: Piece, count: int) -> tuple[Piece, Piece | None]:
    """The first `count` tokens of a piece, and the rest if there is any."""
    if count == len(piece.tokens):
        return piece, None
    rest = min(piece.logit_rows, len(piece.tokens) - count)
    return (
        replace(piece, tokens=piece.tokens[:count], logit_rows=piece.logit_rows - rest),
        replace(piece, tokens=piece.tokens[count:], past=piece.past + count, logit_rows=rest),
    )


def _offsets(lengths: Sequence[int]) -> IntArray:
    return np.fromiter(chain((0,), lengths), np.int32, len(lengths) + 1).cumsum(dtype=np.int32)
