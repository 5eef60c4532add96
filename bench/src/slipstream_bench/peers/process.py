"""A server's processes: started as a group of their own, paused and resumed, and stopped, whatever they do."""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

from slipstream_bench.peers.base import PeerError

_STOP_SECONDS = 15.0
_LONGEST_COMPLAINT = 2000
"""Characters."""


@contextmanager
def server_process(
    command: Sequence[str],
    ready_url: str,
    log: Path,
    *,
    environment: Mapping[str, str] | None = None,
    timeout: float = 900.0,
) -> Iterator[int]:
    """A server that answers `ready_url` with 200, as its process group, until the context ends.

    What it says goes to the file `log`. `environment` is added to this process's own. Raises `PeerError`, with the
    end of the log, if the server ends or is not ready within `timeout` seconds.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
    try:
        _wait_until_ready(process, ready_url, log, timeout)
        yield process.pid
    finally:
        _stop(process)


@contextmanager
def paused(process_groups: Sequence[int]) -> Iterator[None]:
    """These groups get no processor time meanwhile; those that are gone are left out."""
    _signal(process_groups, signal.SIGSTOP)
    try:
        for group in process_groups:
            with contextlib.suppress(ChildProcessError):  # it's gone
                os.waitid(os.P_PGID, group, os.WSTOPPED | os.WEXITED | os.WNOWAIT)  # a busy machine takes its time
        yield
    finally:
        _signal(process_groups, signal.SIGCONT)


def run_to_end(command: Sequence[str], complaint: str, environment: Mapping[str, str] | None = None) -> None:
    """Run a program that comes to an end; raises `PeerError`, with the end of what it said, if it fails."""
    run = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, **(environment or {})},
        text=True,
        check=False,
    )
    if run.returncode:
        raise PeerError(f"{complaint}:\n{run.stdout.strip()[-_LONGEST_COMPLAINT:]}")


def free_port() -> int:
    """A port that nothing listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def last_words(log: Path, lines: int = 20) -> str:
    """The end of a log, for an error's message."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while True:
        if process.poll() is not None:
            raise PeerError(f"it ended with status {process.returncode} before it was ready:\n{last_words(log)}")
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(url, timeout=5, trust_env=False).status_code == httpx.codes.OK:
                return
        if time.monotonic() > deadline:
            raise PeerError(f"it was not ready after {timeout:.0f} seconds:\n{last_words(log)}")
        time.sleep(0.2)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the whole group: politely, then not."""
    _signal([process.pid], signal.SIGCONT)
    _signal([process.pid], signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_SECONDS)
    _signal([process.pid], signal.SIGKILL)  # what is left of it: workers outlive some servers
    process.wait()


def _signal(process_groups: Sequence[int], number: signal.Signals) -> None:
    for group in process_groups:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, number)
