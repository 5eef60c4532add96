"""How a pull tells of its progress: not at all in embedded use, with bars on a terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

Advance = Callable[[int], None]
"""Takes the bytes done since the last call."""


class Progress:
    """Lines and bars on a rich console, which shows nothing if it is quiet."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @property
    def interactive(self) -> bool:
        """Whether pip and the hub's client may draw their own bars: on a terminal."""
        return self._console.is_terminal and not self._console.quiet

    def say(self, text: str) -> None:
        """Print a line."""
        self._console.print(text, markup=False, highlight=False)

    @contextmanager
    def stage(self, text: str, *, total: int | None = None) -> Iterator[Advance]:
        """Draw a bar, or a spinner where there are no `total` bytes; it stays on the screen when done."""
        measure = (TimeElapsedColumn(),) if total is None else (BarColumn(), DownloadColumn())
        columns = SpinnerColumn(finished_text=" "), TextColumn("{task.description}", markup=False), *measure
        with Bars(*columns, console=self._console, disable=self._console.quiet) as bars:
            task = bars.add_task(text, total=total)
            yield lambda amount: bars.advance(task, amount)
            # A spinner has no end of its own.
            bars.update(task, total=total or 1, completed=total or 1)


SILENT = Progress(Console(quiet=True))
