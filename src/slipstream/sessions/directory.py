"""Where sessions are found by their names, and how long they stay.

In memory are those that were used since the start, in the database all.
"""

import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import takewhile
from typing import NamedTuple

from slipstream.chat import NO_SETTING, Conversations, Setting
from slipstream.engine import EngineCore
from slipstream.engine.commands import Discard, Unpin
from slipstream.errors import EngineStoppedError
from slipstream.sessions.ahead import AheadOfTime
from slipstream.sessions.database import Database
from slipstream.sessions.history import History
from slipstream.sessions.kv_connector import KVConnector
from slipstream.sessions.state import SessionState, tokens_of
from slipstream.sessions.worker import Worker

logger = logging.getLogger(__name__)

MAX_SESSIONS = 2048
"""When there are more, the least recently used are forgotten, but none that is pinned."""

_EXPIRY_INTERVAL = 10.0


class Entry(NamedTuple):
    """What the directory says of a session without reading it."""

    tenant: str
    id: str
    used: float
    expires: float | None
    state: SessionState | None
    """The session, if it's in memory."""

    @property
    def busy(self) -> bool:
        """Whether a turn is under way."""
        return self.state is not None and self.state.turn is not None


class Directory:
    """All sessions by tenant and name. Hold `lock` from finding a session to changing it.

    `ttl` is how many seconds a session stays without being used, unless it says otherwise. Without a database, all
    sessions are in memory alone. What no session leads to any more, in the ledger and on disk, goes with the last one.
    """

    def __init__(
        self,
        core: EngineCore,
        conversations: Conversations,
        ahead: AheadOfTime,
        worker: Worker,
        *,
        ttl: float,
        database: Database | None,
        connector: KVConnector | None,
    ) -> None:
        self._core = core
        self._conversations = conversations
        self._ahead = ahead
        self._worker = worker
        self._ttl = ttl
        self._database = database
        self._connector = connector
        self._states: dict[tuple[str, str], SessionState] = {}  # least recently used first
        self._unsaved: set[tuple[str, str]] = set()
        self.lock = threading.RLock()
        if database is not None:
            conversations.recall = database.recorded
        worker.run(self._tidy, after=_EXPIRY_INTERVAL)

    def __len__(self) -> int:
        with self.lock:
            return len(self._unsaved) + (self._database.session_count() if self._database is not None else 0)

    def entries(self) -> list[Entry]:
        """All sessions, least recently used first."""
        with self.lock:
            listed = self._database.listed() if self._database is not None else []
            saved = [Entry(*each, None) for each in listed if each[:2] not in self._states]
            used = [Entry(*key, state.used, state.expires, state) for key, state in self._states.items()]
            return sorted(saved + used, key=lambda entry: entry.used)

    def pinned(self) -> list[SessionState]:
        """The sessions that were pinned when the server ended."""
        listed = self._database.listed(pinned=True) if self._database is not None else []
        found = (self.find(tenant, id) for tenant, id, *_ in listed)
        return [state for state in found if state is not None]

    def find(self, tenant: str, name: str) -> SessionState | None:
        """The session of that name, begun or not."""
        with self.lock:
            state = self._states.get((tenant, name))
            if state is None and self._database is not None:
                state = self._database.session(tenant, name)
                if state is not None:
                    self._states[tenant, name] = state
            return state

    def new(
        self,
        tenant: str,
        name: str,
        history: History | None = None,
        setting: Setting = NO_SETTING,
        *,
        ttl: float | None = None,
    ) -> SessionState:
        """A session that nobody can find before it is added."""
        now, kept_for = time.time(), self._ttl if ttl is None else ttl
        tools, kwargs = setting.tools.tools, setting.template_kwargs
        return SessionState(name, tenant, history or History(), tools, kwargs, now, now, kept_for)

    def add(self, state: SessionState) -> None:
        """Have a session found from now on, as the one that was used last."""
        with self.lock:
            key = state.tenant, state.id
            if self._states.pop(key, None) is None:
                self._unsaved.add(key)
            self._states[key] = state

    def note_use(self, state: SessionState) -> None:
        """Count a session as used now."""
        with self.lock:
            state.used = time.time()
            self.add(state)

    def save(self, state: SessionState) -> None:
        """Write a session as it is now, and what of its ledger is new, unless it was forgotten."""
        key = state.tenant, state.id
        with self.lock:
            if self._database is None or self._states.get(key) is not state:
                return
            try:
                known, lineage = self._database.knows, self._conversations.lineage(state.node)
                gone = self._database.save(state, list(takewhile(lambda part: not known(part[0]), lineage)))
                self._unsaved.discard(key)
            except sqlite3.Error as error:  # such as a full disk: it costs nobody an answer
                logger.warning("session %s can't be saved and is in memory alone: %s", state.id, error)
                return
        self._forget_kv(gone)

    def remove(self, entries: Iterable[tuple[str, str]]) -> list[SessionState]:
        """Forget sessions by tenant and name; returns those that were in memory."""
        removed, gone = [], []
        with self.lock:
            for key in entries:
                if (state := self._states.pop(key, None)) is not None:
                    state.forgotten = True
                    removed.append(state)
                if key in self._unsaved:
                    self._unsaved.discard(key)
                elif self._database is not None:
                    try:
                        gone += self._database.delete(*key)
                    except sqlite3.Error as error:
                        logger.warning("session %s can't be deleted on disk, and will be back: %s", key[1], error)
        self._forget_kv(gone)
        return removed

    def forget(self, state: SessionState) -> None:
        """Forget a session now; raises `SessionConflictError` while a turn is under way."""
        with self.lock:
            state.require_idle()
            gone = self.remove([(state.tenant, state.id)])
        self._free(gone)

    def forget_surplus(self, newest: SessionState) -> None:
        """Forget the least recently used sessions if there are too many, but never the newest."""
        with self.lock:
            surplus = len(self) - MAX_SESSIONS
            if surplus <= 0:
                return
            idle = self._idle(lambda entry: entry.expires is not None and entry.state is not newest)
            gone = self.remove(idle[:surplus])
        self._worker.run(lambda: self._free(gone))

    def _tidy(self) -> None:
        """Forget what has expired, from time to time."""
        self._worker.run(self._tidy, after=_EXPIRY_INTERVAL)
        now = time.time()
        with self.lock:
            expired = self._idle(lambda entry: entry.expires is not None and entry.expires < now)
            gone = self.remove(expired)
        self._free(gone)
        if self._database is not None:
            self._database.checkpoint()

    def _idle(self, chosen: Callable[[Entry], bool]) -> list[tuple[str, str]]:
        """Chosen sessions that have no turn under way."""
        entries = self.entries()
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

    def _forget_kv(self, keys: Iterable[bytes]) -> None:
        if self._connector is not None:
            self._connector.forget(list(keys))
