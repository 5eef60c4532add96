"""What other threads send to the engine's, and what they see of it."""

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from slipstream.engine.active import ActiveRequest
from slipstream.engine.commands import Command, Task
from slipstream.engine.idle import IdlePrefill
from slipstream.kv import KVUsage


@dataclass(frozen=True, slots=True)
class Drain:
    """Take no more requests; end those that run at a `monotonic` time, and report when there are none."""

    deadline: float
    done: Future[None]


class Wake:
    """Something has changed; look."""


class Stop:
    """End the thread."""


Message = ActiveRequest | IdlePrefill | Task[Any] | Command[None] | Drain | Wake | Stop
"""A command by itself is one that nobody waits for, and that no answer's last tokens have to be computed for."""


@dataclass(slots=True)
class EngineStats:
    """Totals since the start, and what there is now."""

    steps: int = 0
    tokens_forwarded: int = 0
    """Real tokens, without padding."""
    infer_seconds: float = 0.0
    """Of steps: from the launch, or the end of the step before, to the choice of their first tokens."""
    busy_seconds: float = 0.0
    """Time of the engine thread with something to do, `infer_seconds` included."""
    idle_tokens: int = 0
    """Of `tokens_forwarded`: computed ahead of time, while nobody waited."""
    idle_seconds: float = 0.0
    preemptions: int = 0
    running: int = 0
    waiting: int = 0
    idle_jobs: int = 0
    """Work that waits for a time when nobody waits."""
    idle_jobs_taken: int = 0
    requests_taken: int = 0
    """Out of the inbox, since the start; so are idle jobs."""
    kv: KVUsage = field(default_factory=KVUsage)
