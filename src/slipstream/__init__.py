"""Slipstream: a stateful inference server for agents that call tools.

This is the embedded API, the engine in your own process:

    from slipstream import Engine

    with Engine() as engine:
        session = engine.session("You are terse.")
        print(session.send("Name a prime above 100.").text)
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slipstream.chat import Message, Tool, ToolCall, ToolUse
    from slipstream.config import EngineConfig
    from slipstream.embedded import Engine, Session, Stream
    from slipstream.engine import Output, SamplingParams, TokenLogprob, TurnCounters
    from slipstream.errors import (
        ContextLengthError,
        EngineStoppedError,
        InvalidRequestError,
        ModelError,
        OverloadedError,
        SessionConflictError,
        SessionNotFoundError,
        SlipstreamError,
        StateError,
        UnsupportedModelError,
    )
    from slipstream.turns import Completion, TurnRequest

__all__ = [
    "Completion",
    "ContextLengthError",
    "Engine",
    "EngineConfig",
    "EngineStoppedError",
    "InvalidRequestError",
    "Message",
    "ModelError",
    "Output",
    "OverloadedError",
    "SamplingParams",
    "Session",
    "SessionConflictError",
    "SessionNotFoundError",
    "SlipstreamError",
    "StateError",
    "Stream",
    "TokenLogprob",
    "Tool",
    "ToolCall",
    "ToolUse",
    "TurnCounters",
    "TurnRequest",
    "UnsupportedModelError",
]

_ROOMS = ("errors", "sampling", "chat", "config", "engine", "turns", "embedded")
"""Where these names are. They are imported when one is asked for: parts of the package do without most of it."""


def __getattr__(name: str) -> object:
    if name in __all__:
        for room in _ROOMS:
            if (found := getattr(import_module(f"slipstream.{room}"), name, None)) is not None:
                globals()[name] = found
                return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
