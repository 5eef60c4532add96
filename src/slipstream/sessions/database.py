"""What a server remembers across restarts besides KV: sessions, the ledger, stored responses. In one SQLite file."""

import hashlib
import json
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from functools import wraps
from itertools import chain
from pathlib import Path
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import numpy as np

from slipstream.chat import Message, Setting, Tool, ToolUse
from slipstream.chat.ledger import LedgerEntry
from slipstream.chat.messages import Digest
from slipstream.chat.setting import TextGrammar
from slipstream.errors import StateError
from slipstream.fields import STATE_DIR
from slipstream.recent import Recent
from slipstream.sessions import tree
from slipstream.sessions.history import History, owner_of
from slipstream.sessions.private import private_file
from slipstream.sessions.state import SessionState
from slipstream.sessions.tree import DamagedError, Row, Tree, is_intact, sealed

logger = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")

_VERSION = 4
_SCHEMA = (
    """
CREATE TABLE sessions (
    tenant TEXT, id TEXT, head BLOB, setting BLOB, created REAL, used REAL, ttl REAL, named INTEGER, shared INTEGER,
    pinned INTEGER, parent TEXT, tokens INTEGER, checksum BLOB, PRIMARY KEY (tenant, id)
);
CREATE INDEX pinned ON sessions (tenant, id) WHERE pinned;
CREATE TABLE nodes (tenant TEXT, id TEXT, model BLOB, key BLOB, checksum BLOB, PRIMARY KEY (tenant, id, model));
CREATE TABLE responses (
    tenant TEXT, id TEXT, head BLOB, unsaid INTEGER, value BLOB, checksum BLOB, size INTEGER, used REAL,
    PRIMARY KEY (tenant, id)
);
CREATE INDEX responses_by_use ON responses (tenant, used, size);
"""
    + tree.SCHEMA
)
_COLUMNS = {
    "sessions": "tenant, id, head, setting, created, used, ttl, named, shared, pinned, parent, tokens",
    "nodes": "tenant, id, model, key",
    "responses": "tenant, id, head, unsaid, value",
}
_POINTERS = {"sessions": "head, setting", "nodes": "key", "responses": "head"}
"""The columns that point into the tree."""

_HISTORIES = 64

_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_NOT_THE_FILES_FAULT = (
    *(sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_FULL, sqlite3.SQLITE_PERM, sqlite3.SQLITE_READONLY),
    sqlite3.SQLITE_IOERR,  # as where the file system is read-only
)


class StoredResponse(NamedTuple):
    """A response that is kept, so that it can be read again and gone on from."""

    response: str
    """The response object, as JSON text."""
    input_items: str
    """The items that its request brought, as a JSON list, each with an id."""
    history: History
    """The conversation up to and including the answer."""
    unsaid: int
    """How many messages at its start are instructions, with which going on from it does not begin."""

    @property
    def messages(self) -> tuple[Message, ...]:
        """The conversation without instructions."""
        return self.history.messages[self.unsaid :]


def _transaction(method: "Callable[Concatenate[Database, P], T]") -> "Callable[Concatenate[Database, P], T]":
    """Have a method done whole or not at all; in a new file if this one turns out to be damaged."""

    @wraps(method)
    def whole(self: "Database", /, *args: P.args, **kwargs: P.kwargs) -> T:
        with self._lock:
            try:
                with self._connection:
                    return method(self, *args, **kwargs)
            except sqlite3.DatabaseError as error:
                if getattr(error, "sqlite_errorcode", 0) & 0xFF not in _DAMAGE:
                    raise
                self._connection.close()
                self._begin_anew(error)
            with self._connection:
                return method(self, *args, **kwargs)

    return whole


