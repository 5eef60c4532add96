"""A backend over a model that runs steps on KV blocks: steps of one class, as they were measured on this machine."""

import logging
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from slipstream.backend import calibration
from slipstream.backend.base import Chunk
from slipstream.backend.hybrid_store import HybridState, HybridStore
from slipstream.backend.logits import Logits
from slipstream.backend.paged_store import PagedState, PagedStore
from slipstream.backend.self_test import (
    PROBE_BLOCKS,
    PROBE_SLOTS,
    SELF_TEST_BLOCKS,
    SELF_TEST_SLOTS,
    WITNESS_CONTEXT,
    Probe,
)
from slipstream.backend.slots import FIRST_SLOT, SlotStates
from slipstream.backend.step_cost import StepCost
from slipstream.backend.steps import (
    BLOCK_SIZE,
    LONE_TOKEN_SIZE,
    SCRATCH_BLOCK,
    ZERO_BLOCK,
    PagedChunk,
    Runner,
    StepClass,
    states_written,
)
from slipstream.backend.store import Store
from slipstream.backend.window_store import WindowState, WindowStore
from slipstream.errors import ModelError
from slipstream.fields import KV_MEMORY
from slipstream.sampling import Choice, Row
from slipstream.types import FloatArray

logger = logging.getLogger(__name__)

_SPARE_SLOTS = LONE_TOKEN_SIZE - 1
"""Slots after a sequence's last token that a step may write rubbish to: the dummies that fill a short chunk."""
_SLOTS_IN_USE = 4
"""Recurrent states that steps write for nobody and read as the beginning; more are written in large steps alone."""
_REPLAY = 1.0
"""Seconds that a sequence may take to compute again from a state that was kept, if memory allows."""


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
    """Memory that a block takes, in all layers; if `window_tables`, in those whose blocks are all kept."""
    window: int
    """Tokens that layers with tables of their own see, at most."""
    has_full_attention: bool
    """Whether some layers see everything; if not, one layer's blocks are all kept nevertheless."""

    @property
    def settings(self) -> str:
        """All that decides which kernels compute a step, and how KV is stored."""
        ...

    @property
    def seconds(self) -> float:
        """What all finished steps took."""
        ...

    @property
    def prepared(self) -> Collection[int]:
        """Sizes of steps for which nothing has to be prepared; empty if preparing takes no time."""
        ...

    def allocate(self, num_blocks: int) -> None:
        """Have so many blocks, all zero, in place of those before."""
        ...


AnyModel = TypeVar("AnyModel", bound=BlockModel)


