"""The engine: one thread that owns the model, and what decides what it does next."""

from slipstream.engine.active import ActiveRequest
from slipstream.engine.core import EngineCore
from slipstream.engine.messages import EngineStats
from slipstream.engine.request import EngineRequest, FinishReason, Output, TurnCounters, as_prompt
from slipstream.sampling import SamplingParams, TokenLogprob

__all__ = [
    "ActiveRequest",
    "EngineCore",
    "EngineRequest",
    "EngineStats",
    "FinishReason",
    "Output",
    "SamplingParams",
    "TokenLogprob",
    "TurnCounters",
    "as_prompt",
]
