"""Work that can wait, on a thread of its own."""

import logging
import sched
import threading
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)


class Worker:
    """Runs functions one after another, each when it is due. What fails is logged, and the next one runs."""

    def __init__(self, name: str) -> None:
        self._due = sched.scheduler(time.monotonic)
        self._changed = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def run(self, function: Callable[[], None], *, after: float = 0.0) -> None:
        """Run a function so many seconds from now, unless it's closed by then."""
        if not self._closed:  # or closing could go on for as long as there is more to pass over
            self._due.enter(after, 0, self._call, (function,))
            self._changed.set()

    def close(self) -> None:
        """Run nothing more, once what runs now has ended."""
        self._closed = True
        self._changed.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closed:
            self._changed.wait(self._due.run(blocking=False))
            self._changed.clear()

    def _call(self, function: Callable[[], None]) -> None:
        if not self._closed:
            try:
                function()
            except Exception:
                logger.exception("work in the background failed")
