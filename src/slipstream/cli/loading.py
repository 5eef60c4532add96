"""Fetch and load a model with progress on the terminal."""

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from slipstream.config import EngineConfig
from slipstream.embedded import Engine
from slipstream.models import ConsoleProgress, ModelStore


def load_engine(model: str, config: EngineConfig, console: Console) -> Engine:
    """The engine for a model, pulled if it's missing; raises `ModelError`."""
    pulled = ModelStore().ensure(model, progress=ConsoleProgress(console))
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task(f"Loading {pulled.name}", total=1.0)
        return Engine(pulled, config, on_warm_up=lambda done: bars.update(task, completed=done))
