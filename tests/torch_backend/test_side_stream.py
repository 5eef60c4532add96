"""Blocks that are copied to the host beside steps, with a stub for CUDA that copies when it's waited for."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from slipstream.backend import Chunk
from slipstream.backend.steps import PagedChunk, lay_out
from slipstream.backend.store import Exported
from slipstream.backend.torch.backend import TorchBackend
from slipstream.backend.torch.model import TorchModel
from slipstream.backend.torch.plain import PlainOperators
from slipstream.backend.torch.side_stream import SideStream
from slipstream.errors import ModelError
from slipstream.types import IntArray
from tests.torch_backend.tiny import tiny_folder

pytestmark = pytest.mark.torch


class Cuda:
    """A device whose side stream has come no further than somebody has waited for."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.waiters: list[threading.Thread] = []
        self.error: RuntimeError | None = None
        self._beside = False
        self._copies: list[Callable[[], object]] = []

    def Stream(self) -> Any:
        return SimpleNamespace(wait_stream=lambda other: self.events.append(f"behind {other}"))

    def current_stream(self) -> str:
        return "steps"

    def Event(self, *, blocking: bool) -> Any:
        assert blocking
        copies: list[Callable[[], object]] = []

        def record() -> None:
            assert self._beside
            copies.extend(self._copies)

        def synchronize() -> None:
            self.waiters.append(threading.current_thread())
            if self.error is not None:
                raise self.error
            for copy in copies:
                copy()

        return SimpleNamespace(record=record, synchronize=synchronize)

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        copy = torch.Tensor.copy_

        def later(here: torch.Tensor, tensor: torch.Tensor, *, non_blocking: bool) -> None:
            assert non_blocking
            self.events.append("copied")
            self._copies.append(lambda: copy(here, tensor))

        assert stream is not None
        self._beside = True
        with mock.patch.object(torch.Tensor, "copy_", later):
            yield
        self._beside = False

    def gather(self, *numbers: int) -> Callable[[], torch.Tensor]:
        """What makes a tensor, on the stream of the steps."""

        def made() -> torch.Tensor:
            assert not self._beside
            self.events.append("gathered")
            return torch.tensor(numbers, dtype=torch.int16)

        return made


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    cuda = Cuda()
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: cuda.events.append("kept"))
    return cuda


@pytest.fixture
def model(request: pytest.FixtureRequest, tmp_path: Path, cuda: Cuda) -> TorchModel:
    folder = tiny_folder(tmp_path, getattr(request, "param", "llama"), vocabulary=320)
    model = TorchModel.load(folder, torch.device("cpu"), PlainOperators())
    model.queues = True
    model.read_with(SideStream(cuda))
    model.allocate(9)
    return model


def blocks(*numbers: int) -> IntArray:
    return np.array(numbers, np.int32)


def compute(model: TorchModel, table: IntArray, first: int = 0) -> None:
    tokens = np.arange(first, first + 4, dtype=np.int32)
    model.start(lay_out([PagedChunk(tokens, 0, table, 1)], 4, 1))
    model.finish()


def test_a_tensor_is_gathered_among_the_steps_and_copied_beside_them(cuda: Cuda) -> None:
    exported = SideStream(cuda).copy(cuda.gather(1, 2, 3), 6)
    assert cuda.events == ["gathered", "behind steps", "kept", "copied"]
    assert exported.nbytes == 6
    assert not cuda.waiters
    for _ in range(2):
        assert exported.wait().tolist() == [1, 2, 3]
    assert len(cuda.waiters) == 1


