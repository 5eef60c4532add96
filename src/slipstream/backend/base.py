"""The interface between Slipstream and whatever runs the model's forward pass."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float32]
BlockContents = npt.NDArray[np.uint16]
"""The bits of KV blocks, [blocks, ...]; what they mean is the backend's own business."""


@dataclass(frozen=True, slots=True)
class Piece:
    """The part of one sequence that a step computes.

    `tokens` int32 [n], n >= 1, are the tokens whose KV this step writes; `past` tokens before them have theirs
    already. `block_table` int32 names the KV blocks in order and has room for `past + n + 1` tokens: the last slot
    may be overwritten (see `Backend.forward`). Logits are wanted for the last `logit_rows` tokens, 0 <= rows <= n.
    """

    tokens: IntArray
    past: int
    block_table: IntArray
    logit_rows: int


@dataclass(frozen=True, slots=True)
class StepMeasurements:
    """What steps cost on this machine: a base by size, and what contexts add to it."""

    seconds: tuple[tuple[int, float], ...]
    """Step sizes in tokens, rising, and the duration of a step without context; other counts are padded to the next."""
    change: float = 0.0
    """Seconds that a step takes longer when its size isn't `prepared`."""
    per_context: float = 0.0
    """Seconds for each token of context that a step's sequences have together."""
    per_pair: float = 0.0
    """Seconds for each pair of a token in the step and a token of its context."""
    largest_draft: int | None = None
    """Tokens of a draft that one step can verify; None if there's no limit."""


class Backend(Protocol):
    """A loaded model with its KV memory.

    Where it is `exact`, a token's logits depend on the tokens of its sequence up to it and on nothing else, neither
    on how they were cut into pieces nor on what else a step computes.
    """

    vocab_size: int
    block_size: int
    """KV slots in a block."""
    num_blocks: int
    """Blocks that sequences may use; they are numbered from 1 (block 0 is the backend's own)."""
    block_bytes: int
    fingerprint: str
    """Equal for backends that compute the same bits from the same weights, and store them alike."""
    exact: bool
    """Whether a token's logits were found to be the same to the bit in every step; the server says so if not."""
    measurements: StepMeasurements
    """The step sizes that there are, and what steps cost."""

    def forward(self, pieces: Sequence[Piece]) -> FloatArray:
        """Run one step; returns float32 logits [sum of logit_rows, vocab_size] in the order of the pieces.

        The array is a view that the next call overwrites. The slot after a piece's last token may be written with
        rubbish: it must not hold a computed token.
        """
        ...

    @property
    def prepared(self) -> Collection[int]:
        """Step sizes that a step may have now without the time that a change of size takes."""
        ...

    def copy_block(self, source: int, target: int) -> None:
        """Copy the keys and values of one block to another, in all layers."""
        ...

    def read_blocks(self, blocks: IntArray) -> BlockContents:
        """A copy of what the blocks hold."""
        ...

    def write_blocks(self, blocks: IntArray, contents: BlockContents) -> None:
        """Fill blocks with what `read_blocks` gave."""
        ...
