"""Running the server: from a socket that listens to a clean end."""

import asyncio
import contextlib
import faulthandler
import ipaddress
import socket
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from slipstream.config import ServerConfig
from slipstream.errors import SlipstreamError
from slipstream.lasting import lasting
from slipstream.processor import give_back_memory, share_heaps
from slipstream.runtime import Runtime
from slipstream.server.connections import TimedProtocol
from slipstream.server.keys import KeyRing
from slipstream.server.log_format import set_up_logs

if TYPE_CHECKING:
    from fastapi import FastAPI

_LAST_WORDS_SECONDS = 2.0
"""For clients to read that their answer won't be finished, when the engine has been closed."""


def run(load: Callable[[], Runtime], config: ServerConfig) -> None:
    """Load an engine, serve it until SIGINT or SIGTERM, and close it; returns after a clean end.

    Once the socket listens, `Slipstream serves MODEL on URL`, whether it is exact there, and how many tokens of context
    its memory holds, is printed to standard output. Port 0 takes a free one.
    On the first signal no more connections are accepted and running requests have `config.drain_seconds` to finish;
    the second signal ends them at once.

    Raises `SlipstreamError` if the address is taken or would let strangers in, and `KeyFileError`, before it loads
    anything; and what `load` raises.
    """
    set_up_logs(config.log_format)
    share_heaps()
    with contextlib.closing(_bind(config.host, config.port)) as listener, ThreadPoolExecutor(1) as pool:
        keys = _keys(config, listener)
        with lasting():
            loading = pool.submit(load)
            from slipstream.server.app import create_app  # half a second, in which the engine loads

            runtime = loading.result()
        with runtime:
            _Server(create_app(runtime, config, keys), runtime, config, listener).run(sockets=[listener])


_IDLE_SECONDS = 10.0
"""Between two looks whether nothing runs, so that freed memory can be given back."""
_END_SECONDS = 30.0
"""For the rest of a clean end: last words, and the checkpoint of what was saved."""


class _Server(uvicorn.Server):
    """uvicorn, but its own signals, and an end that leaves no client without an answer."""

    def __init__(self, app: "FastAPI", runtime: Runtime, config: ServerConfig, listener: socket.socket) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                loop="none" if sys.platform == "win32" else "uvloop",
                http=type("Protocol", (TimedProtocol,), {"read_timeout": config.limits.read_timeout}),
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                proxy_headers=bool(config.forwarded_allow_ips),
                forwarded_allow_ips=list(config.forwarded_allow_ips),
                timeout_keep_alive=config.limits.idle_timeout,
            )
        )
        self._runtime = runtime
        self._settings = config
        self._listener = listener
        self._background: asyncio.Task[None]

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        host, port = self._listener.getsockname()[:2]
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        exact = "exact" if self._runtime.exact else "not exact on this processor: see `slipstream doctor`"
        tokens = f"memory for {self._runtime.core.limits.capacity:,} tokens of context"
        self._background = asyncio.create_task(self._give_back())
        print(f"Slipstream serves {self._runtime.model.name} on http://{address} ({exact}; {tokens})", flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop listening, and let running requests finish; those that take too long are told so."""
        self._background.cancel()
        patience = self._settings.drain_seconds
        self.config.timeout_graceful_shutdown = int(patience + _LAST_WORDS_SECONDS)
        ending = asyncio.create_task(super().shutdown(sockets))
        await asyncio.wait((ending,), timeout=patience)
        await asyncio.to_thread(self._runtime.close)
        await ending
        if self.server_state.tasks:  # only after a second signal
            await asyncio.wait(self.server_state.tasks, timeout=_LAST_WORDS_SECONDS)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - uvicorn's interface
        """Begin to end at the first signal, end at the second; and in any case soon, whatever runs.

        uvicorn's own would raise the signals again after a clean end.
        """
        # A thread without Python's lock counts the time, says on standard error what still ran, and ends the process.
        patience = _LAST_WORDS_SECONDS if self.should_exit else self._settings.drain_seconds
        faulthandler.dump_traceback_later(patience + _END_SECONDS, exit=True)
        self.force_exit = self.should_exit
        self.should_exit = True

    async def _give_back(self) -> None:
        """Give freed memory back whenever something ran since the last look, and nothing does now."""
        ran = -1
        while True:
            await asyncio.sleep(_IDLE_SECONDS)
            stats = self._runtime.core.stats()
            served = self.server_state.total_requests
            if served != ran and not stats.running and not stats.waiting:
                ran = served
                await asyncio.to_thread(give_back_memory)


def _keys(config: ServerConfig, listener: socket.socket) -> KeyRing:
    """The keys to let clients in by. Without any, only this machine's clients may be let in."""
    keys = KeyRing(config.api_key, config.api_keys_file)
    address = listener.getsockname()[0].partition("%")[0]
    if keys.open and not config.insecure and not ipaddress.ip_address(address).is_loopback:
        problem = f"listening on {config.host} would let everybody in who can reach this machine: "
        advice = "set --api-key or --api-keys-file, or say that you want that with --insecure"
        raise SlipstreamError(problem + advice)
    return keys


def _bind(host: str, port: int) -> socket.socket:
    """A socket with the address, not listening yet."""
    try:
        family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise SlipstreamError(f"can't listen on {host}:{port}: {error.strerror}; choose another --port") from error
    return listener
