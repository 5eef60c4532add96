"""`slipstream pull`: fetch a model into the store, or list those that have a name."""

import os
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from slipstream.cli.options import readable_errors
from slipstream.models import CATALOG, DEFAULT_MODEL, ModelStore, Progress

_CONTEXT = 32 * 1024
"""Tokens of an agent's conversation; what memory is reckoned for."""
_TIGHT = 0.8
"""Of a machine's memory; a model that takes more leaves little to others."""


def pull(
    model: Annotated[
        str,
        typer.Argument(
            metavar="NAME|PATH|REPO",
            help="A name from the catalog or the store; a path to a .gguf file or to a folder with an OpenVINO IR or "
            "safetensors; a hub repository: owner/name:Q4_K_M or owner/name:file.gguf for a GGUF file, owner/name for "
            "what is first there of an OpenVINO IR, the GGUF file of Q4_K_M, and safetensors.",
        ),
    ] = DEFAULT_MODEL,
    list_catalog: Annotated[
        bool, typer.Option("--list", help="List the models of the catalog, and which of them fit this machine.")
    ] = False,
) -> None:
    """Fetch a model and make it ready to serve; nothing to do if it is there.

    The store is ~/.cache/slipstream, or $SLIPSTREAM_HOME. An interrupted pull leaves nothing behind.

    Examples:

      slipstream pull

      slipstream pull --list

      slipstream pull qwen3-4b

      slipstream pull ./Qwen3-0.6B-Q8_0.gguf

      slipstream pull OpenVINO/Qwen3-0.6B-int4-ov

      slipstream pull Qwen/Qwen3-4B-GGUF:Q5_K_M

      slipstream pull Qwen/Qwen3-0.6B-GGUF:Qwen3-0.6B-Q8_0.gguf
    """
    if list_catalog:
        _print_catalog(Console())
        return
    with readable_errors():
        pulled = ModelStore().ensure(model, progress=Progress(Console()))
    manifest = pulled.manifest
    typer.echo(
        f"{pulled.name} is ready: {pulled.path}, {pulled.size / 1e6:.0f} MB, "
        f"context of {manifest.context_length} tokens"
    )


def _print_catalog(console: Console) -> None:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    store = ModelStore()
    sizes = (Column("size", justify="right"), Column("at 32k", justify="right"))
    table = Table("name", *sizes, "licence", "this machine", "in the store", box=None, header_style="bold")
    for name, entry in CATALOG.items():
        needed = entry.memory(_CONTEXT)
        stored = "yes" if store.get(name) else ""
        table.add_row(name, _gigabytes(entry.size), _gigabytes(needed), entry.license, _fit(needed, memory), stored)
    console.print(table, highlight=False)
    console.print(
        f"at 32k: memory for the weights and the keys and values, in 16 bits, of {_CONTEXT:,} tokens; this machine has "
        f"{_gigabytes(memory)}.",
        highlight=False,
    )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


def _fit(needed: int, memory: int) -> str:
    """Whether a model fits a machine, both in bytes."""
    if needed > memory:
        return "too large"
    return "tight" if needed > _TIGHT * memory else "fits"
