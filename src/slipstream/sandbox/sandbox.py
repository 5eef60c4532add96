"""The parent's side: calls go to a worker process, which is killed when one takes too much, and started anew."""

import contextlib
import json
import logging
import os
import pickle
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slipstream.errors import SlipstreamError

logger = logging.getLogger(__name__)

_KEPT = ("HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PATH", "TZ")
"""What the worker gets of the environment; keys and tokens may be among the rest."""
_START_SECONDS = 300.0
_WALL_PER_CPU_SECOND = 30.0
"""How much longer than its processor time a call may take on a machine that is busy."""
_MOST_REPLIED = 256 * 2**20


class SandboxError(SlipstreamError):
    """What the worker raised, in its words."""


class SandboxDiedError(SandboxError):
    """The worker process ended during a call: it took too much, or crashed."""


@dataclass(frozen=True, slots=True)
class Allowance:
    """What one call may take."""

    seconds: float = 5.0
    """Processor time, so that a verdict doesn't depend on what else the machine does."""
    memory: int = 2**30
    """Bytes of address space beyond what the worker has when it's ready."""
    stack: int = 8 * 2**20
    """Bytes of the stack of the thread that runs it."""


class Sandbox:
    """A worker process with an object in it whose methods are called, one call at a time.

    `factory` names what makes the object, as `package.module:name`; it's called with `arguments`, which are pickled.
    Results are JSON. What comes back is parsed, never unpickled: the worker isn't trusted. It starts with the first
    call, or with `start`, and again after it died. It ends with this process. Thread-safe.
    """

    def __init__(self, factory: str, *arguments: Any, allowance: Allowance | None = None) -> None:
        self.allowance = allowance or Allowance()
        self.deaths = 0
        """How often the worker ended during a call."""
        self._made_of = pickle.dumps((factory, arguments, self.allowance))
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._ready = False

    def call(self, method: str, *arguments: Any) -> Any:
        """What a method of the object returns.

        Raises `SandboxError` with the words of what it raised, `SandboxDiedError` if the worker ended.
        """
        request = pickle.dumps((method, arguments))
        with self._lock, self._mourning():
            self._start()
            if not self._ready:
                self._receive(_START_SECONDS)
                self._ready = True
            self._send(request)
            reply = self._receive(self.allowance.seconds * _WALL_PER_CPU_SECOND)
        if "error" in reply:
            raise SandboxError(str(reply["error"]))
        return reply["result"]

    def close(self) -> None:
        """End the worker."""
        with self._lock:
            self._end()

    def _start(self) -> None:
        if self._process is not None:
            return
        ours, theirs = socket.socketpair()
        child = Path(__file__).with_name("child.py")
        paths = os.pathsep.join(path for path in sys.path if path)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(child), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # a crash may quote what it was given
                env={name: os.environ[name] for name in _KEPT if name in os.environ} | {"PYTHONPATH": paths},
            )
        self._socket, self._ready = ours, False
        with contextlib.suppress(OSError):  # the first call finds out
            self._send(self._made_of)

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._socket is not None:
            self._socket.close()
        self._process = self._socket = None

    @contextlib.contextmanager
    def _mourning(self) -> Iterator[None]:
        """End what is left of the worker if it doesn't answer."""
        try:
            yield
        except (OSError, ValueError, TypeError) as error:
            self._end()
            self.deaths += 1
            logger.warning("a sandbox ended during a call, and is started anew: %s", error or type(error).__name__)
            raise SandboxDiedError("it takes too much time, memory or stack") from error

    def _send(self, message: bytes) -> None:
        assert self._socket is not None
        self._socket.settimeout(_START_SECONDS)
        self._socket.sendall(struct.pack("<Q", len(message)) + message)

    def _receive(self, seconds: float) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        (size,) = struct.unpack("<Q", self._read(8, deadline))
        if size > _MOST_REPLIED:
            raise ValueError("the reply is too large")
        return dict(json.loads(self._read(size, deadline)))

    def _read(self, size: int, deadline: float) -> bytes:
        assert self._socket is not None
        pieces = bytearray()
        while len(pieces) < size:
            self._socket.settimeout(max(0.001, deadline - time.monotonic()))
            piece = self._socket.recv(min(2**20, size - len(pieces)))
            if not piece:
                raise ConnectionError("it is gone")
            pieces += piece
        return bytes(pieces)
