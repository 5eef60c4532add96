"""Threads with as much stack as what runs on them may need."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

ROOMY_STACK = 64 * 2**20
"""Bytes, several times what a sandbox grants. It's address space: what isn't used takes no memory."""


@contextmanager
def roomy_stack() -> Iterator[None]:
    """Threads that are started within have a roomy stack."""
    before = threading.stack_size(ROOMY_STACK)
    try:
        yield
    finally:
        threading.stack_size(before)


def on_roomy_stack(function: Callable[[], T]) -> T:
    """What a function gives or raises that runs on a thread of its own with a roomy stack."""
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(function())
        except BaseException as error:
            result.set_exception(error)

    with roomy_stack():
        threading.Thread(target=run, name="slipstream-roomy", daemon=True).start()
    return result.result()
