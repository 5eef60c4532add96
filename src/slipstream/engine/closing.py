"""Ending an answer in time: a call or a JSON object that nears the token limit is closed, not cut in half."""

from slipstream.engine.grammar import Constraint

_CAUTION = 16
"""With room for n more tokens than the shortest way to close, n / 16 tokens may pass before looking again."""

_LEEWAY = 64
"""With more room than that left over, a token is taken though no way to close is known after it: one may turn up."""


class Closer:
    """Watches one answer that has to fit a grammar and must not grow beyond `limit` tokens, its prompt included.

    It replaces a token after which the answer could no longer be closed in time. What it decides depends on the tokens
    before and nothing else, as long as it is asked at each place where the grammar leaves a choice, and only there.
    Where even the way to close is too long, or none is found, the answer goes on, and may be cut off.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._look_again = 0

    def choose(self, constraint: Constraint, token: int, position: int) -> int | None:
        """The token to take at `position` where `token` was sampled; None if the answer, complete, has to end here."""
        if position < self._look_again:
            return token
        room = self._limit - position
        after = constraint.copy()
        after.accept((token,))
        closing = after.closing(room - 1)
        if closing is not None:
            self._look_again = position + 1 + (room - 1 - len(closing)) // _CAUTION
            return token
        closing = constraint.closing(room)
        if closing is None or len(closing) + _LEEWAY < room:  # there may be a way further on
            self._look_again = position + 1 + room // _CAUTION
            return token
        return closing[0] if closing else None
