"""What travels between the host and the device: many small arrays in one copy, through memory that is pinned."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Arrays = Mapping[str, npt.NDArray[Any]]

_ALIGNMENT = 16
"""Bytes at whose multiples arrays begin: a kernel is compiled anew for addresses that are less even."""
_LEAST = 1 << 16
"""Bytes that buffers have at least."""


class Staging:
    """Buffers of the host from which a GPU copies while both go on. On a processor, arrays are just copied.

    For one thread.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._gpu = device.type == "cuda"
        self._outgoing, self._incoming = self._buffer(_LEAST), self._buffer(_LEAST)
        self._sent = torch.cuda.Event() if self._gpu else None

    def upload(self, arrays: Arrays) -> dict[str, torch.Tensor]:
        """Copies on the device, by name."""
        places, size = layout(arrays)
        there = torch.empty(size, dtype=torch.uint8, device=self._device)
        self.fill(there, arrays, places)
        return views(there, arrays, places)

    def fill(self, there: torch.Tensor, arrays: Arrays, places: Mapping[str, int]) -> None:
        """Copy arrays to their places in bytes on the device, which have room for them and no more."""
        size = len(there)
        if len(self._outgoing) < size:
            self._outgoing = self._buffer(2 * size)
        if self._sent is not None:
            self._sent.synchronize()  # of the copy before
        host = self._outgoing.numpy()
        for name, array in arrays.items():
            begin = places[name]
            host[begin : begin + array.nbytes].view(array.dtype)[:] = array.reshape(-1)
        there.copy_(self._outgoing[:size], non_blocking=True)
        if self._sent is not None:
            self._sent.record()

    def room(self, size: int) -> torch.Tensor:
        """So many bytes on the device, to upload into."""
        return torch.zeros(size, dtype=torch.uint8, device=self._device)

    def fetch(self, tensor: torch.Tensor) -> npt.NDArray[Any]:
        """An array on the host, once the device has come to it; valid until the next is fetched."""
        if not self._gpu:
            found: npt.NDArray[Any] = tensor.numpy()
            return found
        size = tensor.numel() * tensor.element_size()
        if len(self._incoming) < size:
            self._incoming = self._buffer(2 * size)
        here = self._incoming[:size].view(tensor.dtype).view(tensor.shape)
        here.copy_(tensor, non_blocking=True)
        torch.cuda.current_stream(self._device).synchronize()
        received: npt.NDArray[Any] = here.numpy()
        return received

    def send(self, array: npt.NDArray[Any]) -> torch.Tensor:
        """A copy of a small array on the device, through memory of its own: nothing waits for uploads before it."""
        here = torch.from_numpy(array)
        return here.pin_memory().to(self._device, non_blocking=True) if self._gpu else here

    def _buffer(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=self._gpu)


def layout(arrays: Arrays) -> tuple[dict[str, int], int]:
    """Where arrays begin that lie one behind the other, and the bytes that they take."""
    places, size = {}, 0
    for name, array in arrays.items():
        places[name] = size
        size += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    return places, size


def views(there: torch.Tensor, arrays: Arrays, places: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """Arrays that lie in bytes on the device."""
    return {
        name: there[places[name] : places[name] + array.nbytes].view(_kind(array.dtype)).view(array.shape)
        for name, array in arrays.items()
    }


@cache
def _kind(dtype: np.dtype[Any]) -> torch.dtype:
    found: torch.dtype = torch.from_numpy(np.empty(0, dtype)).dtype
    return found
