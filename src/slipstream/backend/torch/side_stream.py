"""Keys and values that are copied to the host while the device computes."""

from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from slipstream.types import IntArray

Found = TypeVar("Found")


class SideStream:
    """A stream for reading blocks: behind the work that may write them, and beside all other.

    Reading ends before anything else is launched, so nothing has to wait for it. For one thread.
    """

    def __init__(self, cuda: Any = torch.cuda) -> None:
        self._cuda = cuda
        self._stream = cuda.Stream()
        self._writes: deque[tuple[npt.NDArray[Any], Any]] = deque()

    def wrote(self, blocks: npt.NDArray[Any]) -> None:
        """Note that what was launched just now may write these blocks."""
        while self._writes and self._writes[0][1].query():  # work is over in the order in which it was launched
            self._writes.popleft()
        event = self._cuda.Event()
        event.record()
        self._writes.append((blocks, event))

    def read(self, blocks: IntArray, copy: Callable[[], Found]) -> Found:
        """What `copy` brings to the host; it waits there for the device."""
        last = next((event for written, event in reversed(self._writes) if np.isin(blocks, written).any()), None)
        if last is not None:
            self._stream.wait_event(last)
        with self._cuda.stream(self._stream):
            return copy()
