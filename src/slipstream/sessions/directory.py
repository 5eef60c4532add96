"""Where sessions are found by their names."""

import logging
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence

from slipstream.chat import NO_SETTING, Message, Part, Setting
from slipstream.sessions.database import Database
from slipstream.sessions.state import SessionState

logger = logging.getLogger(__name__)


class Directory:
    """All sessions by tenant and name, in memory, and in the database if there is one.

    `ttl` is how many seconds a session stays without being used, unless it says otherwise. Hold `lock` from reading
    a session to changing it.
    """

    def __init__(self, ttl: float, database: Database | None) -> None:
        self._ttl = ttl
        self._database = database
        self._states: dict[tuple[str, str], SessionState] = {}  # least recently used first
        self.lock = threading.RLock()
        for state in database.sessions() if database is not None else ():
            self._states[state.tenant, state.id] = state

    def __len__(self) -> int:
        return len(self._states)

    def __iter__(self) -> Iterator[SessionState]:
        """All sessions, least recently used first."""
        with self.lock:
            return iter(list(self._states.values()))

    def find(self, tenant: str, name: str) -> SessionState | None:
        """The session of that name, begun or not."""
        return self._states.get((tenant, name))

    def new(
        self,
        tenant: str,
        name: str,
        messages: Sequence[Message] = (),
        setting: Setting = NO_SETTING,
        *,
        ttl: float | None = None,
    ) -> SessionState:
        """A session that nobody can find before it is added."""
        now, kept_for = time.time(), self._ttl if ttl is None else ttl
        tools, kwargs = setting.tools.tools, setting.template_kwargs
        return SessionState(name, tenant, tuple(messages), tools, kwargs, now, now, kept_for)

    def add(self, state: SessionState) -> None:
        """Have a session found from now on."""
        with self.lock:
            self._states[state.tenant, state.id] = state

    def note_use(self, state: SessionState) -> None:
        """Count a session as used now."""
        with self.lock:
            state.used = time.time()
            self._states.pop((state.tenant, state.id), None)
            self.add(state)

    def save(self, state: SessionState, part: Part | None = None) -> None:
        """Write a session as it is now, and what its last turn added to the ledger, unless it was forgotten."""
        if self._database is None:
            return
        try:
            with self.lock:
                if self.find(state.tenant, state.id) is state:
                    self._database.save(state, part)
        except sqlite3.Error as error:  # such as a full disk: it costs nobody an answer
            logger.warning("session %s can't be saved and is in memory alone: %s", state.id, error)

    def remove(self, states: Iterable[SessionState]) -> None:
        """Forget sessions."""
        with self.lock:
            for state in states:
                state.forgotten = True
                del self._states[state.tenant, state.id]
                if self._database is not None:
                    self._database.delete(state)

    def checkpoint(self) -> None:
        """Bring what was saved to disk."""
        if self._database is not None:
            self._database.checkpoint()

    def close(self) -> None:
        """Close the database."""
        if self._database is not None:
            self._database.close()
