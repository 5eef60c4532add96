"""`slipstream serve`: the HTTP server."""

from pathlib import Path
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
    state_dir: Annotated[
        Path | None,
        typer.Option(
            envvar="SLIPSTREAM_STATE_DIR",
            help="Folder where sessions and their KV outlive a restart. By default they are in memory alone.",
            file_okay=False,
        ),
    ] = None,
    state_disk: Annotated[
        str,
        typer.Option(
            envvar="SLIPSTREAM_STATE_DISK",
            help="Disk for KV under --state-dir; when it is full, the least recently used is given up.",
        ),
    ] = "10GiB",
    state_bandwidth: Annotated[
        str, typer.Option(envvar="SLIPSTREAM_STATE_BANDWIDTH", help="How much KV is written in a second, at most.")
    ] = "100MiB",
    session_ttl: Annotated[
        float,
        typer.Option(
            envvar="SLIPSTREAM_SESSION_TTL",
            help="Seconds until a session that nobody uses is forgotten, unless it is pinned or says otherwise.",
        ),
    ] = 86_400.0,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="SLIPSTREAM_API_KEY", help="Refuse requests that do not carry this bearer token."),
    ] = None,
    threads: Threads = None,
    step_target_ms: Annotated[
        float,
        typer.Option(
            envvar="SLIPSTREAM_STEP_TARGET_MS",
            help="Long prompts are computed in pieces, so that steps which answers wait for stay below this. Lower "
            "lets text stream more evenly; higher gets many agents' turns done sooner.",
        ),
    ] = 400.0,
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
    response_cache: Annotated[
        bool,
        typer.Option(
            "--response-cache/--no-response-cache",
            envvar="SLIPSTREAM_RESPONSE_CACHE",
            help="Answer exact repeats of greedy or seeded requests from memory.",
        ),
    ] = True,
    response_cache_memory: Annotated[
        str, typer.Option(envvar="SLIPSTREAM_RESPONSE_CACHE_MEMORY", help="Memory for such answers.")
    ] = "64MiB",
    tool_format: Annotated[
        str | None,
        typer.Option(
            envvar="SLIPSTREAM_TOOL_FORMAT",
            help=f"How the model writes tool calls: {', '.join(FORMATS)}. By default what its chat template shows.",
        ),
    ] = None,
) -> None:
    """Serve a model to any client that speaks OpenAI's or Anthropic's protocol.

    Point an OpenAI client at http://HOST:PORT/v1, an Anthropic client at http://HOST:PORT. /health tells when it's
    ready, /metrics how it does, /docs what it takes.
    Every option can also be given as an environment variable, named with each option.

    Examples:

      slipstream serve

      slipstream serve --model ./Qwen3-0.6B-Q8_0.gguf --kv-memory 4GiB --port 9000

      slipstream serve --state-dir ~/.local/state/slipstream
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
                "response_cache": response_cache,
                "drain_seconds": drain_seconds,
                "engine": {
                    "kv_memory": kv_memory,
                    "state_dir": state_dir,
                    "state_disk": state_disk,
                    "state_bandwidth": state_bandwidth,
                    "session_ttl": session_ttl,
                    "response_cache_memory": response_cache_memory,
                    "threads": threads,
                    "step_target_ms": step_target_ms,
                    "max_running": max_running,
                    "max_waiting": max_waiting,
                    "tool_format": tool_format,
                },
            }
        )
        server.run(lambda: load_engine(config.model, config.engine, Console()), config)
