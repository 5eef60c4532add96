"""`slipstream serve`: the HTTP server."""

from pathlib import Path
from typing import Annotated

from rich.console import Console
from typer import Option

from slipstream.cli.loading import load_engine
from slipstream.cli.options import Device, KVMemory, Model, Threads, readable_errors
from slipstream.config import EngineConfig, LimitsConfig, ServerConfig
from slipstream.lasting import lasting
from slipstream.models import DEFAULT_MODEL

LIMITS = "Limits"


def serve(
    model: Model = DEFAULT_MODEL,
    served_model_name: Annotated[
        list[str] | None,
        Option(help="Another name for the model, for clients that insist on one; may be given several times."),
    ] = None,
    host: Annotated[str, Option(help="Address to listen on; 0.0.0.0 lets others in, who need a key.")] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    device: Device = "auto",
    kv_memory: KVMemory = "1GiB",
    state_dir: Annotated[
        Path | None,
        Option(
            help="Folder where sessions and their KV outlive a restart. By default they are in memory alone.",
            file_okay=False,
        ),
    ] = None,
    state_disk: Annotated[
        str, Option(help="Disk for KV under --state-dir; when it is full, the least recently used is given up.")
    ] = "10GiB",
    state_bandwidth: Annotated[str, Option(help="How much KV is written in a second, at most.")] = "100MiB",
    session_ttl: Annotated[
        float,
        Option(help="Seconds until a session that nobody uses is forgotten, unless it is pinned or says otherwise."),
    ] = 86_400.0,
    api_key: Annotated[str | None, Option(help="Refuse requests that do not carry this bearer token.")] = None,
    api_keys_file: Annotated[
        Path | None,
        Option(help="Refuse requests without a key of this file, each a tenant's: see `slipstream make-key`."),
    ] = None,
    insecure: Annotated[bool, Option(help="Let everybody in without a key, from other machines too.")] = False,
    allowed_host: Annotated[
        list[str] | None, Option(help="A name that requests may be sent to, beside localhost; * for any.")
    ] = None,
    allow_origin: Annotated[
        list[str] | None, Option(help="An origin whose web pages may use the server: https://app.example; * for any.")
    ] = None,
    log_format: Annotated[str, Option(help="The log's lines, one for each turn: text or json.")] = "text",
    traces: Annotated[
        bool,
        Option(help="Send a span of OpenTelemetry for each turn, to where OTEL_EXPORTER_OTLP_ENDPOINT says. See docs."),
    ] = False,
    root_path: Annotated[str, Option(help="The path under which a proxy serves this server: /llm.")] = "",
    forwarded_allow_ips: Annotated[
        list[str] | None, Option(help="A proxy's address or network, whose X-Forwarded headers are believed.")
    ] = None,
    threads: Threads = None,
    step_target_ms: Annotated[
        float,
        Option(
            help="Long prompts are computed in pieces, so that steps which answers wait for stay below this. Lower "
            "lets text stream more evenly; higher gets many agents' turns done sooner.",
        ),
    ] = 400.0,
    max_running: Annotated[int, Option(min=1, help="Choices computed at the same time; others wait.")] = 64,
    max_waiting: Annotated[int, Option(min=1, help="Choices that may wait, before 429.")] = 256,
    keep_alive_seconds: Annotated[
        float, Option(help="How often a stream shows that it's alive while a long prompt is computed.")
    ] = 5.0,
    drain_seconds: Annotated[float, Option(min=0, help="Time for running answers on Ctrl-C or SIGTERM.")] = 10.0,
    reuse: Annotated[bool, Option(help="Keep the KV of conversations between turns.")] = True,
    jump_forward: Annotated[bool, Option(help="Take tokens that a grammar forces without computing them.")] = True,
    speculation: Annotated[bool, Option(help="Draft tokens by prompt lookup and verify them along.")] = True,
    response_cache: Annotated[
        bool, Option(help="Answer exact repeats of greedy or seeded requests from memory.")
    ] = True,
    response_cache_memory: Annotated[str, Option(help="Memory for such answers.")] = "64MiB",
    step_timeout: Annotated[
        float, Option(help="Seconds of one step after which /health answers 503.", rich_help_panel=LIMITS)
    ] = 120.0,
    max_sessions: Annotated[
        int, Option(min=1, help="Sessions of a tenant, pinned ones aside.", rich_help_panel=LIMITS)
    ] = 2048,
    max_pins: Annotated[int, Option(min=0, help="Pinned sessions of a tenant.", rich_help_panel=LIMITS)] = 128,
    max_session_memory: Annotated[
        str, Option(help="Memory for the text of a tenant's sessions.", rich_help_panel=LIMITS)
    ] = "256MiB",
    max_body: Annotated[str, Option(help="Bytes of a request's body.", rich_help_panel=LIMITS)] = "8MiB",
    max_values: Annotated[int, Option(min=1, help="Values in a body's JSON.", rich_help_panel=LIMITS)] = 150_000,
    max_characters: Annotated[
        int, Option(min=1, help="Characters of all text in a body.", rich_help_panel=LIMITS)
    ] = 4_000_000,
    max_messages: Annotated[
        int, Option(min=1, help="Messages of a request, or items of its input.", rich_help_panel=LIMITS)
    ] = 10_000,
    max_tools: Annotated[int, Option(min=1, help="Tools of a request.", rich_help_panel=LIMITS)] = 512,
    max_schema: Annotated[
        str, Option(help="Bytes of all JSON Schemas of a request together.", rich_help_panel=LIMITS)
    ] = "512KiB",
    max_stop: Annotated[
        int, Option(min=1, help="Stop strings and stop tokens of a request.", rich_help_panel=LIMITS)
    ] = 64,
    max_logit_bias: Annotated[int, Option(min=1, help="Entries of logit_bias.", rich_help_panel=LIMITS)] = 1024,
    max_choices: Annotated[
        int, Option(min=1, help="Answers that a request may ask for, prompts times n.", rich_help_panel=LIMITS)
    ] = 128,
    max_stored_responses: Annotated[
        str, Option(help="Bytes of a tenant's stored responses, messages aside.", rich_help_panel=LIMITS)
    ] = "128MiB",
    max_requests: Annotated[
        int, Option(min=1, help="Requests at the same time, before 429.", rich_help_panel=LIMITS)
    ] = 1024,
    max_bodies: Annotated[
        str, Option(help="Bytes of the bodies of all those requests, before 429.", rich_help_panel=LIMITS)
    ] = "128MiB",
    read_timeout: Annotated[
        float,
        Option(help="Seconds for a request's head, and between two parts of its body.", rich_help_panel=LIMITS),
    ] = 30.0,
    idle_timeout: Annotated[
        int, Option(min=1, help="Seconds that a connection stays open for another request.", rich_help_panel=LIMITS)
    ] = 75,
    sandbox_seconds: Annotated[
        float,
        Option(help="Processor time to try a grammar, or render a foreign template.", rich_help_panel=LIMITS),
    ] = 5.0,
    sandbox_memory: Annotated[str, Option(help="Memory for the same.", rich_help_panel=LIMITS)] = "1GiB",
    tool_format: Annotated[
        str | None,
        Option(help="How the model writes calls (hermes, llama3, mistral, …), if its chat template does not show it."),
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
    options = locals()  # by the names of the configuration's fields
    options["served_model_name"] = options["served_model_name"] or ()
    with lasting():
        from slipstream import server  # what this takes to import, other commands need not wait for

    with readable_errors():
        engine = {name: options.pop(name) for name in EngineConfig.model_fields if name in options}
        limits = {name: options.pop(name) for name in LimitsConfig.model_fields}
        given = {name: value for name, value in options.items() if value is not None}
        config = ServerConfig.model_validate(given | {"engine": engine, "limits": limits})
        server.run(lambda: load_engine(config.model, config.engine, Console()), config)
