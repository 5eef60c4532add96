"""The one configuration: typed, validated, immutable. Options and environment variables of the CLI map onto it."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field, TypeAdapter

from slipstream.models import DEFAULT_MODEL


class EngineConfig(BaseModel):
    """How the engine uses the machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    backend: Literal["openvino"] = "openvino"
    """What computes the model."""
    kv_memory: ByteSize = Field(default=TypeAdapter(ByteSize).validate_python("1GiB"), gt=0)
    """Bytes for keys and values of all conversations together."""
    response_cache_memory: ByteSize = Field(default=TypeAdapter(ByteSize).validate_python("64MiB"), ge=0)
    """Bytes for answers that exact repeats of deterministic requests get from memory; 0 for none."""
    session_ttl: float = Field(default=86_400.0, gt=0)
    """Seconds that a session stays without being used."""
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
    tool_format: str | None = None
    """How the model writes tool calls; by default what its chat template shows."""
    max_running: int = Field(default=64, ge=1)
    """Requests computed at the same time."""
    max_waiting: int = Field(default=256, ge=1)
    """Requests that may queue; more are answered with 429."""


class ServerConfig(BaseModel):
    """What `slipstream serve` serves, where, and to whom."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = DEFAULT_MODEL
    served_model_name: tuple[str, ...] = ()
    """Aliases of the model, for clients that insist on a name; its own is served too."""
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    api_key: str | None = Field(default=None, min_length=1)
    """Requests must carry it as a bearer token; None lets everybody in."""
    reuse: bool = True
    """Whether KV is kept and used across requests. This and what follows a request can switch off for itself."""
    jump_forward: bool = True
    """Whether tokens that a grammar forces are taken without a forward pass of their own."""
    speculation: bool = True
    """Whether drafts are verified along with the tokens that need a pass anyway."""
    response_cache: bool = True
    """Whether exact repeats of deterministic requests are answered from memory."""
    drain_seconds: float = Field(default=10.0, ge=0)
    """How long running requests may go on after a signal to stop."""
    engine: EngineConfig = EngineConfig()


FLAGS = {name: f"--{name.replace('_', '-')}" for name in (*EngineConfig.model_fields, *ServerConfig.model_fields)}
"""The options of `slipstream serve` that set these fields."""
