"""Slipstream: a stateful inference server for agents that call tools.

This is the embedded API, the engine in your own process:

    from slipstream import Engine

    with Engine() as engine:
        session = engine.session("You are terse.")
        print(session.send("Name a prime above 100.").text)
"""

from slipstream.chat import Message, Tool, ToolCall, ToolUse
from slipstream.config import EngineConfig
from slipstream.embedded import Engine, Session
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
    "TokenLogprob",
    "Tool",
    "ToolCall",
    "ToolUse",
    "TurnCounters",
    "TurnRequest",
    "UnsupportedModelError",
]
