"""Turns: from a request, whoever makes it, to the pieces of its answers. No protocol, no event loop."""

from slipstream.turns.request import TurnRequest
from slipstream.turns.turn import Choice, Completion, Piece, Turn
from slipstream.turns.turns import Turns

__all__ = ["Choice", "Completion", "Piece", "Turn", "TurnRequest", "Turns"]
