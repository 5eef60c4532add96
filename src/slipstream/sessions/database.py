"""What a server remembers across restarts besides KV: sessions, the ledger, stored responses. In one SQLite file."""

import logging
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from pydantic import TypeAdapter

from slipstream.chat import Message, Part, Tool
from slipstream.chat.ledger import LedgerEntry
from slipstream.chat.messages import Digest
from slipstream.errors import StateError
from slipstream.fields import STATE_DIR
from slipstream.sessions.state import SessionState

logger = logging.getLogger(__name__)

_VERSION = 2
_SCHEMA = """
CREATE TABLE sessions (
    tenant TEXT, id TEXT, messages BLOB, tools BLOB, template_kwargs BLOB, created REAL, used REAL, ttl REAL,
    named INTEGER, shared INTEGER, pinned INTEGER, parent TEXT, node BLOB, tokens INTEGER, checksum BLOB,
    PRIMARY KEY (tenant, id)
);
CREATE TABLE ledger (
    key BLOB, parent BLOB, tokens BLOB, conversation_id TEXT, generated INTEGER, model TEXT, checksum BLOB,
    PRIMARY KEY (model, key)
);
CREATE TABLE records (
    kind TEXT, tenant TEXT, id TEXT, used REAL, value BLOB, checksum BLOB, PRIMARY KEY (kind, tenant, id)
);
"""
_REACHABLE = """
WITH RECURSIVE reachable(key) AS (
    SELECT node FROM sessions WHERE node IS NOT NULL
    UNION SELECT parent FROM ledger JOIN reachable USING (key) WHERE parent IS NOT NULL
) SELECT key FROM reachable
"""

_ORPHANS = """
SELECT rowid FROM ledger AS child
WHERE parent IS NOT NULL AND NOT EXISTS (SELECT * FROM ledger WHERE key = child.parent AND model = child.model)
"""

_NOT_THE_FILES_FAULT = (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_FULL, sqlite3.SQLITE_PERM, sqlite3.SQLITE_READONLY)

_MESSAGES = TypeAdapter(tuple[Message, ...])
_TOOLS = TypeAdapter(tuple[Tool, ...])
_KWARGS = TypeAdapter(dict[str, Any])


class Database:
    """The file, opened for this process alone. Thread-safe.

    A commit reaches the operating system before the call returns, so it outlives the process, however that ends; only
    `checkpoint` waits for the disk. A file that is damaged is set aside, a row that is damaged dropped, with a warning.
    Raises `StateError` if another server has it open, or a later version wrote it; `sqlite3.Error` if it can't be had.
    """

    def __init__(self, path: Path, model: str) -> None:
        self._model = model
        self._lock = threading.Lock()
        try:
            self._connection = _open(path)
        except sqlite3.DatabaseError as error:
            if "locked" in str(error):
                raise StateError(f"{path.parent} is in use by another server: choose another ", STATE_DIR) from error
            if getattr(error, "sqlite_errorcode", 0) & 0xFF in _NOT_THE_FILES_FAULT:
                raise
            aside = path.with_name(f"{path.name}.damaged-{time.strftime('%Y%m%dT%H%M%S')}")
            logger.warning("%s is damaged (%s): it is kept as %s, and sessions begin anew", path, error, aside.name)
            path.replace(aside)
            for suffix in ("-wal", "-shm"):
                path.with_name(path.name + suffix).unlink(missing_ok=True)
            self._connection = _open(path)

    def save(self, state: SessionState, part: Part | None = None) -> None:
        """Save a session as it is now, and what its last turn added to the ledger."""
        row = _sealed(
            *(state.tenant, state.id, _MESSAGES.dump_json(state.messages), _TOOLS.dump_json(state.tools)),
            _KWARGS.dump_json(dict(state.template_kwargs)),
            *(state.created, state.used, state.ttl, int(state.named), int(state.shared), int(state.pinned)),
            *(state.parent, state.node, state.tokens),
        )
        with self._lock, self._connection:
            self._connection.execute(f"INSERT OR REPLACE INTO sessions VALUES ({_marks(row)})", row)
            if part is not None:
                entry = part.entry
                told = entry.parent, entry.tokens.tobytes(), entry.conversation_id, entry.generated
                values = _sealed(part.key, *told, self._model)
                self._connection.execute(f"INSERT OR IGNORE INTO ledger VALUES ({_marks(values)})", values)

    def delete(self, state: SessionState) -> None:
        """Forget a session; its part of the ledger goes with the next `prune`."""
        with self._lock, self._connection:
            self._connection.execute("DELETE FROM sessions WHERE tenant = ? AND id = ?", (state.tenant, state.id))

    def sessions(self) -> Iterator[SessionState]:
        """All sessions, least recently used first."""
        with self._lock:
            rows = self._connection.execute("SELECT * FROM sessions ORDER BY used").fetchall()
        for tenant, id, messages, tools, kwargs, created, used, ttl, *flags, parent, node, tokens, _ in rows:
            named, shared, pinned = map(bool, flags)
            yield SessionState(
                id=id,
                tenant=tenant,
                messages=_MESSAGES.validate_json(messages),
                tools=_TOOLS.validate_json(tools),
                template_kwargs=_KWARGS.validate_json(kwargs),
                created=created,
                used=used,
                ttl=ttl,
                named=named,
                shared=shared,
                pinned=pinned,
                parent=parent,
                node=node,
                tokens=tokens,
            )

    def parts(self) -> Iterator[tuple[Digest, LedgerEntry]]:
        """The ledger of this model, parents before their children."""
        with self._lock:
            query = "SELECT key, parent, tokens, conversation_id, generated FROM ledger WHERE model = ? ORDER BY rowid"
            rows = self._connection.execute(query, (self._model,)).fetchall()
        for key, parent, tokens, conversation_id, generated in rows:
            yield key, LedgerEntry(parent, np.frombuffer(tokens, np.int32), conversation_id, generated)

    def prune(self) -> set[Digest]:
        """Forget the ledger of conversations that no session leads to; returns the keys of what is left."""
        with self._lock, self._connection:
            kept = {key for (key,) in self._connection.execute(_REACHABLE)}
            gone = [(key,) for (key,) in self._connection.execute("SELECT key FROM ledger") if key not in kept]
            self._connection.executemany("DELETE FROM ledger WHERE key = ?", gone)
            return kept

    def put_record(self, kind: str, tenant: str, id: str, value: bytes) -> None:
        """Save a value under a name of its kind."""
        with self._lock, self._connection:
            row = _sealed(kind, tenant, id, time.time(), value)
            self._connection.execute(f"INSERT OR REPLACE INTO records VALUES ({_marks(row)})", row)

    def delete_record(self, kind: str, tenant: str, id: str) -> None:
        """Forget a value."""
        with self._lock, self._connection:
            query = "DELETE FROM records WHERE kind = ? AND tenant = ? AND id = ?"
            self._connection.execute(query, (kind, tenant, id))

    def records(self, kind: str) -> Iterator[tuple[str, str, bytes]]:
        """All values of a kind, oldest first: tenant, name, value."""
        with self._lock:
            query = "SELECT tenant, id, value FROM records WHERE kind = ? ORDER BY used"
            rows = self._connection.execute(query, (kind,)).fetchall()
        yield from rows  # the reader may write meanwhile

    def checkpoint(self) -> None:
        """Bring what was committed to disk, and keep the log of it short."""
        with self._lock:
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def close(self) -> None:
        """Checkpoint and close."""
        with self._lock:
            self._connection.close()