@pytest.mark.parametrize("overwrite", ["step", "copy", "write", "allocate"])
def test_blocks_arrive_as_they_were_whatever_is_written_to_them_meanwhile(model: TorchModel, overwrite: str) -> None:
    compute(model, blocks(1))
    compute(model, blocks(2, 3))
    before, other = (model.read_blocks(blocks(number)) for number in (1, 8))
    expected = model.read_blocks(blocks(1)).wait()
    match overwrite:
        case "step":
            compute(model, blocks(1), first=9)
        case "copy":
            model.copy_block(8, 1)
        case "write":
            model.write_blocks(blocks(1), np.ones_like(expected))
        case "allocate":
            model.allocate(9)
    assert np.array_equal(before.wait(), expected)
    assert not np.array_equal(model.read_blocks(blocks(1)).wait(), expected)
    assert not other.wait().any()


def test_steps_wait_for_no_copy(model: TorchModel, cuda: Cuda) -> None:
    compute(model, blocks(1))
    exported = model.read_blocks(blocks(1))
    compute(model, blocks(1))
    model.copy_block(1, 2)
    assert not cuda.waiters
    with ThreadPoolExecutor(1) as pool:
        pool.submit(exported.wait).result()
    assert threading.current_thread() not in cuda.waiters


def test_a_copy_that_fails_is_an_error_for_who_waits_and_for_nobody_else(model: TorchModel, cuda: Cuda) -> None:
    failed = model.read_blocks(blocks(1))
    cuda.error = RuntimeError("the bus is on fire")
    for _ in range(2):
        with pytest.raises(ModelError, match="on fire"):
            failed.wait()
    cuda.error = None
    compute(model, blocks(1))
    assert model.read_blocks(blocks(1)).wait().any()


def test_a_copy_that_cannot_begin_is_an_error_for_who_waits(cuda: Cuda) -> None:
    def full() -> torch.Tensor:
        raise torch.OutOfMemoryError("the device is full")

    exported = SideStream(cuda).copy(full, 100)
    assert exported.nbytes == 100
    with pytest.raises(ModelError, match="is full"):
        exported.wait()


def test_pinned_memory_is_bounded(cuda: Cuda) -> None:
    side = SideStream(cuda, most_pinned=20)

    def copy(number: int) -> Exported:
        return side.copy(cuda.gather(*[number] * 4), 8)

    first, second = copy(1), copy(2)
    assert not cuda.waiters
    third = copy(3)
    assert len(cuda.waiters) == 1, "the oldest made room"
    second.wait()
    fourth = copy(4)
    del third
    fifth = copy(5)  # what nobody has any more, or was waited for, takes no room
    assert len(cuda.waiters) == 2
    assert [exported.wait()[0] for exported in (first, second, fourth, fifth)] == [1, 2, 4, 5]
    large = side.copy(cuda.gather(*range(100)), 200)  # alone
    assert large.wait().tolist() == [*range(100)]


def test_a_copy_that_fails_while_it_makes_room_is_an_error_for_who_waits_for_it(cuda: Cuda) -> None:
    side = SideStream(cuda, most_pinned=8)
    first = side.copy(cuda.gather(1, 2, 3, 4), 8)
    cuda.error = RuntimeError("the bus is on fire")
    second = side.copy(cuda.gather(5, 6, 7, 8), 8)
    cuda.error = None
    assert second.wait()[0] == 5
    with pytest.raises(ModelError, match="on fire"):
        first.wait()


@pytest.mark.parametrize("model", ["llama", "gemma3_text"], indirect=True)
def test_what_a_store_exports_outlives_its_state(model: TorchModel) -> None:
    backend = TorchBackend(model, [PlainOperators()], kv_memory=60 * model.block_bytes)
    store, tokens = backend.store, np.arange(70, dtype=np.int32)
    state = store.open(80)
    backend.launch([Chunk(state, tokens, 1)]).wait()
    exported = store.export(state, 0, 70)
    expected = store.export(state, 0, 70).wait()
    store.release(state)
    while store.open_cost(80) <= store.free:
        last = store.open(80)
        backend.launch([Chunk(last, tokens[::-1].copy(), 1)]).wait()
    assert np.array_equal(exported.wait(), expected)
    assert not np.array_equal(store.export(last, 0, 70).wait(), expected)
