"""Small steps as CUDA graphs: a host takes longer to launch their kernels one by one than a GPU to run them.

A graph repeats the same kernels on the same addresses. So what differs from step to step lies in one static buffer, and
what decides how many kernels there are, or how large, is part of a step's shape: its tokens, its rows of logits, the
segments of keys of its longest sequence and its chunks, both rounded up to a power of two, and the tokens of its
longest chunk, rounded up too. Chunks are padded with empty ones.
"""

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from slipstream.backend.steps import StepInputs
from slipstream.backend.torch.operators import Step, StepOutput, longest_of, segments_of
from slipstream.backend.torch.staging import Staging, layout, views

logger = logging.getLogger(__name__)

LARGEST = 512
"""Tokens of the largest steps that are recorded: a GPU takes longer for larger ones than a host to launch them, some
hundred kernels at ten to twenty microseconds each."""
WORTH = 3
"""Times that a shape has to come before it's recorded; by then its kernels are compiled, which can't be recorded."""
_MOST = 64
"""Recordings that are kept; each has memory for its kernels' arguments."""
_BUFFER_BYTES = 1 << 20
"""For the inputs of a step, by table: some 250,000 blocks, or eight million tokens."""


class Recorder(Protocol):
    """What makes recordings; CUDA does, and stubs in tests."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record some work without doing it: what it returns starts to do it. Raises an error if that can't be."""
        ...

    def forget(self) -> None:
        """Nobody has the recordings any more that were made so far."""
        ...


class CudaRecorder:
    """CUDA graphs, which share their memory: one of them runs at a time."""

    def __init__(self) -> None:
        self.forget()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """See `Recorder.record`."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                work()
        finally:
            torch.cuda.set_stream(stream)  # if a capture fails, torch stays on its stream
        replay: Callable[[], None] = graph.replay
        return replay

    def forget(self) -> None:
        """See `Recorder.forget`: torch refuses memory whose graphs are all gone while any tensor in it is left."""
        self._pool: Any = torch.cuda.graph_pool_handle()


class Shape(NamedTuple):
    """What recordings differ by."""

    tokens: int
    rows: int
    segments: int
    longest: int
    chunks: int

    @classmethod
    def of(cls, inputs: StepInputs) -> "Shape":
        """That of a step."""
        most = segments_of(int(inputs["max_context_len"]))
        segments, chunks = (1 << (count - 1).bit_length() for count in (most, len(inputs["past_lens"]) + 1))
        return cls(len(inputs["input_ids"]), len(inputs["logit_rows"]), segments, longest_of(inputs), chunks)


class Graphs:
    """Recordings of the steps of one model over one allocation of blocks, made as they turn out to be worth it."""

    def __init__(
        self,
        recorder: Recorder,
        staging: Staging,
        block_size: int,
        tables: int,
        compute: Callable[[Step], StepOutput],
        room: Callable[[int], StepOutput],
    ) -> None:
        self._recorder = recorder
        self._staging = staging
        self._block_size = block_size
        self._tables = tables
        self._compute = compute
        self._room = cache(room)  # by rows, which recordings share: logits of a large vocabulary take megabytes
        self._buffer = staging.room(tables * _BUFFER_BYTES)
        self._seen: Counter[Shape] = Counter()
        self._failed = False
        self.recordings: OrderedDict[Shape, Callable[[], None]] = OrderedDict()
        """By shape, the one longest unused first."""

    def clear(self) -> None:
        """Forget all recordings: what they compute on is no longer there."""
        self.recordings.clear()
        self._recorder.forget()
        self._seen.clear()

    def run(self, inputs: StepInputs) -> StepOutput | None:
        """Start a step; its output, which the next step may overwrite. None if it has to be computed as it is."""
        shape = Shape.of(inputs)
        if self._failed or shape.tokens > LARGEST:
            return None
        if shape not in self.recordings:
            self._seen[shape] += 1
            if self._seen[shape] < WORTH:
                return None
        arrays = padded(Step.arrays(inputs, self._block_size), shape)
        places, size = layout(arrays)
        if size > len(self._buffer):
            return None
        self._staging.fill(self._buffer[:size], arrays, places)
        if shape not in self.recordings:
            inputs_there = views(self._buffer, arrays, places)
            rest = self._buffer[places["tables"] :].view(torch.int32)  # later ones may be longer
            inputs_there["tables"] = rest[: len(rest) // self._tables * self._tables].view(-1, self._tables)
            step = Step(**inputs_there, chunks=(), segments=shape.segments, longest=shape.longest)
            if not self._record(shape, step):
                return None
        self.recordings.move_to_end(shape)
        self.recordings[shape]()
        return self._room(shape.rows)

    def _record(self, shape: Shape, step: Step) -> bool:
        """Whether a step could be recorded."""
        while len(self.recordings) >= _MOST:
            self.recordings.popitem(last=False)
        output = self._room(shape.rows)

        def work() -> None:
            for here, found in zip(output, self._compute(step), strict=True):
                here.copy_(found)

        try:
            self.recordings[shape] = self._recorder.record(work)
        except Exception as error:  # those of Triton are no `RuntimeError`
            logger.warning("steps are launched kernel by kernel, for this one can't be a CUDA graph: %s", error)
            self._failed = True
        return not self._failed


def padded(arrays: dict[str, npt.NDArray[Any]], shape: Shape) -> dict[str, npt.NDArray[Any]]:
    """A step's arrays at the sizes of its shape, so that each has its place; the tables vary, and are last."""
    chunks = shape.chunks
    found = {name: array for name, array in arrays.items() if name != "tables"}
    for name, length in (("pasts", chunks), ("begins", chunks + 1), ("table_begins", chunks + 1)):
        array = found[name]
        last = 0 if name == "pasts" else array[-1]
        found[name] = np.concatenate((array, np.full(length - len(array), last, array.dtype)))
    return found | {"tables": arrays["tables"]}
