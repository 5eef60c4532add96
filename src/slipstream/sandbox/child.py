"""The worker's side, a program of its own: `child.py FILE_DESCRIPTOR`.

It answers requests on the socket until that closes. A call that takes more processor time than it may is ended by the
system, with the process; so is one that overruns its stack. More memory than it may have is not given to it, and ends
it too.
"""

import importlib
import json
import os
import pickle
import resource
import signal
import socket
import struct
import sys
import threading
import types
from pathlib import Path
from typing import Any

_PACKAGES = Path(__file__).parents[2]


def main() -> None:
    """Make the object, and serve its methods."""
    with socket.socket(fileno=int(sys.argv[1])) as connection, connection.makefile("rwb") as stream:
        factory, arguments, allowance = pickle.loads(_read(stream))  # from the parent, which is trusted
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        served = _found(factory)(*arguments)
        pages = int(Path("/proc/self/statm").read_text().split()[0]) if sys.platform == "linux" else 0
        limit = pages * resource.getpagesize() + allowance.stack + allowance.memory
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        signal.signal(signal.SIGPROF, signal.SIG_DFL)  # which ends the process, whatever it does
        threading.stack_size(allowance.stack)
        serving = threading.Thread(target=_serve, args=(stream, served, allowance.seconds))
        serving.start()
        serving.join()


def _serve(stream: Any, served: Any, seconds: float) -> None:
    """Answer requests, on a thread whose stack is as large as was asked for."""
    _write(stream, {"result": None})
    while request := _read(stream):
        method, arguments = pickle.loads(request)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        reply = _reply(served, method, arguments)
        signal.setitimer(signal.ITIMER_PROF, 0)
        _write(stream, reply)


def _found(factory: str) -> Any:
    """What makes the object. Its packages stay bare: what they export for others takes a second to import."""
    module, _, name = factory.partition(":")
    parts = module.split(".")
    for end in range(1, len(parts)):
        package = types.ModuleType(".".join(parts[:end]))
        if (folder := _PACKAGES.joinpath(*parts[:end])).is_dir():
            package.__path__ = [str(folder)]
            sys.modules[package.__name__] = package
    return getattr(importlib.import_module(module), name)


def _reply(served: Any, method: str, arguments: tuple[Any, ...]) -> dict[str, Any]:
    """What a call comes to. One that runs out of memory ends the process: what it holds on to would fail the next."""
    try:
        return {"result": getattr(served, method)(*arguments)}
    except MemoryError:
        os._exit(1)
    except BaseException as error:  # libraries may raise such, too
        return {"error": str(error) or type(error).__name__}


def _read(stream: Any) -> bytes:
    header = stream.read(8)
    return bytes(stream.read(struct.unpack("<Q", header)[0])) if len(header) == 8 else b""


def _write(stream: Any, reply: dict[str, Any]) -> None:
    message = json.dumps(reply).encode()
    stream.write(struct.pack("<Q", len(message)) + message)
    stream.flush()


if __name__ == "__main__":
    main()
