"""OpenVINO backend: a paged one that compiles copies of a small model for the step sizes that are used much."""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import openvino as ov

from slipstream.backend.base import Chunk
from slipstream.backend.paged import PagedBackend, PagedTicket
from slipstream.backend.paged_model import PagedModel

logger = logging.getLogger(__name__)

_COPIED_UP_TO = 16
"""Steps of at most so many tokens, those that decode, are worth a copy of a small model: compiled for their size alone,
it takes them a fifth less time, and nothing has to be prepared anew between them and the large steps of prompts."""
_WORTH_A_COPY = 200
"""Steps of a size after which a copy for it is compiled: it takes about as long as it then saves in as many more."""


class OpenVINOBackend(PagedBackend[PagedModel]):
    """A `PagedBackend` on a processor."""

    def __init__(
        self, model: PagedModel, *, kv_memory: int, progress: Callable[[float], None] = lambda _: None
    ) -> None:
        super().__init__(model, kv_memory=kv_memory, progress=progress)
        model.give_back_files()
        self._without_copy = [size for size in self.step_class.sizes if size <= _COPIED_UP_TO] if model.is_small else []
        self._compiling: tuple[int, Future[ov.CompiledModel]] | None = None
        self._compiler = ThreadPoolExecutor(1, "slipstream-compiler")

    def launch(self, chunks: Sequence[Chunk]) -> PagedTicket:
        """Start a step; see `Backend.launch`."""
        self._copy_what_is_used()
        return super().launch(chunks)

    def _copy_what_is_used(self) -> None:
        """Compile a copy for a small size that is used much, in the background, and use it when it's ready."""
        if self._compiling is not None:
            size, copy = self._compiling
            if copy.done():
                self._compiling = None
                self._use_copy(size, copy)
            return
        for size in self._without_copy:
            if self.model.runs[size] >= _WORTH_A_COPY:
                self._without_copy.remove(size)
                logger.info("compiling a copy of the model for steps of %d tokens, which are used much", size)
                self._compiling = size, self._compiler.submit(self.model.compile_copy, size)
                return

    def _use_copy(self, size: int, copy: Future[ov.CompiledModel]) -> None:
        """Use a copy if it gives the bits that it should."""
        if (error := copy.exception()) is not None:
            logger.warning("no copy of the model for steps of %d tokens: %s", size, error)
            return
        self.model.use_copy(size, copy.result())
        if self.exact and not self._probe.agrees(size, self.step_class.row_counts[0], self._calibration.witness):
            logger.warning("a copy of the model for steps of %d tokens gives other bits, and is not used", size)
            self.model.drop_copy(size)
            return
        logger.info("steps of %d tokens run on a copy of the model now", size)
