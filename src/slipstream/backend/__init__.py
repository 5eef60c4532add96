"""Backends: a model's tensors and KV blocks, and nothing about requests."""

from slipstream.backend.base import Backend, Piece, StepMeasurements

__all__ = ["Backend", "Piece", "StepMeasurements"]
