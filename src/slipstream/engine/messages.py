"""What other threads send to the engine's."""

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from slipstream.engine.active import ActiveRequest
from slipstream.engine.commands import Command, Task
from slipstream.engine.idle import IdlePrefill


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
