"""Backends: what computes a model's steps and keeps the states of sequences, and nothing about requests."""

from slipstream.backend.base import Backend, Chunk, Ticket
from slipstream.backend.step_cost import Load, StepCost, StepMeasurements
from slipstream.backend.store import Blob, Exported, OutOfMemoryError, SequenceState, Store

__all__ = [
    "Backend",
    "Blob",
    "Chunk",
    "Exported",
    "Load",
    "OutOfMemoryError",
    "SequenceState",
    "StepCost",
    "StepMeasurements",
    "Store",
    "Ticket",
]
