"""The engine: one thread that owns the model, and what decides what it does next."""

from slipstream.engine.core import EngineCore, EngineStats
from slipstream.engine.generation import FinishReason, Generation, GenerationRequest, Output, TurnCounters
from slipstream.engine.params import SamplingParams
from slipstream.engine.sampling import TokenLogprob

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
]
