"""Fetch and load a model with progress on the terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from slipstream.backend.openvino import OpenVINOBackend
from slipstream.backend.paged_model import PagedModel
from slipstream.config import EngineConfig
from slipstream.embedded import Engine
from slipstream.models import ConsoleProgress, Model, ModelStore


def load_engine(model: str, config: EngineConfig, console: Console) -> Engine:
    """The engine for a model, pulled if it's missing; raises `ModelError`."""
    pulled = ModelStore().ensure(model, progress=ConsoleProgress(console))
    with _loading(pulled, console) as progress:
        return Engine(pulled, config, on_warm_up=progress)


def load_backend(
    model: str, kv_memory: str, threads: int | None, console: Console
) -> tuple[Model, EngineConfig, OpenVINOBackend]:
    """A model's backend alone, with nothing around it; raises `ModelError`, and `ValidationError` for bad options."""
    config = EngineConfig.model_validate({"kv_memory": kv_memory, "threads": threads})
    pulled = ModelStore().ensure(model, progress=ConsoleProgress(console))
    with _loading(pulled, console) as progress:
        paged = PagedModel(pulled.ir_path, threads=config.threads)
        return pulled, config, OpenVINOBackend(paged, kv_memory=config.kv_memory, progress=progress)


@contextmanager
def _loading(model: Model, console: Console) -> Iterator[Callable[[float], None]]:
    """A bar while a model is loaded, and what to tell it the fraction done with."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task(f"Loading {model.name}", total=1.0)
        yield lambda done: bars.update(task, completed=done)
