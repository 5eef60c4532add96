"""Waiting for what takes a moment on a busy machine."""

import time
from collections.abc import Callable


def wait_until(condition: Callable[[], bool]) -> None:
    """Return once the condition holds; fails if it doesn't within ten seconds."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
