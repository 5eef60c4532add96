"""The one configuration: typed, validated, immutable. Options and environment variables of the CLI map onto it."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field

from slipstream.models import DEFAULT_MODEL


class Config(BaseModel):
    """Fields whose docstrings are the help of the options that set them."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class EngineConfig(Config):
    """How the engine uses the machine."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """What computes a model in safetensors; auto takes a GPU where there is one. Other models run on the CPU."""
    kv_memory: ByteSize = Field(default="1GiB", gt=0, validate_default=True)
    """Memory for the keys and values of all conversations: 512MiB, 4GiB. When it is full, the conversation least
    likely to continue is computed anew at its next turn."""
    state_dir: Path | None = None
    """Folder where sessions and their KV outlive a restart. By default they are in memory alone."""
    state_disk: ByteSize = Field(default="10GiB", gt=0, validate_default=True)
    """Disk for KV under --state-dir; when it is full, the least recently used is given up."""
    state_bandwidth: ByteSize = Field(default="100MiB", gt=0, validate_default=True)
    """How much KV is written in a second, at most."""
    session_ttl: float = Field(default=86_400.0, gt=0)
    """Seconds until a session that nobody uses is forgotten, unless it is pinned or says otherwise."""
    threads: int | None = Field(default=None, ge=1)
    """Threads of a forward pass; by default all cores."""
    step_target_ms: float = Field(default=400.0, gt=0)
    """Long prompts are computed in pieces, so that steps which answers wait for stay below this. Lower lets text
    stream more evenly; higher gets many agents' turns done sooner."""
    response_cache_memory: ByteSize = Field(default="64MiB", ge=0, validate_default=True)
    """Memory for answers to exact repeats of greedy or seeded requests; 0 for none."""
    tool_format: str | None = None
    """How the model writes calls (hermes, llama3, mistral, …), if its chat template does not show it."""
    max_running: int = Field(default=64, ge=1)
    """Choices computed at the same time; others wait."""
    max_waiting: int = Field(default=256, ge=1)
    """Choices that may wait, before 429."""
    max_sessions: int = Field(default=2048, ge=1)
    """Sessions of a tenant, pinned ones aside; the least recently used are forgotten for more."""
    max_pins: int = Field(default=128, ge=0)
    """Pinned sessions of a tenant."""
    max_session_memory: ByteSize = Field(default="256MiB", gt=0, validate_default=True)
    """Memory for the text of a tenant's sessions; the least recently used leave it for more."""
    sandbox_seconds: float = Field(default=5.0, gt=0)
    """Processor time to try a grammar, or render a foreign template."""
    sandbox_memory: ByteSize = Field(default="1GiB", gt=0, validate_default=True)
    """Memory for the same."""


class LimitsConfig(Config):
    """What a request, and all together, may take of the server before the engine sees them. See docs/limits.md."""

    max_body: ByteSize = Field(default="8MiB", gt=0, validate_default=True)
    """Bytes of a request's body."""
    max_values: int = Field(default=150_000, ge=1)
    """Values in a body's JSON, which take far more memory and time than their bytes."""
    max_characters: int = Field(default=4_000_000, ge=1)
    """Characters of all text in a body."""
    max_messages: int = Field(default=10_000, ge=1)
    """Messages of a request, or items of its input."""
    max_tools: int = Field(default=512, ge=1)
    """Tools of a request."""
    max_schema: ByteSize = Field(default="512KiB", gt=0, validate_default=True)
    """Bytes of all JSON Schemas of a request together."""
    max_stop: int = Field(default=64, ge=1)
    """Stop strings, and stop tokens, of a request."""
    max_logit_bias: int = Field(default=1024, ge=1)
    """Entries of logit_bias."""
    max_choices: int = Field(default=128, ge=1)
    """Answers that a request may ask for, prompts times n."""
    max_stored_responses: ByteSize = Field(default="128MiB", gt=0, validate_default=True)
    """Bytes of a tenant's stored responses, messages aside; the least recently used are forgotten for more."""
    max_requests: int = Field(default=1024, ge=1)
    """Requests at the same time, before 429."""
    max_bodies: ByteSize = Field(default="128MiB", gt=0, validate_default=True)
    """Bytes of the bodies of all those requests, before 429."""
    read_timeout: float = Field(default=30.0, gt=0)
    """Seconds for a request's head, and between two parts of its body."""
    idle_timeout: int = Field(default=75, ge=1)
    """Seconds that a connection stays open for another request: longer than clients keep one."""


class ServerConfig(Config):
    """What `slipstream serve` serves, where, and to whom."""

    model: str = DEFAULT_MODEL
    served_model_name: tuple[str, ...] = ()
    """Another name for the model, for clients that insist on one; may be given several times."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets others in, who need a key."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port to listen on; 0 takes a free one."""
    api_key: str | None = Field(default=None, min_length=1)
    """Refuse requests that do not carry this bearer token."""
    api_keys_file: Path | None = None
    """Refuse requests without a key of this file, each a tenant's: see `slipstream make-key`. It may change."""
    insecure: bool = False
    """Let everybody in without a key, from other machines too."""
    allowed_host: tuple[str, ...] = ()
    """A name that requests may be sent to, beside localhost; * for any."""
    allow_origin: tuple[str, ...] = ()
    """An origin whose web pages may use the server: https://app.example; * for any."""
    log_format: Literal["text", "json"] = "text"
    """The form of the log's lines, one for each turn."""
    traces: bool = False
    """Send a span of OpenTelemetry for each turn, to where OTEL_EXPORTER_OTLP_ENDPOINT says. See docs."""
    root_path: str = Field(default="", pattern=r"^(/[^/?#]+)*$")
    """The path under which a proxy serves this server: /llm."""
    forwarded_allow_ips: tuple[str, ...] = ()
    """A proxy's address or network, whose X-Forwarded-For and X-Forwarded-Proto are believed."""
    reuse: bool = True
    """Keep the KV of conversations between turns. This and what follows a request can switch off for itself."""
    jump_forward: bool = True
    """Take tokens that a grammar forces without computing them."""
    speculation: bool = True
    """Draft tokens by prompt lookup and verify them along."""
    response_cache: bool = True
    """Answer exact repeats of greedy or seeded requests from memory."""
    keep_alive_seconds: float = Field(default=5.0, gt=0)
    """How often a stream shows that it's alive while a long prompt is computed."""
    drain_seconds: float = Field(default=10.0, ge=0)
    """Time for running answers on Ctrl-C or SIGTERM."""
    step_timeout: float = Field(default=120.0, gt=0)
    """Seconds of one step after which /health answers 503."""
    engine: EngineConfig = EngineConfig()
    limits: LimitsConfig = LimitsConfig()


_FIELDS = (*EngineConfig.model_fields, *LimitsConfig.model_fields, *ServerConfig.model_fields)
FLAGS = {name: f"--{name.replace('_', '-')}" for name in _FIELDS}
"""The options of `slipstream serve` that set these fields."""
