"""Waiting for what happens elsewhere, however long a busy machine takes for it."""

import time
from collections.abc import Callable

HANG = 1200.0
"""Seconds after which a test that waits for an event is told to have hung; nothing is expected to take as long."""


def wait_until(condition: Callable[[], bool]) -> None:
    """Return once the condition holds."""
    deadline = time.monotonic() + HANG
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)
