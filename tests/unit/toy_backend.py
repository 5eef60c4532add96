"""A backend without a model, for tests of everything above it.

Its KV slots hold the tokens themselves, and logits are a hash of what is read back through the block table. So a wrong
block, a slot that was overwritten or never computed, or a row that is out of place gives other tokens. It does all that
the contract of `Backend` allows it to, and insists on all that the contract promises it.
"""

import bisect
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from slipstream.backend import Piece, StepMeasurements
from slipstream.backend.base import BlockContents, FloatArray, IntArray

VOCABULARY = 50
STOP = 0
STEP_SIZES = (2, 4, 8, 16, 32, 64, 128)
SECONDS_PER_TOKEN = 0.01

_EMPTY, _RUBBISH = -1, -2
_LONGEST = 4096
_POWERS = np.random.default_rng(0).integers(1, 2**63, _LONGEST, dtype=np.uint64) | np.uint64(1)
_IDS = np.arange(VOCABULARY, dtype=np.uint64)


@dataclass
class Clock:
    """Stands for the `time` module: nothing takes time but the steps of a toy backend."""

    now: float = 0.0

    def perf_counter(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now


@dataclass(frozen=True)
class Step:
    """What a step was asked to compute; `size` includes padding."""

    pieces: tuple[Piece, ...]
    size: int

    @property
    def tokens(self) -> int:
        return sum(len(piece.tokens) for piece in self.pieces)


class ToyBackend:
    """A deterministic `Backend` whose steps take `SECONDS_PER_TOKEN` of the clock's time for each token."""

    vocab_size = VOCABULARY
    block_bytes = 1
    fingerprint = "toy"
    exact = True
    measurements = StepMeasurements(tuple((size, size * SECONDS_PER_TOKEN) for size in STEP_SIZES))

    def __init__(self, num_blocks: int, block_size: int = 4, clock: Clock | None = None) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.steps: list[Step] = []
        self.before_step: Callable[[], None] = lambda: None
        """Called at the start of each step on the engine's thread; what it raises is how the step fails."""
        self.violations: list[str] = []
        self._clock = clock or Clock()
        self._slots = np.full((num_blocks + 1, block_size), _EMPTY)
        self._logits = np.empty((0, VOCABULARY), np.float32)

    def forward(self, pieces: Sequence[Piece]) -> FloatArray:
        self._logits.fill(np.nan)  # a view that somebody kept is no good any more
        size = padded(sum(max(2, len(piece.tokens)) for piece in pieces))
        self.steps.append(Step(tuple(replace(piece, tokens=piece.tokens.copy()) for piece in pieces), size))
        self._clock.now += size * SECONDS_PER_TOKEN
        try:
            self.before_step()
            self._check(pieces)
            for piece in pieces:
                self._write(piece)
            rows = [row for piece in pieces for row in self._read(piece)]
        except AssertionError as error:
            self.violations.append(str(error))
            raise
        self._logits = np.array(rows, np.float32).reshape(len(rows), VOCABULARY)
        return self._logits

    @property
    def prepared(self) -> Collection[int]:
        return ()

    def copy_block(self, source: int, target: int) -> None:
        self._slots[target] = self._slots[source]

    def read_blocks(self, blocks: IntArray) -> BlockContents:
        return self._slots[blocks].astype(np.int16).view(np.uint16)

    def write_blocks(self, blocks: IntArray, contents: BlockContents) -> None:
        self._slots[blocks] = contents.view(np.int16)

    def _check(self, pieces: Sequence[Piece]) -> None:
        assert pieces, "a step has something to compute"
        for piece in pieces:
            count = len(piece.tokens)
            assert count >= 1, "a piece has a token"
            assert piece.tokens.dtype == piece.block_table.dtype == np.int32
            assert 0 <= piece.tokens.min() <= piece.tokens.max() < VOCABULARY, "tokens are in the vocabulary"
            assert 0 <= piece.logit_rows <= count, "logits are wanted of tokens that are computed"
            assert len(piece.block_table) * self.block_size > piece.past + count, "there is room for one more token"
            assert 1 <= piece.block_table.min() <= piece.block_table.max() <= self.num_blocks, "blocks are the pool's"
            assert len(set(piece.block_table.tolist())) == len(piece.block_table), "a table names a block once"

    def _write(self, piece: Piece) -> None:
        end = piece.past + len(piece.tokens)
        for position, token in zip(range(piece.past, end), piece.tokens, strict=True):
            self._slots[self._slot(piece, position)] = token
        self._slots[self._slot(piece, end)] = _RUBBISH

    def _read(self, piece: Piece) -> FloatArray:
        end = piece.past + len(piece.tokens)
        tokens = self._slots[piece.block_table].ravel()[:end]
        assert tokens.min() > _EMPTY, "all slots that are read were computed"
        assert np.array_equal(tokens[piece.past :], piece.tokens), "no two pieces write to one slot"
        return toy_logits(tokens, piece.logit_rows)

    def _slot(self, piece: Piece, position: int) -> tuple[int, int]:
        block, offset = divmod(position, self.block_size)
        return int(piece.block_table[block]), offset


def toy_logits(tokens: IntArray, rows: int = 1) -> FloatArray:
    """Logits after each of the last `rows` tokens, float32 [rows, vocabulary].

    Mostly a hash of the last token, so that answers repeat themselves and drafts come true; and a little of all tokens,
    so that none can be wrong unnoticed.
    """
    terms = (tokens.astype(np.uint64) + np.uint64(1)) * _POWERS[: len(tokens)]
    all_before = terms.cumsum(dtype=np.uint64)[len(tokens) - rows :]
    last = tokens[len(tokens) - rows :].astype(np.uint64)
    return 6 * _uniform(last) + 2 * _uniform(all_before)


def _uniform(seeds: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> FloatArray:
    """Hashes of each seed and each token of the vocabulary, in 0 to 1 (SplitMix64)."""
    mixed = (seeds[:, None] + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + _IDS * np.uint64(0xD1342543DE82EF95)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return (mixed >> np.uint64(40)).astype(np.float32) / np.float32(2**24)


def padded(tokens: int) -> int:
    index = bisect.bisect_left(STEP_SIZES, tokens)
    return STEP_SIZES[index] if index < len(STEP_SIZES) else tokens


class ToyTokenizer:
    """As much of a tokenizer as the engine uses; the last two tokens are halves of `é`."""

    vocab_size = VOCABULARY
    _bytes = (
        b"<stop>",
        *(bytes([byte]) for byte in b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTU"),
        b"\xc3",
        b"\xa9",
    )

    def token_bytes(self, id: int) -> bytes:
        return self._bytes[id]

    def is_special(self, id: int) -> bool:
        return id == STOP

    def is_control(self, id: int) -> bool:
        return id == STOP

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(self._bytes[id] for id in ids if id != STOP).decode(errors="replace")
