"""Fetch and load a model with progress on the terminal.

What computes models takes a second to import, which commands that load none need not wait for.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from slipstream.config import EngineConfig
from slipstream.models import Model, ModelStore, Progress

if TYPE_CHECKING:
    from slipstream.backend.paged import PagedBackend
    from slipstream.embedded import Engine


def load_engine(model: str, config: EngineConfig, console: Console) -> "Engine":
    """The engine for a model, pulled if it's missing; raises `ModelError`."""
    from slipstream.embedded import Engine

    pulled = ModelStore().ensure(model, progress=Progress(console))
    with _loading(pulled, console) as progress:
        return Engine(pulled, config, on_warm_up=progress)


def load_backend(
    model: str, options: Mapping[str, Any], console: Console
) -> tuple[Model, EngineConfig, "PagedBackend[Any]"]:
    """A model's backend alone, with nothing around it; raises `ModelError`, and `ValidationError` for bad options."""
    from slipstream.backend.paged import PagedBackend
    from slipstream.runtime import BACKENDS

    config = EngineConfig.model_validate(options)
    pulled = ModelStore().ensure(model, progress=Progress(console))
    with _loading(pulled, console) as progress:
        backend = BACKENDS[pulled.weights](pulled, config)(progress)
        assert isinstance(backend, PagedBackend)
        return pulled, config, backend


@contextmanager
def _loading(model: Model, console: Console) -> Iterator[Callable[[float], None]]:
    """A bar while a model is loaded, and what to tell it the fraction done with."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Bars(*columns, console=console, transient=True) as bars:
        task = bars.add_task(f"Loading {model.name}", total=1.0)
        yield lambda done: bars.update(task, completed=done)