class Database:
    """The file, opened for this process alone; without a path, a database in memory. Thread-safe.

    Messages, settings and the ledger are rows of a tree. A turn writes what it adds, however long the conversation is,
    and what nothing leads to any more is deleted with what led to it last.

    A commit reaches the operating system before the call returns, so it outlives the process, however that ends; only
    `checkpoint` waits for the disk. Rows are checked when they are read. A file that is damaged is set aside; a row
    that is damaged is dropped with all that rests on it. Both give a warning.
    Raises `StateError` if another server has it open, or a later version wrote it; `sqlite3.Error` if it can't be had.
    """

    def __init__(self, path: Path | None, model: str) -> None:
        self._path = path or Path(":memory:")
        self._model = hashlib.blake2b(model.encode(), digest_size=8).digest()
        self._lock = threading.RLock()
        self._histories: Recent[bytes, History] = Recent(_HISTORIES)  # that were read or written
        self.is_new = not self._path.exists()
        """Whether nothing was remembered."""
        try:
            self._open()
        except sqlite3.DatabaseError as error:
            if "locked" in str(error):
                message = f"{self._path.parent} is in use by another server: choose another "
                raise StateError(message, STATE_DIR) from error
            if getattr(error, "sqlite_errorcode", 0) & 0xFF in _NOT_THE_FILES_FAULT:
                raise
            self._begin_anew(error)

    @_transaction
    def save(self, state: SessionState, parts: Sequence[tuple[Digest, LedgerEntry]] = ()) -> list[Digest]:
        """Save a session as it is now, and the last `parts` of its conversation that the ledger lacks, last one first.

        Returns the keys of parts that no session leads to any more.
        """
        setting = _setting_row(state)
        self._tree.grow(state.history.rows_backwards())
        self._tree.grow([setting])
        self._tree.grow(self._part_row(*part) for part in parts)
        place = state.tenant, state.id
        kept = state.created, state.used, state.ttl, int(state.named), int(state.shared), int(state.pinned)
        row = sealed(*place, state.history.head, setting.key, *kept, state.parent, state.tokens)
        gone = self._replace("sessions", place, row)
        of_model = *place, self._model
        node = self._model + state.node if state.node is not None else None
        return gone + self._replace("nodes", of_model, sealed(*of_model, node) if node in self._tree else None)

    @_transaction
    def delete(self, tenant: str, id: str) -> list[Digest]:
        """Forget a session and all that it alone leads to; returns the keys of those parts of the ledger."""
        gone = self._replace("sessions", (tenant, id))
        query = "SELECT model FROM nodes WHERE tenant = ? AND id = ?"
        for (model,) in self._connection.execute(query, (tenant, id)).fetchall():
            gone += self._replace("nodes", (tenant, id, model))
        return gone

    def session(self, tenant: str, id: str) -> SessionState | None:
        """The session of that name, if it was saved."""

        def read(row: tuple[Any, ...]) -> SessionState:
            *_, head, setting, created, used, ttl, named, shared, pinned, parent, tokens = row
            kept = created, used, ttl, bool(named), bool(shared), bool(pinned), parent
            (row_of_setting,) = self._tree.path(setting)
            tools, kwargs = json.loads(row_of_setting.value)
            stood_in = Setting(ToolUse(tuple(map(_tool, tools))), kwargs)
            node = self._row("nodes", (tenant, id, self._model))
            key = node[3][len(self._model) :] if node is not None and is_intact(node) else None
            return SessionState(id, tenant, History.read(self._tree.path(head), tenant), stood_in, *kept, key, tokens)

        return self._read("sessions", (tenant, id), read)

    @_transaction
    def listed(self, *, pinned: bool = False) -> list[tuple[str, str, float, float | None]]:
        """Of all sessions, or all that are pinned: tenant, id, when it was used, when it expires (None for pinned)."""
        query = f"SELECT tenant, id, used, ttl, pinned FROM sessions {'WHERE pinned' if pinned else ''}"
        return [
            (tenant, id, used, None if pinned else used + ttl)
            for tenant, id, used, ttl, pinned in self._connection.execute(query)
            if isinstance(used, float) and isinstance(ttl, float)
        ]

    @_transaction
    def session_count(self, tenant: str | None = None) -> int:
        """How many sessions are saved, of one tenant or of all."""
        of_one = "SELECT count(*) FROM sessions WHERE tenant = ?", (tenant,)
        query = of_one if tenant is not None else ("SELECT count(*) FROM sessions",)
        return int(self._connection.execute(*query).fetchone()[0])

    @_transaction
    def knows(self, key: Digest) -> bool:
        """Whether this model's ledger has a part."""
        return self._model + key in self._tree

    def recorded(self, key: Digest) -> list[tuple[Digest, LedgerEntry]]:
        """The parts of a conversation in this model's ledger, parents before their children; none if it's unknown."""
        try:
            return [_part(row, len(self._model)) for row in self._path_to_part(self._model + key)]
        except DamagedError as damage:
            logger.warning("a part of the saved ledger is damaged, and dropped; its conversation is read anew")
            self._drop(damage.keys)
            return []

    @_transaction
    def save_response(self, tenant: str, id: str, response: StoredResponse, *, max_bytes: int) -> None:
        """Save a response. Of a tenant's, those stay that were used last, and take `max_bytes` without messages."""
        history, value = response.history, json.dumps([response.response, response.input_items]).encode()
        self._tree.grow(history.rows_backwards())
        row = *sealed(tenant, id, history.head, response.unsaid, value), len(value), time.time()
        self._replace("responses", (tenant, id), row)
        taken = "SELECT total(size) FROM responses WHERE tenant = ?"
        while self._connection.execute(taken, (tenant,)).fetchone()[0] > max_bytes:
            oldest = "SELECT tenant, id FROM responses WHERE tenant = ? ORDER BY used LIMIT 1"
            self._replace("responses", self._connection.execute(oldest, (tenant,)).fetchone())
        self._keep_at_hand(history)

    def response(self, tenant: str, id: str) -> StoredResponse | None:
        """The response of that id, if it's still there; counts as a use."""

        def read(row: tuple[Any, ...]) -> StoredResponse:
            *_, head, unsaid, value = row
            history = self._histories.get(head) or History.read(self._tree.path(head), tenant)
            self._keep_at_hand(history)
            said, items = json.loads(value)
            return StoredResponse(said, items, history, unsaid)

        found = self._read("responses", (tenant, id), read)
        with suppress(sqlite3.Error):  # such as a full disk
            self._note_use(tenant, id)
        return found

    @_transaction
    def delete_response(self, tenant: str, id: str) -> bool:
        """Forget a response, and the messages that it alone leads to; says whether it was there."""
        there = self._row("responses", (tenant, id)) is not None
        self._replace("responses", (tenant, id))
        return there

    def checkpoint(self) -> None:
        """Bring what was committed to disk, and empty the log of it."""
        with self._lock:
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def close(self) -> None:
        """Checkpoint and close."""
        with self._lock:
            self._connection.close()

    @_transaction
    def _path_to_part(self, key: bytes) -> list[Row]:
        return self._tree.path(key) if key in self._tree else []

    @_transaction
    def _note_use(self, tenant: str, id: str) -> None:
        query = "UPDATE responses SET used = ? WHERE tenant = ? AND id = ?"
        self._connection.execute(query, (time.time(), tenant, id))

    def _part_row(self, key: Digest, entry: LedgerEntry) -> Row:
        value = b"%b %d\n%b" % (entry.conversation_id.encode(), entry.generated, entry.tokens.tobytes())
        return Row(self._model + key, self._model + entry.parent if entry.parent is not None else None, value)

    def _keep_at_hand(self, history: History) -> None:
        """Have a history found without reading it, for a while: a client may go on from it soon."""
        if history.head is None:
            return
        with self._lock:
            self._histories[history.head] = history

    def _row(self, table: str, place: tuple[object, ...]) -> tuple[Any, ...] | None:
        """The row at a place, with its checksum last."""
        query = f"SELECT {_COLUMNS[table]}, checksum FROM {table} WHERE {_where(place)}"
        row: tuple[Any, ...] | None = self._connection.execute(query, place).fetchone()
        return row

    def _replace(self, table: str, place: tuple[object, ...], row: tuple[object, ...] | None = None) -> list[Digest]:
        """Put a row in the place of another, or nothing.

        Returns the keys of the parts of this model's ledger that nothing leads to any more.
        """
        execute, pointers = self._connection.execute, _POINTERS[table]
        old, new = execute(f"DELETE FROM {table} WHERE {_where(place)} RETURNING {pointers}", place).fetchall(), []
        if row is not None:
            values = ", ".join("?" * len(row))
            new = execute(f"INSERT INTO {table} VALUES ({values}) RETURNING {pointers}", row).fetchall()
        gone = self._tree.move(chain(*old), chain(*new))
        return [key[len(self._model) :] for key in gone if key.startswith(self._model)]

    def _read(self, table: str, place: tuple[str, str], read: Callable[[tuple[Any, ...]], T]) -> T | None:
        """What a row stands for, if it's there. One that is damaged, or whose messages are, is dropped."""
        try:
            return self._read_intact(table, place, read)
        except DamagedError as damage:
            logger.warning("%r of the saved %s is damaged, or a message in it, and dropped", place[1], table)
            self._drop(damage.keys, table, place)
            return None

    @_transaction
    def _read_intact(self, table: str, place: tuple[str, str], read: Callable[[tuple[Any, ...]], T]) -> T | None:
        if (row := self._row(table, place)) is None:
            return None
        if not is_intact(row):
            raise DamagedError([])
        return read(row[:-1])

    @_transaction
    def _drop(self, keys: Sequence[bytes], table: str | None = None, place: tuple[object, ...] = ()) -> None:
        """Drop a damaged row of the tree, the last of these, and those that rest on it; and a row that led to it."""
        if table is not None:
            self._replace(table, place)
        self._tree.cut(keys)
        self._connection.executemany("DELETE FROM nodes WHERE key = ?", [(key,) for key in keys])

    def _begin_anew(self, error: Exception) -> None:
        aside = self._path.with_name(f"{self._path.name}.damaged-{time.strftime('%Y%m%dT%H%M%S')}")
        logger.warning("%s is damaged (%s): it is kept as %s, and sessions begin anew", self._path, error, aside.name)
        self._path.replace(aside)
        for suffix in ("-wal", "-shm"):
            self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)
        self._open()
        self.is_new = True

    def _open(self) -> None:
        if str(self._path) != ":memory:":
            private_file(self._path)  # the log gets its permissions
        self._connection = _connected(self._path)
        self._tree = Tree(self._connection)


