"""How a pull tells of its progress: not at all in embedded use, with bars on a terminal."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

Advance = Callable[[int], None]
"""Takes the bytes done since the last call."""


class Progress(Protocol):
    """What `ModelStore.pull` reports to."""

    @property
    def interactive(self) -> bool:
        """Whether pip and the hub's client may draw their own bars on this terminal."""
        ...

    def say(self, text: str) -> None:
        """Show one line."""
        ...

    def stage(self, text: str, *, total: int | None = None) -> AbstractContextManager[Advance]:
        """Show a stage while the context lasts, as a bar where its `total` bytes are known."""
        ...


class SilentProgress:
    """Shows nothing."""

    interactive = False

    def say(self, text: str) -> None:
        """Show nothing."""

    @contextmanager
    def stage(self, text: str, *, total: int | None = None) -> Iterator[Advance]:  # noqa: ARG002
        """Show nothing."""
        yield lambda _: None


SILENT = SilentProgress()


class ConsoleProgress:
    """Lines and bars on a rich console."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @property
    def interactive(self) -> bool:
        """True on a terminal."""
        return self._console.is_terminal

    def say(self, text: str) -> None:
        """Print a line."""
        self._console.print(text, markup=False, highlight=False)

    @contextmanager
    def stage(self, text: str, *, total: int | None = None) -> Iterator[Advance]:
        """Draw a bar, or a spinner where there is no `total`; it stays on the screen when done."""
        measure = (TimeElapsedColumn(),) if total is None else (BarColumn(), DownloadColumn())
        label = TextColumn("{task.description}", markup=False)
        with Bars(SpinnerColumn(finished_text=" "), label, *measure, console=self._console) as bars:
            task = bars.add_task(text, total=total)
            yield lambda amount: bars.advance(task, amount)
            # A spinner has no end of its own.
            bars.update(task, total=total or 1, completed=total or 1)
