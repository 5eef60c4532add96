"""How long sessions live: which are forgotten, what goes with them, and which are made ready after a restart."""

import time
from collections.abc import Callable, Iterable
from contextlib import suppress

from slipstream.chat import Conversations
from slipstream.engine import EngineCore
from slipstream.engine.commands import Discard, Unpin
from slipstream.errors import EngineStoppedError
from slipstream.sessions.ahead import AheadOfTime
from slipstream.sessions.directory import Directory, Entry
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

    def forget(self, state: SessionState) -> None:
        """Forget a session now; raises `SessionConflictError` while a turn is under way."""
        with self._directory.lock:
            state.require_idle()
            gone = self._directory.remove([(state.tenant, state.id)])
        self._free(gone)

    def forget_surplus(self, newest: SessionState) -> None:
        """Forget the least recently used sessions if there are too many, but never the newest."""
        with self._directory.lock:
            surplus = len(self._directory) - MAX_SESSIONS
            if surplus <= 0:
                return
            idle = self._idle(lambda entry: entry.expires is not None and entry.state is not newest)
            gone = self._directory.remove(idle[:surplus])
        self._later.run(lambda: self._free(gone))

    def _tidy(self) -> None:
        """Forget what has expired, from time to time."""
        self._later.run(self._tidy, after=_EXPIRY_INTERVAL)
        now = time.time()
        with self._directory.lock:
            expired = self._idle(lambda entry: entry.expires is not None and entry.expires < now)
            gone = self._directory.remove(expired)
        self._free(gone)
        self._directory.checkpoint()

    def _idle(self, chosen: Callable[[Entry], bool]) -> list[tuple[str, str]]:
        """Chosen sessions that have no turn under way."""
        entries = self._directory.entries()
        return [(entry.tenant, entry.id) for entry in entries if not entry.busy and chosen(entry)]

    def _free(self, states: Iterable[SessionState]) -> None:
        """Free the memory of sessions that are no more."""
        for state in states:
            tokens = tokens_of(state, self._conversations)
            if len(tokens) and state.messages[-1].role == "assistant":
                tokens = self._ahead.with_certain_tail(state, tokens, state.setting)
            with suppress(EngineStoppedError):  # which frees all there is
                self._core.call(Unpin(state.pin_name))
                self._core.call(Discard(state.tenant, tokens))