def _where(place: tuple[object, ...]) -> str:
    return " AND ".join(f"{name} = ?" for name in ("tenant", "id", "model")[: len(place)])


def _connected(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, check_same_thread=False, timeout=0.2)
    connection.text_factory = lambda text: text.decode(errors="surrogateescape")  # bad text is bad, and no error here
    try:
        for pragma in (
            "locking_mode = EXCLUSIVE",
            "journal_mode = WAL",
            "synchronous = NORMAL",
            "wal_autocheckpoint = 0",
            "cell_size_check = ON",
            "secure_delete = ON",  # what is deleted is overwritten
            "temp_store = MEMORY",
        ):
            connection.execute(f"PRAGMA {pragma}")
        _prepare(connection, path)
    except BaseException:
        connection.close()
        raise
    return connection


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    """Make the tables of a new file; make sure that those of another are what they should be."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > _VERSION:
        raise StateError(f"{path} was written by a later version of Slipstream: choose another ", STATE_DIR)
    if version == 0:
        connection.executescript(f"BEGIN EXCLUSIVE; {_SCHEMA} PRAGMA user_version = {_VERSION}; COMMIT;")
    with closing(sqlite3.connect(":memory:")) as new:
        new.executescript(_SCHEMA)
        if _tables(connection) != _tables(new):
            raise sqlite3.DatabaseError("its tables are not those of this version")


def _tables(connection: sqlite3.Connection) -> list[tuple[str, str]]:
    return connection.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY name").fetchall()


def _setting_row(state: SessionState) -> Row:
    """What messages stand in, as a row of its own: sessions share it, and turns don't write it again."""
    tools = list(map(_row_of_tool, state.setting.tools.tools))
    value = json.dumps([tools, state.setting.template_kwargs]).encode()
    key = hashlib.blake2b(b"setting" + owner_of(state.tenant) + value, digest_size=16).digest()
    return Row(key, None, value)


def _row_of_tool(tool: Tool) -> list[Any]:
    text = None if tool.text is None else [tool.text.syntax, tool.text.definition]
    return [tool.name, tool.description, tool.parameters, tool.strict, tool.deferred, text]


def _tool(row: list[Any]) -> Tool:
    """A tool, of which earlier versions wrote the first three values."""
    function, text = Tool(*row[:5]), row[5:]
    return replace(function, text=TextGrammar(*text[0])) if text and text[0] else function


def _part(row: Row, prefix: int) -> tuple[Digest, LedgerEntry]:
    """The part of a row whose keys begin with so many bytes for the model."""
    told, _, tokens = row.value.partition(b"\n")
    conversation_id, generated = told.decode().rsplit(" ", 1)
    parent = row.parent[prefix:] if row.parent is not None else None
    return row.key[prefix:], LedgerEntry(parent, np.frombuffer(tokens, np.int32), conversation_id, int(generated))
