"""`slipstream serve`: the HTTP server."""

from typing import Annotated

import typer
from rich.console import Console

from slipstream.chat.formats import FORMATS
from slipstream.cli.loading import load_engine
from slipstream.cli.options import KVMemory, Model, Threads, readable_errors
from slipstream.config import ServerConfig
from slipstream.models import DEFAULT_MODEL


def serve(
    model: Model = DEFAULT_MODEL,
    host: Annotated[
        str, typer.Option(envvar="SLIPSTREAM_HOST", help="Address to listen on; 0.0.0.0 lets others in.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(envvar="SLIPSTREAM_PORT", min=0, max=65535, help="Port to listen on; 0 takes a free one.")
    ] = 8000,
    kv_memory: KVMemory = "1GiB",
    api_key: Annotated[
        str | None,
        typer.Option(envvar="SLIPSTREAM_API_KEY", help="Refuse requests that do not carry this bearer token."),
    ] = None,
    threads: Threads = None,
    step_target_ms: Annotated[
        float,
        typer.Option(
            envvar="SLIPSTREAM_STEP_TARGET_MS",
            help="Long prompts are computed in pieces, so that steps which answers wait for stay below this.",
        ),
    ] = 100.0,
    max_running: Annotated[
        int, typer.Option(envvar="SLIPSTREAM_MAX_RUNNING", min=1, help="Requests computed at the same time.")
    ] = 64,
    max_waiting: Annotated[
        int, typer.Option(envvar="SLIPSTREAM_MAX_WAITING", min=1, help="Requests that may queue before 429.")
    ] = 256,
    drain_seconds: Annotated[
        float,
        typer.Option(envvar="SLIPSTREAM_DRAIN_SECONDS", min=0, help="Time for running answers on Ctrl-C or SIGTERM."),
    ] = 10.0,
    reuse: Annotated[
        bool,
        typer.Option(
            "--reuse/--no-reuse", envvar="SLIPSTREAM_REUSE", help="Keep the KV of conversations between turns."
        ),
    ] = True,
    jump_forward: Annotated[
        bool,
        typer.Option(
            "--jump-forward/--no-jump-forward",
            envvar="SLIPSTREAM_JUMP_FORWARD",
            help="Take tokens that a grammar forces without computing them.",
        ),
    ] = True,
    speculation: Annotated[
        bool,
        typer.Option(
            "--speculation/--no-speculation",
            envvar="SLIPSTREAM_SPECULATION",
            help="Draft tokens by prompt lookup and verify them along.",
        ),
    ] = True,
    tool_format: Annotated[
        str | None,
        typer.Option(
            envvar="SLIPSTREAM_TOOL_FORMAT",
            help=f"How the model writes tool calls: {', '.join(FORMATS)}. By default what its chat template shows.",
        ),
    ] = None,
) -> None:
    """Serve a model to any client that speaks the OpenAI protocol.

    Point the client at http://HOST:PORT/v1. /health tells when it's ready, /metrics how it does, /docs what it takes.
    Every option can also be given as an environment variable, named with each option.

    Examples:

      slipstream serve

      slipstream serve --model ./Qwen3-0.6B-Q8_0.gguf --kv-memory 4GiB --port 9000
    """
    from slipstream import server  # the web framework takes a while to import, which other commands need not wait for

    with readable_errors():
        config = ServerConfig.model_validate(
            {
                "model": model,
                "host": host,
                "port": port,
                "api_key": api_key,
                "reuse": reuse,
                "jump_forward": jump_forward,
                "speculation": speculation,
                "drain_seconds": drain_seconds,
                "engine": {
                    "kv_memory": kv_memory,
                    "threads": threads,
                    "step_target_ms": step_target_ms,
                    "max_running": max_running,
                    "max_waiting": max_waiting,
                    "tool_format": tool_format,
                },
            }
        )
        server.run(lambda: load_engine(config.model, config.engine, Console()), config)
