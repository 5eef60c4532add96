"""Memory as the runtime's kernels like it."""

import numpy as np
import numpy.typing as npt

_ALIGNMENT = 64


def zeros_aligned(shape: tuple[int, ...]) -> npt.NDArray[np.uint16]:
    """Zeroed 16-bit storage whose first element starts a cache line; pages become resident when written."""
    count = int(np.prod(shape))
    raw = np.zeros(count * 2 + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + count * 2].view(np.uint16).reshape(shape)
