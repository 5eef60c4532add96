"""`slipstream pull`: fetch a model into the store."""

from typing import Annotated

import typer
from rich.console import Console

from slipstream.cli.options import readable_errors
from slipstream.models import DEFAULT_MODEL, ConsoleProgress, ModelStore


def pull(
    model: Annotated[
        str,
        typer.Argument(
            metavar="NAME|PATH|REPO",
            help="A name from the catalog or the store; a path to a .gguf file or to a folder with an "
            "OpenVINO IR; a hub repository: owner/name for an OpenVINO IR, or owner/name:file.gguf.",
        ),
    ] = DEFAULT_MODEL,
) -> None:
    """Fetch a model and make it ready to serve; nothing to do if it is there.

    The store is ~/.cache/slipstream, or $SLIPSTREAM_HOME. An interrupted pull leaves nothing behind.

    Examples:

      slipstream pull

      slipstream pull ./Qwen3-0.6B-Q8_0.gguf

      slipstream pull OpenVINO/Qwen3-0.6B-int4-ov

      slipstream pull Qwen/Qwen3-0.6B-GGUF:Qwen3-0.6B-Q8_0.gguf
    """
    with readable_errors():
        pulled = ModelStore().ensure(model, progress=ConsoleProgress(Console()))
    manifest = pulled.manifest
    typer.echo(
        f"{pulled.name} is ready: {pulled.path}, {pulled.size / 1e6:.0f} MB, "
        f"context of {manifest.context_length} tokens"
    )