class PagedBackend(Generic[AnyModel]):
    """A model whose steps are all of one class: the one that a self-test found to keep every token's bits.

    What the self-test finds, and what steps cost, is kept beside the model; later starts compare a few bits. `progress`
    is called with the fraction done of the first start's work. Raises `ModelError` if the KV memory, in bytes, is too
    small.
    """

    def __init__(self, model: AnyModel, *, kv_memory: int, progress: Callable[[float], None] = lambda _: None) -> None:
        self.model = model
        self.vocab_size = model.vocab_size
        self._first_block = 1 + (ZERO_BLOCK if model.window_tables else SCRATCH_BLOCK)
        unnamed = self._first_block * model.block_bytes
        if model.states is not None:
            unnamed += _SLOTS_IN_USE * model.states.slot_bytes
        self._num_blocks = (kv_memory - unnamed) // model.block_bytes
        if self._num_blocks < 2:
            raise ModelError(
                f"KV memory of {kv_memory:,} bytes holds no two blocks of {model.block_bytes:,}: raise ", KV_MEMORY
            )
        self._calibration, self._probe = self._calibrated(progress)
        self.step_class = self._calibration.step_class
        self.exact: bool = self._calibration.exact
        self.largest_draft: int | None = min(self.step_class.sizes[-1], self.step_class.row_counts[-1]) - 1
        self.cost = StepCost(
            self._calibration.measurements, smallest_chunk=LONE_TOKEN_SIZE, prepared=lambda: model.prepared
        )
        self.checkpoint_interval = self._checkpoint_interval(model.states) if model.states is not None else 0
        """Tokens between two recurrent states, or states of sliding windows, that are kept; 0 if there are none."""
        self.fingerprint = f"{model.settings}; {self._calibration.witness or self.step_class}"
        if self.checkpoint_interval:
            self.fingerprint += f"; states every {self.checkpoint_interval} tokens"
        self.store: Store[Any] = self.new_store(self._num_blocks)
        if isinstance(self.store, WindowStore):
            self.checkpoint_interval = self.store.interval
            self.fingerprint += f"; windows of {model.window} tokens in {model.window_tables} tables"
        if self.store.capacity < BLOCK_SIZE:
            raise ModelError(f"KV memory of {kv_memory:,} bytes holds no sequence with its states: raise ", KV_MEMORY)

    def new_store(self, num_blocks: int) -> Store[Any]:
        """A store of the first so many blocks; only one may be in use."""
        model = self.model
        kind = WindowState if model.window_tables else PagedState if model.states is None else HybridState
        kv: PagedStore[Any] = PagedStore(
            model,
            kind,
            num_blocks=num_blocks,
            block_size=BLOCK_SIZE,
            block_bytes=model.block_bytes,
            spare=_SPARE_SLOTS,
            first_block=self._first_block,
        )
        if model.window_tables:
            return WindowStore(
                kv,
                window=model.window,
                tables=model.window_tables,
                longest_chunk=self.step_class.sizes[-1],
                has_full_attention=model.has_full_attention,
            )
        if model.states is None:
            return kv
        return HybridStore(kv, model.states, first_slot=FIRST_SLOT, interval=self.checkpoint_interval)

    def launch(self, chunks: Sequence[Chunk]) -> "PagedTicket":
        """Start a step, or the first of several if the chunks don't fit into one; see `Backend.launch`."""
        return PagedTicket(self.model, self.step_class, self.cost, chunks)

    def _calibrated(self, progress: Callable[[float], None]) -> tuple[calibration.Calibration, Probe]:
        """What is known of the model's steps on this machine, checked; or found out now, and kept."""
        model = self.model
        known = calibration.load(model.path, model.settings)
        if known is not None:
            probe = self._allocate(known.step_class)
            sizes, row_counts = known.step_class.sizes, known.step_class.row_counts
            if not known.exact or probe.agrees(sizes[0], row_counts[0], known.witness):
                return known, probe
            logger.warning("steps give other bits than when they were measured on this machine: they are measured anew")
        if model.states is not None:
            model.states.allocate(SELF_TEST_SLOTS)
        model.allocate(SELF_TEST_BLOCKS * (1 + model.window_tables))
        found = calibration.calibrate(model, progress)
        probe = self._allocate(found.step_class)
        if found.exact:
            witness = probe.witness(found.step_class)
            found = replace(found, exact=witness is not None, witness=witness or "")
        calibration.save(model.path, model.settings, found)
        return found, probe

    def _allocate(self, step_class: StepClass) -> Probe:
        """Have the blocks that sequences may use, and behind them some for comparing bits at any time."""
        model, slot = self.model, FIRST_SLOT
        pieces = 1 + model.window_tables  # that make a block for a probe
        first_block = -(-(self._first_block + self._num_blocks) // pieces)
        if model.states is not None:
            slot += self._num_blocks * model.block_bytes // model.states.slot_bytes
            model.states.allocate(slot + PROBE_SLOTS)
        model.allocate((first_block + PROBE_BLOCKS) * pieces)
        return Probe(model, first_block=first_block, slot=slot, step_class=step_class, context=WITNESS_CONTEXT)

    def _checkpoint_interval(self, states: SlotStates) -> int:
        """Tokens between two states that are kept.

        They take at most as much memory as the keys and values between them, and at least a quarter of that; within
        these bounds it's the longest interval that is computed again in `_REPLAY` seconds. A power of two, so that
        measurements that differ a little give the same.
        """
        tokens = BLOCK_SIZE * states.slot_bytes / self.model.block_bytes
        exact = min(max(tokens, _REPLAY / self.cost.token(0)), 4 * tokens)
        return int(max(2 * BLOCK_SIZE, 2 ** math.ceil(math.log2(exact))))


class PagedTicket:
    """A step under way."""

    def __init__(self, model: BlockModel, step_class: StepClass, cost: StepCost, chunks: Sequence[Chunk]) -> None:
        self._model = model
        self._cost = cost
        self._chunks = chunks
        self._prepared = model.prepared
        self._seconds = 0.0
        self._logits: Logits
        self._paged = [_paged(chunk) for chunk in chunks]
        self._finish = step_class.start(model, self._paged, self._observe)
        self.queued = model.queues and not any(chunk.rows for chunk in chunks)
        if self.queued:
            self._advance()

    def wait(self, rows: Sequence[Row] = ()) -> list[Choice]:
        """Return when the step is done; see `Ticket.wait`."""
        try:
            self._seconds = self._model.seconds  # what failed before may be known from here on
            self._logits, choices = self._finish(rows)
        except Exception:
            for chunk, paged in zip(self._chunks, self._paged, strict=True):
                if isinstance(chunk.state, WindowState):  # a step queued behind may have given back what it sees
                    chunk.state.store.rewind(chunk.state, paged.past)
                else:
                    chunk.state.length = min(chunk.state.length, paged.past)
            raise
        if not self.queued:
            self._advance()
        return choices

    def _advance(self) -> None:
        """Let the states know that they have the chunks' tokens."""
        for chunk, paged in zip(self._chunks, self._paged, strict=True):
            if isinstance(chunk.state, HybridState) and paged.slots is not None:
                chunk.state.store.commit(chunk.state, paged.slots)
            else:
                chunk.state.length += len(chunk.tokens)

    def choose(self, rows: Sequence[Row]) -> list[Choice]:
        """Choose tokens from the step's logits; see `Ticket.choose`."""
        return self._logits.choose(rows)

    def _observe(self, step: Sequence[PagedChunk]) -> None:
        """Learn what a step took: one of several, if the chunks didn't fit into one or were cut at their states."""
        load = self._cost.load((len(chunk.tokens), chunk.past) for chunk in step)
        load = load._replace(states=sum(map(states_written, step)))
        self._cost.observe(load, self._prepared, self._model.seconds - self._seconds)
        self._prepared, self._seconds = self._model.prepared, self._model.seconds

    @property
    def logits(self) -> FloatArray:
        """Float32 [rows, vocab_size] on the host, once the step is done and until the next is launched."""
        return self._logits.host()[: sum(chunk.rows for chunk in self._chunks)]


def _paged(chunk: Chunk) -> PagedChunk:
    """A chunk with all that its sequence has: where its states are, or the tables of layers with windows."""
    state, slots, windows = chunk.state, None, None
    assert isinstance(state, PagedState)
    if isinstance(state, HybridState):
        slots = state.store.plan(state, len(chunk.tokens), rows=chunk.rows, marks=chunk.marks)
    if isinstance(state, WindowState):
        windows = state.store.plan(state, len(chunk.tokens), chunk.marks)
    return PagedChunk(chunk.tokens, chunk.past, state.block_table, chunk.rows, slots, windows)
