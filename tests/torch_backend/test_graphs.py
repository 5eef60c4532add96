"""Small steps that are recorded and replayed: with a stub for CUDA graphs, on operators that see tensors alone."""

import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slipstream.backend.logits import Logits
from slipstream.backend.steps import PagedChunk, StepClass
from slipstream.backend.torch import graphs
from slipstream.backend.torch.backend import TorchBackend
from slipstream.backend.torch.graphs import LARGEST, WORTH, CudaRecorder, Shape
from slipstream.backend.torch.kernel_operators import KernelOperators
from slipstream.backend.torch.model import TorchModel
from slipstream.backend.torch.operators import AttentionShape, Operators, Step
from slipstream.backend.torch.plain import PlainOperators
from slipstream.models import Model
from slipstream.runtime import BACKENDS
from slipstream.sampling import Choice, Row, Sampler, SamplingParams
from tests.engine import exactness
from tests.torch_backend.tiny import tiny_folder

pytestmark = pytest.mark.torch
CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model whose vocabulary is small, for Triton's interpreter is slow."""
    return tiny_folder(tmp_path, "llama", vocabulary=320)


class Recorder:
    """Does work again to replay it; as with a graph, recording computes nothing."""

    def __init__(self, error: str = "") -> None:
        self.error = error
        self.replayed = 0

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        if self.error:
            raise RuntimeError(self.error)

        def replay() -> None:
            self.replayed += 1
            work()

        return replay

    def forget(self) -> None:
        pass


