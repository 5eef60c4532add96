"""A backend over a model that runs steps on KV blocks: steps of one class, as they were measured on this machine."""

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from slipstream.backend import calibration
from slipstream.backend.base import Chunk
from slipstream.backend.paged_store import PagedState, PagedStore
from slipstream.backend.self_test import PROBE_BLOCKS, SELF_TEST_BLOCKS, WITNESS_CONTEXT, Probe
from slipstream.backend.step_cost import StepCost
from slipstream.backend.steps import BLOCK_SIZE, LONE_TOKEN_SIZE, PagedChunk, Runner, StepClass
from slipstream.backend.store import Blob
from slipstream.errors import ModelError
from slipstream.fields import KV_MEMORY
from slipstream.sampling import Choice, Row, choose_on_host
from slipstream.types import FloatArray, IntArray

logger = logging.getLogger(__name__)

_SPARE_SLOTS = LONE_TOKEN_SIZE - 1
"""Slots after a sequence's last token that a step may write rubbish to: the dummies that fill a short chunk."""


class BlockModel(Runner, Protocol):
    """A model that runs steps over KV blocks, numbered from 0; there are none before `allocate`."""

    path: Path
    """Its file; what is found out about it on this machine is kept beside it."""
    gpu: str | None
    """The name of the GPU that it runs on, None for the processor."""
    threads: int
    """Threads of a forward pass, where it runs on a processor."""
    precision: str
    """Of the keys and values."""
    block_bytes: int
    """Memory that a block takes, in all layers."""
    seconds: float
    """What all steps took."""

    @property
    def settings(self) -> str:
        """All that decides which kernels compute a step, and how KV is stored."""
        ...

    @property
    def prepared(self) -> Collection[int]:
        """Sizes of steps for which nothing has to be prepared; empty if preparing takes no time."""
        ...

    def allocate(self, num_blocks: int) -> None:
        """Have so many blocks, all zero, in place of those before."""
        ...

    def write_blocks(self, blocks: IntArray, contents: Blob) -> None:
        """Fill blocks with what `read_blocks` gave."""
        ...


AnyModel = TypeVar("AnyModel", bound=BlockModel)


class PagedBackend(Generic[AnyModel]):
    """A model whose steps are all of one class: the one that a self-test found to keep every token's bits.

    What the self-test finds, and what steps cost, is kept beside the model; later starts compare a few bits. `progress`
    is called with the fraction done of the first start's work. Raises `ModelError` if the KV memory, in bytes, is too
    small.
    """

    def __init__(self, model: AnyModel, *, kv_memory: int, progress: Callable[[float], None] = lambda _: None) -> None:
        self._model = model
        self.vocab_size = model.vocab_size
        self._num_blocks = kv_memory // model.block_bytes - 1  # block 0 takes the KV of padding
        if self._num_blocks < 2:
            raise ModelError(
                f"KV memory of {kv_memory:,} bytes holds no two blocks of {model.block_bytes:,}: raise ", KV_MEMORY
            )
        self._calibration, self._probe = self._calibrated(progress)
        self.step_class = self._calibration.step_class
        self.exact: bool = self._calibration.exact
        self.fingerprint = f"{model.settings}; {self._calibration.witness or self.step_class}"
        self.largest_draft: int | None = min(self.step_class.sizes[-1], self.step_class.row_counts[-1]) - 1
        self.cost = StepCost(
            self._calibration.measurements, smallest_chunk=LONE_TOKEN_SIZE, prepared=lambda: model.prepared
        )
        self.store = self.new_store(self._num_blocks)

    def new_store(self, num_blocks: int) -> PagedStore:
        """A store of the first so many blocks; only one may be in use."""
        model = self._model
        size, spare = BLOCK_SIZE, _SPARE_SLOTS
        return PagedStore(model, num_blocks=num_blocks, block_size=size, block_bytes=model.block_bytes, spare=spare)

    @property
    def step_sizes(self) -> tuple[int, ...]:
        """Tokens that a step may have, rising; others are padded or split."""
        return self.step_class.sizes

    @property
    def gpu(self) -> str | None:
        """The name of the GPU that it runs on, None for the processor."""
        return self._model.gpu

    @property
    def threads(self) -> int:
        """Threads of a forward pass, where it runs on a processor."""
        return self._model.threads

    @property
    def precision(self) -> str:
        """What keys and values are kept in."""
        return self._model.precision

    def launch(self, chunks: Sequence[Chunk]) -> "PagedTicket":
        """Start a step, or the first of several if the chunks don't fit into one; see `Backend.launch`."""
        return PagedTicket(self._model, self.step_class, self.cost, chunks)

    def _calibrated(self, progress: Callable[[float], None]) -> tuple[calibration.Calibration, Probe]:
        """What is known of the model's steps on this machine, checked; or found out now, and kept."""
        model = self._model
        known = calibration.load(model.path, model.settings)
        if known is not None:
            probe = self._allocate(known.step_class)
            sizes, row_counts = known.step_class.sizes, known.step_class.row_counts
            if not known.exact or probe.agrees(sizes[0], row_counts[0], known.witness):
                return known, probe
            logger.warning("steps give other bits than when they were measured on this machine: they are measured anew")
        model.allocate(SELF_TEST_BLOCKS)
        found = calibration.calibrate(model, progress)
        probe = self._allocate(found.step_class)
        if found.exact:
            witness = probe.witness(found.step_class)
            found = replace(found, exact=witness is not None, witness=witness or "")
        calibration.save(model.path, model.settings, found)
        return found, probe

    def _allocate(self, step_class: StepClass) -> Probe:
        """Have the blocks that sequences may use, and behind them some for comparing bits at any time."""
        self._model.allocate(1 + self._num_blocks + PROBE_BLOCKS)
        first = 1 + self._num_blocks
        return Probe(self._model, first_block=first, step_class=step_class, context=WITNESS_CONTEXT)


class PagedTicket:
    """A step under way."""

    def __init__(self, model: BlockModel, step_class: StepClass, cost: StepCost, chunks: Sequence[Chunk]) -> None:
        self._model = model
        self._cost = cost
        self._chunks = chunks
        self._load = cost.load((len(chunk.tokens), chunk.past) for chunk in chunks)
        self._prepared = model.prepared
        self._seconds_before = model.seconds
        self.logits: FloatArray
        """Float32 [rows, vocab_size], once the step is done and until the next is launched."""
        self._finish = step_class.start(model, [_paged(chunk) for chunk in chunks])

    def wait(self) -> None:
        """Return when the step is done; see `Ticket.wait`."""
        self.logits = self._finish()
        for chunk in self._chunks:
            chunk.state.length += len(chunk.tokens)
        self._cost.observe(self._load, self._prepared, self._model.seconds - self._seconds_before)

    def choose(self, rows: Sequence[Row]) -> list[Choice]:
        """Choose tokens from the step's logits; see `Ticket.choose`."""
        return choose_on_host(self.logits, rows)


def _paged(chunk: Chunk) -> PagedChunk:
    state = chunk.state
    assert isinstance(state, PagedState)
    return PagedChunk(chunk.tokens, chunk.past, state.block_table, chunk.rows)
