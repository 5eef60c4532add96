"""How long sessions live: which are forgotten, what goes with them, and which are made ready after a restart."""

import time
from collections.abc import Iterable
from contextlib import suppress

from slipstream.backend.base import IntArray
from slipstream.chat import Conversations
from slipstream.engine import EngineCore
from slipstream.errors import EngineStoppedError
from slipstream.kv import KVMemory
from slipstream.sessions.ahead import AheadOfTime
from slipstream.sessions.directory import Directory
from slipstream.sessions.later import Later
from slipstream.sessions.state import SessionState, tokens_of

MAX_SESSIONS = 2048
"""When there are more, the least recently used are forgotten, but none that is pinned."""

_EXPIRY_INTERVAL = 10.0


class Lifetime:
    """Forgets sessions that expired, that are too many, or that a client is done with, and frees what they held."""

    def __init__(
        self, core: EngineCore, conversations: Conversations, directory: Directory, ahead: AheadOfTime, later: Later
    ) -> None:
        self._core = core
        self._conversations = conversations
        self._directory = directory
        self._ahead = ahead
        self._later = later
        later.run(self._tidy, after=_EXPIRY_INTERVAL)

    def forget(self, states: Iterable[SessionState]) -> None:
        """Forget sessions now."""
        self._directory.remove(states)
        self._free(states)

    def forget_surplus(self, newest: SessionState) -> None:
        """Forget the least recently used sessions if there are too many, but never the newest."""
        with self._directory.lock:
            surplus = len(self._directory) - MAX_SESSIONS
            if surplus <= 0:
                return
            others = (state for state in self._directory if state is not newest)
            idle = (state for state in others if not state.pinned and state.turn is None)
            gone = [state for state, _ in zip(idle, range(surplus), strict=False)]
            self._directory.remove(gone)
        self._later.run(lambda: self._free(gone))

    def _tidy(self) -> None:
        """Forget what has expired, from time to time."""
        self._later.run(self._tidy, after=_EXPIRY_INTERVAL)
        with self._directory.lock:
            now = time.time()
            gone = [s for s in self._directory if s.expires is not None and s.expires < now and s.turn is None]
            self._directory.remove(gone)
        self._free(gone)
        self._directory.checkpoint()

    def _free(self, states: Iterable[SessionState]) -> None:
        """Free the memory of sessions that are no more."""
        for state in states:
            tokens = tokens_of(state, self._conversations)
            if len(tokens) and state.messages[-1].role == "assistant":
                tokens = self._ahead.with_certain_tail(state, tokens, state.setting)

            def free(kv: KVMemory, state: SessionState = state, tokens: IntArray = tokens) -> None:
                kv.unpin(state.pin_name)
                kv.discard(state.tenant, tokens)

            with suppress(EngineStoppedError):  # which frees all there is
                self._core.call(free)
