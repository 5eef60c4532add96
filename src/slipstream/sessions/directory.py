"""Where sessions are found by their names, and how long they stay.

In memory are those that were used since the start, in the database all.
"""

import logging
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from itertools import takewhile
from typing import NamedTuple

from slipstream import fields
from slipstream.chat import NO_SETTING, Conversations, Setting, ToolUse
from slipstream.engine import EngineCore
from slipstream.engine.commands import Discard, Unpin
from slipstream.errors import EngineStoppedError, LimitError, StorageError
from slipstream.sessions.ahead import AheadOfTime
from slipstream.sessions.breaks import Kind
from slipstream.sessions.database import Database
from slipstream.sessions.history import History
from slipstream.sessions.kv_connector import KVConnector
from slipstream.sessions.state import SessionLimits, SessionState, tokens_of
from slipstream.sessions.worker import Worker

logger = logging.getLogger(__name__)

_EXPIRY_INTERVAL = 10.0
_SCRUB_DELAY = 0.5
"""Seconds from a deletion to the checkpoint that takes it out of the log, so that many deletions share one."""


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

    Without a database, all sessions are in memory alone. What no session leads to any more, in the ledger and on disk,
    goes with the last one.
    """

    def __init__(
        self,
        core: EngineCore,
        conversations: Conversations,
        ahead: AheadOfTime,
        worker: Worker,
        limits: SessionLimits,
        database: Database | None,
        connector: KVConnector | None,
    ) -> None:
        self._limits = limits
        self._core = core
        self._conversations = conversations
        self._ahead = ahead
        self._worker = worker
        self._database = database
        self._connector = connector
        self._states: dict[tuple[str, str], SessionState] = {}  # least recently used first
        self._sizes: dict[tuple[str, str], int] = {}
        self._memory: Counter[str] = Counter()  # the sums of those sizes, by tenant
        self._unsaved: set[tuple[str, str]] = set()
        self._outdated: set[tuple[str, str]] = set()
        """Of those in the database, which are not there as they are now."""
        self._scrubbing = False
        self.missing_kind: Kind = "evicted" if core.backend.exact or connector is None else "not_exact"
        """Why KV of a known conversation is not in memory."""
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
                    self._measure((tenant, name), state.size)
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
        now, kept_for = time.time(), self._limits.ttl if ttl is None else ttl
        setting = Setting(ToolUse(setting.tools.tools), setting.template_kwargs)
        return SessionState(name, tenant, history or History.begin(tenant), setting, now, now, kept_for)

    def add(self, state: SessionState) -> None:
        """Have a session found from now on, as the one that was used last. The lock is held."""
        key = state.tenant, state.id
        if self._states.pop(key, None) is None:
            self._unsaved.add(key)
        self._states[key] = state
        self._measure(key, state.size)

    def note_use(self, state: SessionState) -> None:
        """Count a session as used now. The lock is held."""
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
                self._outdated.discard(key)
            except sqlite3.Error as error:  # such as a full disk: it costs nobody an answer
                self._outdated.add(key)
                logger.warning("session %s can't be saved yet, and is in memory alone: %s", state.id, error)
                return
        self._forget_kv(gone)

    def save_late(self) -> None:
        """Save the sessions that couldn't be when they changed, until the first that can't be now."""
        with self.lock:
            late = [self._states[key] for key in self._outdated]
        for state in late:
            self.save(state)
            if (state.tenant, state.id) in self._outdated:
                return

    def remove(self, entries: Iterable[tuple[str, str]]) -> list[SessionState]:
        """Forget sessions by tenant and name; returns those that were in memory.

        One that the disk doesn't let go is not forgotten at all.
        """
        removed, gone = [], []
        with self.lock:
            for key in entries:
                if self._database is not None and key not in self._unsaved:
                    try:
                        gone += self._database.delete(*key)
                        self.scrub()
                    except sqlite3.Error as error:
                        logger.warning("session %s can't be deleted on disk, and stays: %s", key[1], error)
                        continue
                self._unsaved.discard(key)
                if (state := self._unload(key)) is not None:
                    state.forgotten = True
                    removed.append(state)
        self._forget_kv(gone)
        return removed

    def require_room(self, state: SessionState, *, pinned: bool = False) -> None:
        """Raise `LimitError` for a session that is too large for its tenant's memory, or one too many that's pinned."""
        if state.size > self._limits.memory:
            most = self._limits.memory
            raise LimitError(None, state.size, "bytes for the session", fields.MAX_SESSION_MEMORY, most)
        if pinned and not state.pinned:
            pins = 1 + sum(entry.expires is None and entry.tenant == state.tenant for entry in self.entries())
            if pins > self._limits.pins:
                raise LimitError(fields.PINNED, pins, "sessions", fields.MAX_PINS, self._limits.pins)

    def forget(self, state: SessionState) -> None:
        """Forget a session now.

        Raises `SessionConflictError` while a turn is under way, `StorageError` if the disk doesn't let it go.
        """
        with self.lock:
            state.require_idle()
            gone = self.remove([(state.tenant, state.id)])
        if not gone:
            raise StorageError(f"session {state.id!r}")
        self._free(gone)

    def forget_surplus(self, newest: SessionState) -> None:
        """Forget the least recently used sessions of a tenant if there are too many, but never the newest."""
        tenant = newest.tenant
        with self.lock:
            surplus = len(self) - self._limits.sessions  # of all tenants, which is quick to know
            if surplus > 0:
                surplus = self._count(tenant) - self._limits.sessions
            excess = self._memory[tenant] - self._limits.memory
            if surplus <= 0 and excess <= 0:
                return
            own = [entry for entry in self.entries() if entry.tenant == tenant]
            surplus -= sum(entry.expires is None for entry in own)
            idle = [
                entry[:2] for entry in own if entry.expires is not None and not entry.busy and entry.state is not newest
            ]
            chosen = idle[: max(0, surplus)]
            for key in idle[len(chosen) :]:
                if excess <= sum(self._sizes.get(each, 0) for each in chosen):
                    break
                if self._database is not None and key not in self._unsaved | self._outdated:
                    excess -= self._sizes.get(key, 0)
                    self._unload(key)  # it's found on disk again
                else:
                    chosen.append(key)
            gone = self.remove(chosen)
        self._worker.run(lambda: self._free(gone))

    def _count(self, tenant: str) -> int:
        unsaved = sum(1 for key in self._unsaved if key[0] == tenant)
        return unsaved + (self._database.session_count(tenant) if self._database is not None else 0)

    def _measure(self, key: tuple[str, str], size: int) -> None:
        """Note what a session takes. The lock is held."""
        self._memory[key[0]] += size - self._sizes.pop(key, 0)
        if size:
            self._sizes[key] = size

    def _unload(self, key: tuple[str, str]) -> SessionState | None:
        """Take a session out of memory. The lock is held."""
        self._measure(key, 0)
        self._outdated.discard(key)
        return self._states.pop(key, None)

    def scrub(self) -> None:
        """Have what was deleted leave the database's log too, soon."""
        if self._database is not None and not self._scrubbing:
            self._scrubbing = True
            self._worker.run(self._checkpoint, after=_SCRUB_DELAY)

    def _checkpoint(self) -> None:
        self._scrubbing = False
        if self._database is not None:
            try:
                self._database.checkpoint()
            except sqlite3.Error as error:
                logger.warning("the database's log can't be emptied yet: %s", error)

    def _tidy(self) -> None:
        """Forget what has expired, and save what couldn't be, from time to time."""
        self._worker.run(self._tidy, after=_EXPIRY_INTERVAL)
        now = time.time()
        with self.lock:
            idle = [entry for entry in self.entries() if not entry.busy]
            gone = self.remove(entry[:2] for entry in idle if entry.expires is not None and entry.expires < now)
        self._free(gone)
        self.save_late()
        self._checkpoint()

    def _free(self, states: Iterable[SessionState]) -> None:
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
