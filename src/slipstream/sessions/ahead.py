"""What sessions will certainly begin their next turn with, computed while nobody waits."""

import logging
import threading

import numpy as np

from slipstream.chat import Conversations, Setting
from slipstream.engine import EngineCore, TurnCounters
from slipstream.engine.commands import Expect, Pin, Unpin
from slipstream.engine.idle import IdlePrefill
from slipstream.sessions.state import SessionState
from slipstream.sessions.worker import Worker
from slipstream.types import IntArray

logger = logging.getLogger(__name__)

_DELAY = 0.03
"""Seconds after an answer until work for the next turn begins: who comes back at once finds nothing in the way."""


class AheadOfTime:
    """Tells the engine what sessions need next: its idle work, what is pinned of it, and who will be back soon.

    It counts what turns found computed.
    """

    def __init__(self, core: EngineCore, conversations: Conversations, worker: Worker) -> None:
        self._core = core
        self._worker = worker
        self._conversations = conversations
        self.used_tokens = 0
        """Prompt tokens that turns found computed ahead."""
        self.saved_seconds = 0.0
        """What they would have cost, at the least."""
        self._lock = threading.Lock()
        self._expected = 0

    @property
    def waiting(self) -> int:
        """How many sessions have something yet to be computed ahead."""
        return self._expected + self._core.idle_waiting

    def compute(self, state: SessionState, tokens: IntArray, *, at_least: int = 0) -> None:
        """Have the tokens of a session computed, if `at_least` so many of them still are."""

        def done(ahead: range) -> None:
            if state.forgotten:
                return
            state.ahead = range(min(ahead.start, state.ahead.start) if state.ahead else ahead.start, ahead.stop)
            if state.pinned:
                self._worker.run(lambda: self._pin(state, tokens))

        self._core.prefill(IdlePrefill(state.id, state.tenant, tokens, done, at_least))

    def _pin(self, state: SessionState, tokens: IntArray) -> None:
        """Pin what was computed of a session, unless it was unpinned meanwhile."""
        if not state.pinned or state.forgotten:
            return
        if not self._core.call(Pin(state.pin_name, state.tenant, tokens)):
            logger.warning("session %s outgrew the memory for pinned sessions: its end is not pinned", state.id)
        if not state.pinned or state.forgotten:
            self._core.call(Unpin(state.pin_name))

    def expect(self, tenant: str, tokens: IntArray) -> None:
        """Have a conversation kept in memory rather than others: the tools that its last answer calls are running."""
        self._core.send(Expect(tenant, tokens))

    def compute_after_answer(self, state: SessionState, tokens: IntArray, setting: Setting) -> None:
        """Have computed soon what follows the answer that ends with `tokens`, if the session still ends with it."""
        with self._lock:
            self._expected += 1
        self._worker.run(lambda: self._compute_tail(state, tokens, setting), after=_DELAY)

    def _compute_tail(self, state: SessionState, tokens: IntArray, setting: Setting) -> None:
        try:
            if state.token_ids is tokens and state.turn is None:
                at_least = 0 if state.pinned else len(tokens)  # nobody asked for what was evicted since
                self.compute(state, self.with_certain_tail(state, tokens, setting), at_least=at_least)
        finally:
            with self._lock:
                self._expected -= 1

    def with_certain_tail(self, state: SessionState, tokens: IntArray, setting: Setting) -> IntArray:
        """The tokens of a session that ends with an answer, and those that will follow."""
        return np.concatenate((tokens, self._conversations.certain_tail(state.messages[-1], tokens, setting)))

    def count(self, state: SessionState, counters: TurnCounters) -> None:
        """Count what a turn found computed ahead."""
        if counters.response_cache != "hit":
            used = len(range(state.ahead.start, min(counters.reused_tokens, state.ahead.stop)))
            self.used_tokens += used
            self.saved_seconds += used * self._core.backend.cost.token(0)
        state.ahead = range(0)
