"""Options that several commands share, and how their errors are shown."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.text import Text
from typer.core import TyperCommand

from slipstream.config import FLAGS, EngineConfig
from slipstream.errors import SlipstreamError

Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        envvar="SLIPSTREAM_MODEL",
        help="A model's name, a .gguf file, a folder with an OpenVINO IR or safetensors, or a hub repository. "
        "Fetched if it's missing.",
    ),
]
KVMemory = Annotated[
    str, typer.Option(envvar="SLIPSTREAM_KV_MEMORY", help=EngineConfig.model_fields["kv_memory"].description)
]
Threads = Annotated[
    int | None, typer.Option(envvar="SLIPSTREAM_THREADS", min=1, help=EngineConfig.model_fields["threads"].description)
]
Device = Annotated[
    Literal["auto", "cpu", "cuda"],
    typer.Option(envvar="SLIPSTREAM_DEVICE", help=EngineConfig.model_fields["device"].description),
]


class FromEnvironment(TyperCommand):
    """A command each of whose options can be given as an environment variable: SLIPSTREAM_ and its name."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for option in self.params:
            option.envvar = f"SLIPSTREAM_{str(option.name).upper()}"


@contextmanager
def readable_errors() -> Iterator[None]:
    """Print what went wrong and end with status 1, or 2 for a bad option, instead of a traceback."""
    try:
        yield
    except ValidationError as error:
        for item in error.errors():
            name = str(item["loc"][-1])
            _print_error(f"{FLAGS.get(name, name)}: {item['msg']} (got {item['input']!r})")
        sys.exit(2)
    except SlipstreamError as error:
        _print_error(error.worded(FLAGS))
        sys.exit(1)


def _print_error(message: str) -> None:
    Console(stderr=True, soft_wrap=True).print(Text.assemble(("Error: ", "red"), message))
