"""Weight files in memory: mapped, not read, and given back when nobody needs them."""

import ctypes
import mmap
from pathlib import Path

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

_MAP_FIXED = 0x10
_DONT_NEED = 4
_MAPS = Path("/proc/self/maps")


def joined(*files: Path) -> Bytes:
    """Files as one array, each mapped to the first page behind the one before.

    Raises:
        OSError: a file can't be mapped.
    """
    sizes = [file.stat().st_size for file in files]
    whole = mmap.mmap(-1, max(1, sum(map(whole_pages, sizes))))  # addresses alone; its end takes the files along
    array = np.frombuffer(whole, np.uint8)
    address = array.ctypes.data
    for file, size in zip(files, sizes, strict=True):
        if size:
            with file.open("rb") as opened:
                _map(address, size, opened.fileno())
        address += whole_pages(size)
    return array


def whole_pages(size: int) -> int:
    """A size in bytes, rounded up to whole pages."""
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


def forget_pages(file: Path) -> None:
    """Drop what of a mapped file is in this process's memory; it's read again where it's needed.

    Does nothing where the system doesn't say what is mapped.
    """
    if not _MAPS.exists():
        return
    library = ctypes.CDLL(None)
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for line in _MAPS.read_text().splitlines():
        span, access, *_, path = line.split(maxsplit=5)
        if path == str(file.resolve()) and access == "r--p":  # never written to, so that nothing is lost
            start, end = (int(address, 16) for address in span.split("-"))
            library.madvise(start, end - start, _DONT_NEED)


def _map(address: int, size: int, descriptor: int) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    flags = mmap.MAP_PRIVATE | _MAP_FIXED
    if library.mmap(address, size, mmap.PROT_READ, flags, descriptor, 0) != address:
        raise OSError(ctypes.get_errno(), "a file can't be mapped")