class FromTensors(PlainOperators):
    """Operators that know of chunks what a kernel knows."""

    name = "from tensors"
    recordable = True

    def __init__(self) -> None:
        self.compared = 0

    def argmax(self, logits: torch.Tensor, masked: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
        self.compared += 1
        return super().argmax(logits, masked)

    def attend(
        self, query: torch.Tensor, kv: torch.Tensor, step: Step, shape: AttentionShape, sinks: torch.Tensor | None
    ) -> torch.Tensor:
        lengths, pasts = (step.begins[1:] - step.begins[:-1]).tolist(), step.pasts.tolist()
        chunks = [each for each in zip(pasts, lengths, step.table_begins.tolist()[:-1], strict=True) if each[1]]
        assert all((past + length - 1) // 256 < step.segments for past, length, _ in chunks)
        return super().attend(query, kv, replace(step, chunks=tuple(chunks)), shape, sinks)


def model_of(folder: Path, operators: Operators, recorder: Recorder | None = None) -> TorchModel:
    model = TorchModel.load(folder, CPU, operators)
    if recorder is not None:
        model.record_with(recorder)
    return model


@pytest.mark.parametrize("tiny", ["llama"], indirect=True)
def test_the_same_tokens_whatever_is_replayed(
    tiny: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder()
    monkeypatch.setattr(graphs, "WORTH", 1)  # every small step is replayed
    monkeypatch.setattr(graphs, "_MOST", 6)  # some are forgotten and made again

    def load(model: Model, config: Any) -> Any:
        loaded = model_of(model.path, FromTensors(), recorder)
        return lambda progress: TorchBackend(loaded, [loaded.operators], kv_memory=config.kv_memory, progress=progress)

    monkeypatch.setitem(BACKENDS, "safetensors", load)
    with caplog.at_level(logging.WARNING):
        assert exactness.run(8, 5, tiny, longest=320) >= 8
    assert recorder.replayed > 20
    assert not caplog.records, "steps are exact"


def steps_of(count: int) -> list[list[PagedChunk]]:
    """Steps of one shape, but of different chunks: two sequences go on by three tokens and one, in turn."""
    tables = np.arange(1, 41, dtype=np.int32).reshape(2, 20)
    tokens = np.random.default_rng(0).integers(0, 300, (2, 400)).astype(np.int32)
    steps, lengths = [], [0, 0]
    for number in range(count):
        chunks = []
        for sequence, more in enumerate((3, 1) if number % 2 else (1, 3)):
            begin = lengths[sequence]
            lengths[sequence] += more
            chunks.append(PagedChunk(tokens[sequence, begin : begin + more], begin, tables[sequence], 1))
        steps.append(chunks)
    return steps


def test_replayed_steps_have_the_bits_of_others(folder: Path) -> None:
    step_class = StepClass((8,), (2,))
    found = []
    for recorder in (None, Recorder()):
        model = model_of(folder, FromTensors(), recorder)
        model.allocate(41)
        found.append([step_class.run(model, step).copy() for step in steps_of(140)])  # into the second segment
        if recorder is not None:
            assert recorder.replayed == 140 - 2 * (WORTH - 1)
    assert all(np.array_equal(*pair) for pair in zip(*found, strict=True))


def test_replayed_steps_find_the_likeliest_tokens(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a choice takes these: what it costs the host is to fetch them."""
    monkeypatch.setattr(graphs, "WORTH", 1)
    operators, recorder = FromTensors(), Recorder()
    model = model_of(folder, operators, recorder)
    model.allocate(41)
    sampler = Sampler(SamplingParams(temperature=0), 0, np.empty(0, np.int32), 320)
    rows = [Row(1, sampler, 0), Row(0, sampler, 0)]
    before: tuple[Logits, list[Choice]] | None = None
    for number, step in enumerate(steps_of(12), start=1):
        logits, choices = StepClass((8,), (2,)).start(model, step)(rows)
        assert choices == [Choice(token) for token in logits.host().argmax(1)[::-1].tolist()]
        assert recorder.replayed == operators.compared == number
        if before is not None:
            assert before[0].choose(rows) == before[1] != choices, "what is kept isn't overwritten"
        before = logits.kept(2), choices
    places = set()
    for size in (8, 12, 16):
        logits, _ = StepClass((size,), (2,)).start(model, steps_of(1)[0])(())
        places.add(logits._output.logits.data_ptr())  # type: ignore[attr-defined]
    assert len(places) == 1, "recordings share room for logits"


def test_the_kernels_take_padded_steps(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "WORTH", 1)  # each is slow here
    step_class = StepClass((8,), (2,))
    found = []
    for operators, recorder in ((PlainOperators(), None), (KernelOperators(), Recorder())):
        model = model_of(folder, operators, recorder)
        model.allocate(41)
        found.append([step_class.run(model, step).copy() for step in steps_of(2)])
        assert recorder is None or recorder.replayed == 2
    for plain, replayed in zip(*found, strict=True):
        np.testing.assert_allclose(replayed, plain, atol=1e-5)


def test_what_cannot_be_recorded_is_computed_as_it_is(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    step_class = StepClass((8,), (2,))
    model = model_of(folder, FromTensors(), Recorder("operation not permitted when stream is capturing"))
    model.allocate(41)
    with caplog.at_level(logging.WARNING):
        found = [step_class.run(model, step).copy() for step in steps_of(6)]
    assert [record.message for record in caplog.records if "not permitted" in record.message], caplog.records
    assert len([record for record in caplog.records if record.name == graphs.__name__]) == 1
    other = model_of(folder, FromTensors())
    other.allocate(41)
    assert all(np.array_equal(one, step_class.run(other, step)) for one, step in zip(found, steps_of(6), strict=True))


class Capture:
    """Stands for `torch.cuda`: how it takes memory for graphs, and what it leaves if a capture fails."""

    def __init__(self) -> None:
        self.pools: dict[int, int] = {}
        """Graphs by the memory that they share."""
        self.stream = "usual"
        self.error: Exception | None = None

    def current_stream(self) -> str:
        return self.stream

    def set_stream(self, stream: str) -> None:
        self.stream = stream

    def graph_pool_handle(self) -> int:
        return len(self.pools)

    class CUDAGraph:
        def replay(self) -> None:
            pass

    @contextmanager
    def graph(self, graph: CUDAGraph, pool: int, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local", "other threads copy meanwhile"
        if self.pools.get(pool) == 0:
            raise RuntimeError("it->second->use_count > 0 INTERNAL ASSERT FAILED")
        self.pools[pool] = self.pools.get(pool, 0) + 1
        weakref.finalize(graph, self._release, pool)
        self.stream = "of the capture"
        yield
        if self.error is not None:
            raise self.error
        self.stream = "usual"

    def _release(self, pool: int) -> None:
        self.pools[pool] -= 1


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> Capture:
    capture = Capture()
    for name in ("current_stream", "set_stream", "graph_pool_handle", "CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(capture, name))
    return capture


def test_graphs_share_memory_until_all_are_forgotten(folder: Path, capture: Capture) -> None:
    model = TorchModel.load(folder, CPU, FromTensors())
    model.record_with(CudaRecorder())
    for number in range(1, 4):
        model.allocate(41)
        for size in (8, 12):
            for step in steps_of(WORTH):
                StepClass((size,), (2,)).run(model, step)
        assert [*capture.pools.values()] == [0] * (number - 1) + [2]


@pytest.mark.parametrize("error", [RuntimeError("not permitted"), type("OutOfResources", (Exception,), {})()])
def test_a_capture_that_fails_leaves_no_trace(
    folder: Path, capture: Capture, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    model = TorchModel.load(folder, CPU, FromTensors())
    model.record_with(CudaRecorder())
    model.allocate(41)
    capture.error = error
    for step in steps_of(WORTH):
        StepClass((8,), (2,)).run(model, step)
    assert "kernel by kernel" in caplog.text
    assert capture.stream == "usual"


def test_large_steps_are_not_recorded_and_blocks_elsewhere_end_recordings(folder: Path) -> None:
    recorder = Recorder()
    model = model_of(folder, FromTensors(), recorder)
    model.allocate(41)
    large = StepClass((LARGEST + 1,), (2,))
    for step in steps_of(WORTH + 1):
        large.run(model, step)
    assert recorder.replayed == 0
    small = StepClass((8,), (2,))
    for _ in range(2):
        model.allocate(41)
        replayed = recorder.replayed
        for step in steps_of(WORTH):
            small.run(model, step)
        assert recorder.replayed == replayed + 1


def test_shapes_are_few() -> None:
    def shape(past: int) -> Shape:
        chunk = PagedChunk(np.ones(2, np.int32), past, np.arange(2000, dtype=np.int32), 1)
        return Shape.of(StepClass((8,), (1,)).lay_out([chunk])[0])

    assert {shape(past).segments for past in range(0, 60_000, 50)} == {1, 2, 4, 8, 16, 32, 64, 128, 256}
    assert [shape(past).segments for past in (0, 254, 255, 510, 511, 1023)] == [1, 1, 2, 2, 4, 8]
    assert shape(0).chunks == 4, "that one, padding, the empty one, and one for four to be a power of two"
