"""What a process makes once and keeps."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def lasting() -> Iterator[None]:
    """Make modules, tables and the like that stay: they are never looked through for garbage, now or later.

    A tenth of a start would be spent on that, and each full collection would walk through all of them again.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
