"""Turns: from a request, whoever makes it, to the pieces of its answers. No protocol, no event loop."""

from slipstream.turns.preparation import Preparation
from slipstream.turns.request import TurnRequest
from slipstream.turns.turn import Choice, Completion, Piece, Turn, Turns

__all__ = ["Choice", "Completion", "Piece", "Preparation", "Turn", "TurnRequest", "Turns"]
