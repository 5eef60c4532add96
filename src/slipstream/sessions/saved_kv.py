"""KV on disk: one file for each part of a conversation, so that saving a turn writes its new tokens alone."""

import contextlib
import hashlib
import logging
import os
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import safetensors.numpy
import xxhash
from safetensors import SafetensorError, safe_open

from slipstream.backend import Blob
from slipstream.chat.messages import Digest
from slipstream.sessions.private import open_private, private_folder
from slipstream.types import IntArray

logger = logging.getLogger(__name__)

FORMAT = "1"
_SUFFIX = ".safetensors"


class SavedKV:
    """Files in a folder, one for each part of a conversation; bounded in bytes, least recently used out.

    A file is a tensor `kv` uint16 [blocks, ...], with metadata: the format's version, the `fingerprint` of model and
    backend, a digest of all tokens from the conversation's start, and a checksum. It is written beside its place,
    synced and renamed, so it is whole or absent; what is damaged all the same is found out, removed and reported.
    With `anew` the files that are there are removed, since nobody knows what they belong to.
    Thread-safe; nobody waits for another's reading or writing.
    """

    def __init__(self, folder: Path, fingerprint: str, max_bytes: int, *, anew: bool = False) -> None:
        self._folder = folder
        self._fingerprint = fingerprint
        self._max_bytes = max_bytes
        self._lock = threading.Lock()  # for the sizes, not for the files
        private_folder(folder)
        for left_over in [*folder.glob("*.tmp"), *(folder.glob(f"*{_SUFFIX}") if anew else ())]:
            left_over.unlink(missing_ok=True)
        found = sorted((path.stat().st_mtime, path) for path in folder.glob(f"*{_SUFFIX}"))
        self._sizes = {path: path.stat().st_size for _, path in found}  # least recently used first
        self.total_bytes = sum(self._sizes.values())
        self.removals = 0
        """Files that were removed since the start."""
        self._make_room(0)

    def size(self, key: Digest) -> int:
        """Bytes of the file for a part, 0 if there is none."""
        return self._sizes.get(self._path(key), 0)

    def save(self, key: Digest, tokens: IntArray, contents: Blob) -> int:
        """Write the part that ends the conversation `tokens`; returns the bytes written.

        A part that is larger than all of the budget is not written. Raises `OSError`.
        """
        metadata = {
            "format": FORMAT,
            "fingerprint": self._fingerprint,
            "tokens": _digest(tokens),
            "checksum": _checksum(contents),
        }
        data = safetensors.numpy.save({"kv": contents}, metadata)
        if len(data) > self._max_bytes:
            return 0
        path = self._path(key)
        self._make_room(len(data))
        _write_atomically(path, data)
        self._note(path, len(data))
        return len(data)

    def load(self, key: Digest, tokens: IntArray) -> Blob | None:
        """Read the part that ends the conversation `tokens`; None, with a warning, if it's missing or no good."""
        path = self._path(key)
        if (size := self._sizes.get(path)) is None:
            return None
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                contents: Blob = file.get_tensor("kv")
            self._check(metadata, tokens, contents)
        except (OSError, SafetensorError, ValueError, TypeError) as error:  # the last for a type numpy has not
            logger.warning("saved KV is no good and removed, to be computed again: %s: %s", path.name, error)
            self._remove(path)
            return None
        self._note(path, size)
        return contents

    def remove(self, keys: Iterable[Digest]) -> None:
        """Remove the files of some parts."""
        for path in map(self._path, keys):
            self._remove(path)

    def touch(self, keys: Iterable[Digest]) -> None:
        """Count the files of some parts as used, in this order."""
        for path in map(self._path, keys):
            if size := self._sizes.get(path, 0):
                self._note(path, size)

    def _check(self, metadata: Mapping[str, str], tokens: IntArray, contents: Blob) -> None:
        """Raise `ValueError` if a file is not what it should be."""
        if metadata.get("format") != FORMAT:
            raise ValueError(f"it has format {metadata.get('format')!r}, not {FORMAT!r}")
        if metadata.get("fingerprint") != self._fingerprint:
            raise ValueError("it was written by another model, runtime or machine")
        if metadata.get("tokens") != _digest(tokens):
            raise ValueError("it holds another conversation")
        if metadata.get("checksum") != _checksum(contents):
            raise ValueError("its checksum is wrong")

    def _make_room(self, size: int) -> None:
        while self.total_bytes + size > self._max_bytes:
            with self._lock:
                oldest = next(iter(self._sizes), None)
            if oldest is None:
                return
            self._remove(oldest)

    def _note(self, path: Path, size: int) -> None:
        """Count a file as used now."""
        with self._lock:
            self.total_bytes += size - self._sizes.pop(path, 0)
            self._sizes[path] = size
        with contextlib.suppress(OSError):
            os.utime(path)

    def _remove(self, path: Path) -> None:
        with self._lock:
            self.total_bytes -= self._sizes.pop(path, 0)
            self.removals += 1
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)

    def _path(self, key: Digest) -> Path:
        return self._folder / f"{key.hex()}{_SUFFIX}"


def _write_atomically(path: Path, data: bytes) -> None:
    beside = path.with_suffix(f".{threading.get_ident()}.tmp")
    try:
        with open_private(beside) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _digest(tokens: IntArray) -> str:
    return hashlib.blake2b(np.ascontiguousarray(tokens).tobytes(), digest_size=16).hexdigest()


def _checksum(contents: Blob) -> str:
    hasher = xxhash.xxh3_128(f"{contents.dtype} {contents.shape}".encode())
    hasher.update(np.ascontiguousarray(contents).data)
    return hasher.hexdigest()