def _open(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, check_same_thread=False, timeout=0.2)
    try:
        for pragma in (
            "locking_mode = EXCLUSIVE",
            "journal_mode = WAL",
            "synchronous = NORMAL",
            "wal_autocheckpoint = 0",
        ):
            connection.execute(f"PRAGMA {pragma}")
        _prepare(connection, path)
    except BaseException:
        connection.close()
        raise
    return connection


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    """Check a file that exists, make the tables of a new one."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > _VERSION:
        raise StateError(f"{path} was written by a later version of Slipstream: choose another ", STATE_DIR)
    if version == 0:
        connection.executescript(f"BEGIN EXCLUSIVE; {_SCHEMA} PRAGMA user_version = {_VERSION}; COMMIT;")
    with closing(sqlite3.connect(":memory:")) as new:
        new.executescript(_SCHEMA)
        if _tables(connection) != _tables(new):
            raise sqlite3.DatabaseError("its tables are not those of this version")
    (check,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
    if check != "ok":
        raise sqlite3.DatabaseError(check)
    with connection:
        _drop_damaged(connection)


def _tables(connection: sqlite3.Connection) -> list[tuple[str, str]]:
    return connection.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY name").fetchall()


def _drop_damaged(connection: sqlite3.Connection) -> None:
    """Drop rows that are not as they were written, and of the ledger what followed them."""
    connection.text_factory = lambda text: text.decode(errors="surrogateescape")  # bad text is bad, and no error here
    for table in ("sessions", "ledger", "records"):
        rows = connection.execute(f"SELECT rowid, * FROM {table}")
        damaged = [(rowid,) for rowid, *row, checksum in rows if checksum != _checksum(row)]
        if damaged:
            logger.warning("%d damaged rows of the saved %s are dropped", len(damaged), table)
            connection.executemany(f"DELETE FROM {table} WHERE rowid = ?", damaged)
    while orphans := connection.execute(_ORPHANS).fetchall():
        connection.executemany("DELETE FROM ledger WHERE rowid = ?", orphans)


def _sealed(*row: object) -> tuple[object, ...]:
    """A row with its checksum: SQLite finds out damage to its pages' structure, but not to what they hold."""
    return (*row, _checksum(row))


def _checksum(row: Iterable[object]) -> bytes:
    return xxhash.xxh3_64_digest(ascii(tuple(row)).encode())


def _marks(row: tuple[object, ...]) -> str:
    return ", ".join("?" * len(row))
