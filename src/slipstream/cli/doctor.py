"""`slipstream doctor`: what this machine makes of a model, and what would make it faster."""

import json
import os
from collections.abc import Iterator
from importlib.metadata import version
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from slipstream.cli.loading import loading
from slipstream.cli.options import Device, KVMemory, Model, Threads, readable_errors
from slipstream.config import EngineConfig
from slipstream.models import DEFAULT_MODEL
from slipstream.processor import this_processor

_RUNTIMES = {"openvino": "openvino", "safetensors": "torch"}
"""The packages that compute models, by the kind of their weights."""
_LARGE_STEP = 64
"""Tokens; what one costs in a step of this size is what one of a long prompt costs."""


Report = dict[str, Any]
"""What was found, by the names that `--json` prints; sizes in tokens, memory in bytes."""


def doctor(
    model: Model = DEFAULT_MODEL,
    device: Device = "auto",
    kv_memory: KVMemory = "1GiB",
    threads: Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, for programs.")] = False,
) -> None:
    """Say how a model runs on this machine: whether it is exact here, how fast it is, and what would make it faster.

    The first time, the model is fetched if it's missing, and its steps are compared and timed, as when it is first
    served; what is found is kept beside the model.

    Examples:

      slipstream doctor

      slipstream doctor --model ./Qwen3-0.6B-Q8_0.gguf --json
    """
    with readable_errors():
        config = EngineConfig.model_validate({"device": device, "kv_memory": kv_memory, "threads": threads})
        report = _examine(model, config, Console(stderr=as_json))
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        _print(report, Console())


def _examine(name: str, config: EngineConfig, console: Console) -> Report:
    from slipstream.backend.paged import PagedBackend  # what that takes to import, other commands need not wait for
    from slipstream.backend.steps import BLOCK_SIZE
    from slipstream.runtime import BACKENDS

    with loading(name, console) as (model, progress):
        backend = BACKENDS[model.weights](model, config)(progress)
    assert isinstance(backend, PagedBackend)
    processor = this_processor()
    package = _RUNTIMES[model.weights]
    runtime = f"{package} {version(package)}"
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    seconds = dict(backend.cost.measured.seconds)
    store, sizes = backend.store, backend.step_class.sizes
    large = max((size for size in sizes if size <= _LARGE_STEP), default=sizes[0])
    report: Report = {
        "slipstream": version("slipstream"),
        "runtime": runtime,
        "gpu": backend.model.gpu,
        "processor": processor.name,
        "instruction_sets": processor.instruction_sets,
        "cores": processor.cores,
        "threads": backend.model.threads,
        "memory": memory,
        "model": model.name,
        "model_bytes": model.size,
        "context_length": model.manifest.context_length,
        "precision": backend.model.precision,  # what keys and values are kept in
        "kv_bytes_per_token": store.bytes_per_token,
        "kv_memory": config.kv_memory,
        "kv_tokens": store.capacity,  # that fit into the KV memory
        "checkpoint_interval": backend.checkpoint_interval,  # tokens between places where any sequence can be taken up
        "exact": backend.exact,
        "step_sizes": sizes,
        "decode_ms": round(seconds[sizes[0]] * 1e3, 1),  # a step of the smallest size, without context
        "prompt_tokens_per_second": round(large / seconds[large], 1),  # without context, by the cost of a large step
    }
    needed = (store.open_cost(model.manifest.context_length) + 2 * BLOCK_SIZE) * store.bytes_per_token
    return report | {"advice": list(_advice(report, needed))}


def _advice(report: Report, needed: int) -> Iterator[str]:
    """What would make it exact, faster, or larger, the most important first; a full context has `needed` bytes."""
    cores, threads, sets = report["cores"], report["threads"], set(report["instruction_sets"])
    on_processor, short_of = not report["gpu"], report["context_length"] - report["kv_tokens"]
    if not report["exact"]:
        yield (
            "No step sizes give the same bits here, so answers may depend on what else is computed. The response cache "
            "is off. Another precision of the model's weights, or another release of OpenVINO, may have a class."
        )
    if on_processor and threads < cores:
        yield f"{cores} cores are there, {threads} are used: raise --threads, or leave it out."
    if on_processor and not {"avx512_bf16", "amx_bf16", "bf16"} & sets:
        lack = "bfloat16" if {"avx512f", "asimd"} & sets else "AVX-512"
        yield f"Without {lack}, prompts are computed in float32. A processor with AVX-512 BF16 or AMX is faster."
    if short_of > 0:
        yield (
            f"The KV memory is {short_of:,} tokens short of one conversation of the model's full context: "
            f"--kv-memory {-(-needed // 2**20)}MiB holds it."
        )
    if report["kv_memory"] + report["model_bytes"] > report["memory"]:
        yield "Model and KV memory together are larger than this machine's memory: lower --kv-memory."


def _print(report: Report, console: Console) -> None:
    table = Table(show_header=False, box=None)
    sets, sizes = ", ".join(report["instruction_sets"]) or "none that matter here", report["step_sizes"]
    context = report["context_length"]
    for name, value in (
        ("Slipstream", f"{report['slipstream']}, {report['runtime']}"),
        *([("GPU", report["gpu"])] if report["gpu"] else []),
        ("processor", f"{report['processor']} ({sets})"),
        ("threads", f"{report['threads']} of {report['cores']} cores"),
        ("memory", f"{report['memory'] / 2**30:.1f} GiB"),
        ("model", f"{report['model']}, {report['model_bytes'] / 1e6:,.0f} MB, context of {context:,} tokens"),
        (
            "KV memory",
            f"{report['kv_memory'] / 2**20:,.0f} MiB in {report['precision']}: {report['kv_tokens']:,} tokens",
        ),
        ("exact", "yes" if report["exact"] else "no"),
        ("steps", f"{sizes[0]} to {sizes[-1]} tokens, {len(sizes)} sizes"),
        ("decoding", f"{report['decode_ms']:.1f} ms a step"),
        ("prompts", f"{report['prompt_tokens_per_second']:,.0f} tokens a second"),
    ):
        table.add_row(f"[bold]{name}[/]", value)
    console.print(table, highlight=False)
    for line in report["advice"]:
        console.print(f"- {line}", highlight=False)
