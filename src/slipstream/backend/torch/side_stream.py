"""Keys and values that are copied to the host while the device computes the next steps."""

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch

from slipstream.backend.store import Blob, Exported
from slipstream.errors import ModelError

_MOST_PINNED = 256 * 2**20
"""Bytes of pinned memory, and of the device's, that copies take together; a single one may take more."""


class SideStream:
    """A stream that copies tensors to the host, beside the steps on theirs.

    A copy stays in pinned memory until it is waited for. If copies would take more of it than `most_pinned`, `copy`
    first waits for the oldest ones and moves them out itself. One thread calls `copy`; any thread waits.
    """

    def __init__(self, cuda: Any = torch.cuda, *, most_pinned: int = _MOST_PINNED) -> None:
        self._cuda = cuda
        self._stream = cuda.Stream()
        self._most_pinned = most_pinned
        self._copies: list[weakref.ref[_Copy]] = []  # oldest first; one that nobody has any more takes no memory

    def copy(self, gather: Callable[[], torch.Tensor], nbytes: int) -> Exported:
        """Start to copy an int16 tensor of so many bytes, which `gather` makes. Errors go to whoever waits."""
        self._make_room(nbytes)
        try:
            # This runs on the stream of the steps: behind those that wrote what the tensor is made of, and before any
            # that overwrites it, since they have yet to be launched. From then on, the tensor has memory of its own.
            tensor = gather()
            self._stream.wait_stream(self._cuda.current_stream())
            here = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            tensor.record_stream(self._stream)  # its memory isn't used again before it's copied
            with self._cuda.stream(self._stream):
                here.copy_(tensor, non_blocking=True)
                arrived = self._cuda.Event(blocking=True)  # a thread that waits leaves its core to the engine
                arrived.record()
        except RuntimeError as error:
            failed: Future[Blob] = Future()
            failed.set_exception(_error(error))
            return Exported(nbytes, failed.result)
        copy = _Copy(here, arrived)
        self._copies.append(weakref.ref(copy))
        return Exported(nbytes, copy.wait)

    def _make_room(self, nbytes: int) -> None:
        copies = [copy for each in self._copies if (copy := each()) is not None and copy.pinned]
        while copies and nbytes + sum(copy.pinned for copy in copies) > self._most_pinned:
            copies.pop(0).unpin()
        self._copies = [weakref.ref(copy) for copy in copies]


class _Copy:
    """A tensor that is being copied to pinned memory, and leaves it when it's waited for."""

    def __init__(self, here: torch.Tensor, arrived: Any) -> None:
        self._here: torch.Tensor | None = here
        self._arrived = arrived
        self._found: Future[Blob] = Future()
        self._lock = threading.Lock()
        self.pinned = here.nbytes
        """Bytes of pinned memory that it has."""

    def wait(self) -> Blob:
        """What was copied, uint16; raises `ModelError` if it failed."""
        self.unpin()
        return self._found.result()

    def unpin(self) -> None:
        """Wait until it's there or has failed, and give back the pinned memory."""
        with self._lock:
            if self._here is None:
                return
            try:
                self._arrived.synchronize()
                self._found.set_result(self._here.numpy().view(np.uint16).copy())
            except RuntimeError as error:
                self._found.set_exception(_error(error))
            self._here, self.pinned = None, 0


def _error(error: RuntimeError) -> ModelError:
    return ModelError(f"keys and values can't be copied to the host: {error}")
