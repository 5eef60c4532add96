"""How long `/health` takes meanwhile, asked from a process of its own: `python -m tests.server.pulse URL`.

A test's process is busy itself; what its own threads wait for says little about the server.
"""

import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from tests.waiting import HANG


@contextmanager
def pulse(url: str) -> Iterator[list[float]]:
    """Ask over and over; the list has the seconds of each answer when the block has ended."""
    seconds: list[float] = []
    command = [sys.executable, "-m", "tests.server.pulse", url]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as asking:
        try:
            yield seconds
        finally:
            told, _ = asking.communicate()  # which closes its input
    assert asking.returncode == 0
    seconds.extend(map(float, told.split()))


def main() -> None:
    """Ask until the input ends."""
    with httpx.Client(base_url=sys.argv[1], timeout=HANG) as http:
        while not select.select([sys.stdin], [], [], 0.02)[0]:
            started = time.perf_counter()
            assert http.get("/health").status_code == 200
            print(time.perf_counter() - started)


if __name__ == "__main__":
    main()
