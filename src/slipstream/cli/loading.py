"""Fetch and load a model with progress on the terminal.

What computes models takes a second to import, which commands that load none need not wait for.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from slipstream.config import EngineConfig
from slipstream.models import Model, ModelStore, Progress

if TYPE_CHECKING:
    from slipstream.embedded import Engine


def load_engine(model: str, config: EngineConfig, console: Console) -> "Engine":
    """The engine for a model, pulled if it's missing; raises `ModelError`."""
    from slipstream.embedded import Engine

    with loading(model, console) as (pulled, progress):
        return Engine(pulled, config, on_warm_up=progress)


@contextmanager
def loading(name: str, console: Console) -> Iterator[tuple[Model, Callable[[float], None]]]:
    """A model, pulled if it's missing, and what to tell the fraction loaded of it; raises `ModelError`."""
    model = ModelStore().ensure(name, progress=Progress(console))
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Bars(*columns, console=console, transient=True) as bars:
        task = bars.add_task(f"Loading {model.name}", total=1.0)
        yield model, lambda done: bars.update(task, completed=done)
