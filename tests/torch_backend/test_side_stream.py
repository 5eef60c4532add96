"""Blocks that are read beside steps: what that waits for, with a stub for CUDA, which notes what it is asked."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from slipstream.backend.steps import PagedChunk, StepInputs, lay_out
from slipstream.backend.torch.model import TorchModel
from slipstream.backend.torch.plain import PlainOperators
from slipstream.backend.torch.side_stream import SideStream
from slipstream.types import IntArray
from tests.torch_backend.tiny import tiny_folder

pytestmark = pytest.mark.torch


class Cuda:
    """A device that is at work on the first event that isn't over, counted from one."""

    def __init__(self) -> None:
        self.recorded = self.over = 0
        self.waited: list[int] = []
        self.beside = False

    def Stream(self) -> Any:
        return SimpleNamespace(wait_event=lambda event: self.waited.append(event.number))

    def Event(self) -> Any:
        event = SimpleNamespace(number=0, query=lambda: event.number <= self.over)

        def record() -> None:
            assert not self.beside
            self.recorded += 1
            event.number = self.recorded

        event.record = record
        return event

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        assert stream is not None
        self.beside = True
        yield
        self.beside = False


def blocks(*numbers: int) -> IntArray:
    return np.array(numbers, np.int32)


def step(*table: int) -> StepInputs:
    return lay_out([PagedChunk(np.arange(4, dtype=np.int32), 0, blocks(*table), 1)], 4, 1)


@pytest.fixture
def cuda() -> Cuda:
    return Cuda()


@pytest.fixture
def model(tmp_path: Path, cuda: Cuda) -> TorchModel:
    model = TorchModel.load(tiny_folder(tmp_path, "llama", vocabulary=320), torch.device("cpu"), PlainOperators())
    model.queues = True
    model.read_with(SideStream(cuda))
    model.allocate(9)
    cuda.over = cuda.recorded
    return model


def waits(model: TorchModel, cuda: Cuda, *numbers: int) -> list[int]:
    """The events that reading some blocks waits for, counted from the last that was over at first."""
    cuda.waited.clear()
    assert model.read_blocks(blocks(*numbers)).shape[0] == len(numbers)
    return [event - 1 for event in cuda.waited]


def test_reading_waits_for_what_writes_the_blocks_and_for_nothing_else(model: TorchModel, cuda: Cuda) -> None:
    model.start(step(1))
    model.start(step(2))
    model.start(step(1))
    model.copy_block(1, 4)
    model.write_blocks(blocks(5, 6), model.read_blocks(blocks(3, 3)))
    assert not waits(model, cuda, 3)
    assert waits(model, cuda, 2) == [2]
    assert waits(model, cuda, 3, 1) == [3], "the last, which comes behind the first"
    assert waits(model, cuda, 4) == [4]
    assert waits(model, cuda, 1, 6) == [5]
    cuda.over += 3
    model.start(step(7))  # what is over by then is forgotten
    assert not waits(model, cuda, 1, 2)
    assert waits(model, cuda, 2, 7) == [6]


def test_blocks_that_were_just_made_are_waited_for(model: TorchModel, cuda: Cuda) -> None:
    model.allocate(9)
    assert waits(model, cuda, 8) == [1]


def test_it_is_read_beside_steps(cuda: Cuda) -> None:
    side = SideStream(cuda)
    assert side.read(blocks(1), lambda: cuda.beside)
    assert not cuda.beside
