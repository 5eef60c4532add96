"""The engine: one thread that owns the model, and what decides what it does next."""

from slipstream.engine.core import EngineCore
from slipstream.engine.generation import Generation
from slipstream.engine.loop import EngineStats
from slipstream.engine.request import FinishReason, GenerationRequest, Output, TurnCounters, as_prompt
from slipstream.sampling import SamplingParams, TokenLogprob

__all__ = [
    "EngineCore",
    "EngineStats",
    "FinishReason",
    "Generation",
    "GenerationRequest",
    "Output",
    "SamplingParams",
    "TokenLogprob",
    "TurnCounters",
    "as_prompt",
]
