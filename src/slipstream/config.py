"""The one configuration: typed, validated, immutable. Options and environment variables of the CLI map onto it."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field, TypeAdapter

from slipstream.models import DEFAULT_MODEL


class EngineConfig(BaseModel):
    """How the engine uses the machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """What computes a model in safetensors; `auto` is a GPU where there is one. All others run on the processor."""
    kv_memory: ByteSize = Field(default=TypeAdapter(ByteSize).validate_python("1GiB"), gt=0)
    """Bytes for keys and values of all conversations together."""
    response_cache_memory: ByteSize = Field(default=TypeAdapter(ByteSize).validate_python("64MiB"), ge=0)
    """Bytes for answers that exact repeats of deterministic requests get from memory; 0 for none."""
    session_ttl: float = Field(default=86_400.0, gt=0)
    """Seconds that a session stays without being used."""
    max_sessions: int = Field(default=2048, ge=1)
    """Sessions of a tenant, those that are pinned aside; the least recently used are forgotten for more."""
    max_pins: int = Field(default=128, ge=0)
    """Pinned sessions of a tenant."""
    max_session_memory: ByteSize = Field(default=TypeAdapter(ByteSize).validate_python("256MiB"), gt=0)
    """Bytes of messages and tools of a tenant's sessions in memory; the least recently used leave it for more."""
    state_dir: Path | None = None
    """A folder where sessions and their KV outlive the process; None keeps them in memory alone."""
    state_disk: ByteSize = Field(default=TypeAdapter(ByteSize).validate_python("10GiB"), gt=0)
    """Bytes of KV on disk; the least recently used is given up for new."""
    state_bandwidth: ByteSize = Field(default=TypeAdapter(ByteSize).validate_python("100MiB"), gt=0)
    """Bytes a second that saving KV may write."""
    threads: int | None = Field(default=None, ge=1)
    """Threads of a forward pass; by default what the machine has."""
    step_target_ms: float = Field(default=400.0, gt=0)
    """A prompt is computed in pieces, so that steps which answers wait for take no longer than this."""
    sandbox_seconds: float = Field(default=5.0, gt=0)
    """Processor time for a foreign chat template to render a prompt, or for the trial of a new grammar."""
    sandbox_memory: ByteSize = Field(default=TypeAdapter(ByteSize).validate_python("1GiB"), gt=0)
    """Memory for the same."""
    tool_format: str | None = None
    """How the model writes tool calls; by default what its chat template shows."""
    max_running: int = Field(default=64, ge=1)
    """Requests computed at the same time."""
    max_waiting: int = Field(default=256, ge=1)
    """Requests that may queue; more are answered with 429."""


class LimitsConfig(BaseModel):
    """What a request, and all together, may take of the server before the engine sees them. See docs/limits.md."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_body: ByteSize = Field(default=TypeAdapter(ByteSize).validate_python("8MiB"), gt=0)
    """Bytes of a body."""
    max_values: int = Field(default=150_000, ge=1)
    """Values in a body's JSON, which take far more memory and time than their bytes."""
    max_characters: int = Field(default=4_000_000, ge=1)
    """Characters of all text in a body."""
    max_messages: int = Field(default=10_000, ge=1)
    """Messages of a conversation, or items of an input."""
    max_tools: int = Field(default=512, ge=1)
    """Tools of a request."""
    max_schema: ByteSize = Field(default=TypeAdapter(ByteSize).validate_python("512KiB"), gt=0)
    """Bytes of all JSON Schemas of a request together."""
    max_stop: int = Field(default=64, ge=1)
    """Stop strings, and stop tokens, of a request."""
    max_logit_bias: int = Field(default=1024, ge=1)
    """Tokens whose logits a request may shift."""
    max_choices: int = Field(default=128, ge=1)
    """Answers that one request may ask for, prompts times choices."""
    max_stored_responses: ByteSize = Field(default=TypeAdapter(ByteSize).validate_python("128MiB"), gt=0)
    """Bytes of a tenant's stored responses besides messages; the least recently used are forgotten for more."""
    max_requests: int = Field(default=1024, ge=1)
    """Requests that are read, wait or are answered at the same time; more are answered with 429."""
    max_bodies: ByteSize = Field(default=TypeAdapter(ByteSize).validate_python("128MiB"), gt=0)
    """Bytes of the bodies of all those requests together."""
    read_timeout: float = Field(default=30.0, gt=0)
    """Seconds that a client may take for the head of a request, and again between two parts of its body."""
    idle_timeout: int = Field(default=75, ge=1)
    """Seconds that a connection stays open after a request: longer than clients keep one."""


class ServerConfig(BaseModel):
    """What `slipstream serve` serves, where, and to whom."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = DEFAULT_MODEL
    served_model_name: tuple[str, ...] = ()
    """Aliases of the model, for clients that insist on a name; its own is served too."""
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    api_key: str | None = Field(default=None, min_length=1)
    """Requests must carry it, or a key of the file; with neither, everybody is let in."""
    api_keys_file: Path | None = None
    """A TOML file of the digests of keys and whose they are; it may change while the server runs."""
    insecure: bool = False
    """Whether to let everybody in, from other machines too."""
    allowed_host: tuple[str, ...] = ()
    """Names that requests may have in `Host`, beside those of loopback; `*` for any."""
    allow_origin: tuple[str, ...] = ()
    """Origins whose web pages may use the server; `*` for any."""
    log_format: Literal["text", "json"] = "text"
    """The form of the log's lines, one of which there is for each turn."""
    traces: bool = False
    """Whether each turn is a span of OpenTelemetry; the variables OTEL_EXPORTER_OTLP_… say where they go."""
    root_path: str = Field(default="", pattern=r"^(/[^/?#]+)*$")
    """The path under which a proxy serves this server."""
    forwarded_allow_ips: tuple[str, ...] = ()
    """Addresses or networks of proxies, whose `X-Forwarded-For` and `X-Forwarded-Proto` are believed."""
    reuse: bool = True
    """Whether KV is kept and used across requests. This and what follows a request can switch off for itself."""
    jump_forward: bool = True
    """Whether tokens that a grammar forces are taken without a forward pass of their own."""
    speculation: bool = True
    """Whether drafts are verified along with the tokens that need a pass anyway."""
    response_cache: bool = True
    """Whether exact repeats of deterministic requests are answered from memory."""
    keep_alive_seconds: float = Field(default=5.0, gt=0)
    """How often a stream that has nothing to say shows that it's alive."""
    drain_seconds: float = Field(default=10.0, ge=0)
    """How long running requests may go on after a signal to stop."""
    limits: LimitsConfig = LimitsConfig()
    step_timeout: float = Field(default=120.0, gt=0)
    """Seconds of one step after which `/health` says that the engine has stalled."""
    engine: EngineConfig = EngineConfig()


_FIELDS = (*EngineConfig.model_fields, *LimitsConfig.model_fields, *ServerConfig.model_fields)
FLAGS = {name: f"--{name.replace('_', '-')}" for name in _FIELDS}
"""The options of `slipstream serve` that set these fields."""
