"""OpenVINO backend: steps of one class over KV blocks that the engine hands out."""

import logging
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import openvino as ov

from slipstream.backend import calibration
from slipstream.backend.base import BlockContents, FloatArray, IntArray, Piece, StepMeasurements
from slipstream.backend.paged_model import PagedModel
from slipstream.backend.self_test import PROBE_BLOCKS, SELF_TEST_BLOCKS, Probe
from slipstream.backend.steps import BLOCK_SIZE, StepClass
from slipstream.errors import ModelError
from slipstream.fields import KV_MEMORY

logger = logging.getLogger(__name__)

_COPIED_UP_TO = 16
"""Steps of at most so many tokens, those that decode, are worth a copy of a small model: compiled for their size alone,
it takes them a fifth less time, and nothing has to be prepared anew between them and the large steps of prompts."""
_WORTH_A_COPY = 200
"""Steps of a size after which a copy for it is compiled: it takes about as long as it then saves in as many more."""


class OpenVINOBackend:
    """A model whose steps are all of one class: the one that a self-test found to keep every token's bits.

    What the self-test finds, and what steps cost, is kept beside the model; later starts compare a few bits. `progress`
    is called with the fraction done of the first start's work. Raises `ModelError` if the KV memory, in bytes, is too
    small.
    """

    block_size = BLOCK_SIZE

    def __init__(
        self, model: PagedModel, *, kv_memory: int, progress: Callable[[float], None] = lambda _: None
    ) -> None:
        self._model = model
        self.vocab_size = model.vocab_size
        self.block_bytes = model.block_bytes
        self.num_blocks = kv_memory // model.block_bytes - 1
        if self.num_blocks < 2:
            raise ModelError(
                f"KV memory of {kv_memory:,} bytes holds no two blocks of {model.block_bytes:,}: raise ", KV_MEMORY
            )
        self._calibration, self._probe = self._calibrated(progress)
        self.step_class = self._calibration.step_class
        self.exact: bool = self._calibration.exact
        self.measurements: StepMeasurements = self._calibration.measurements
        self.fingerprint = f"{model.settings}; {self._calibration.witness or self.step_class}"
        self._without_copy = [size for size in self.step_sizes if size <= _COPIED_UP_TO] if model.is_small else []
        self._compiling: tuple[int, Future[ov.CompiledModel]] | None = None
        self._compiler = ThreadPoolExecutor(1, "slipstream-compiler")

    @property
    def step_sizes(self) -> tuple[int, ...]:
        """Tokens that a step may have, rising; others are padded or split."""
        return self.step_class.sizes

    @property
    def threads(self) -> int:
        """Threads of a forward pass."""
        return self._model.threads

    @property
    def precision(self) -> str:
        """What keys and values are kept in."""
        return self._model.precision

    @property
    def prepared(self) -> Collection[int]:
        """Sizes of steps that have a copy of their own, and that of the last other step."""
        return self._model.prepared

    def forward(self, pieces: Sequence[Piece]) -> FloatArray:
        """Compute the pieces, in several steps if they don't fit into one; see `Backend.forward`.

        Raises `ModelError` when inference fails.
        """
        logits = self.step_class.run(self._model, pieces)
        self._copy_what_is_used()
        return logits

    def copy_block(self, source: int, target: int) -> None:
        """Copy the keys and values of one block to another, in all layers."""
        self._model.copy_block(source, target)

    def read_blocks(self, blocks: IntArray) -> BlockContents:
        """A copy of what the blocks hold, uint16 [blocks, layers * 2, elements]."""
        return self._model.read_blocks(blocks)

    def write_blocks(self, blocks: IntArray, contents: BlockContents) -> None:
        """Fill blocks with what `read_blocks` gave."""
        self._model.write_blocks(blocks, contents)

    def _calibrated(self, progress: Callable[[float], None]) -> tuple[calibration.Calibration, Probe]:
        """What is known of the model's steps on this machine, checked; or found out now, and kept."""
        model = self._model
        known = calibration.load(model.ir_path, model.settings)
        if known is not None:
            probe = self._allocate(known.step_class)  # in a large step, on whose bits those of the small one depend
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
        calibration.save(model.ir_path, model.settings, found)
        return found, probe

    def _allocate(self, step_class: StepClass) -> Probe:
        """Have the blocks that sequences may use, and behind them some for comparing bits at any time."""
        self._model.allocate(1 + self.num_blocks + PROBE_BLOCKS)
        return Probe(self._model, first_block=1 + self.num_blocks, step_class=step_class)

    def _copy_what_is_used(self) -> None:
        """Compile a copy for a small size that is used much, in the background, and use it when it's ready."""
        if self._compiling is not None:
            size, copy = self._compiling
            if copy.done():
                self._compiling = None
                self._use_copy(size, copy)
            return
        for size in self._without_copy:
            if self._model.runs[size] >= _WORTH_A_COPY:
                self._without_copy.remove(size)
                self._compiling = size, self._compiler.submit(self._model.compile_copy, size)
                return

    def _use_copy(self, size: int, copy: Future[ov.CompiledModel]) -> None:
        """Use a copy if it gives the bits that it should."""
        if (error := copy.exception()) is not None:
            logger.warning("no copy of the model for steps of %d tokens: %s", size, error)
            return
        self._model.use_copy(size, copy.result())
        if self.exact and not self._probe.agrees(size, self.step_class.row_counts[0], self._calibration.witness):
            logger.warning("a copy of the model for steps of %d tokens gives other bits, and is not used", size)
            self._model.drop_copy(size)
