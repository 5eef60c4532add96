"""Rows that point to their parents: each is written once, and goes when nothing points to it any more."""

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import xxhash

Key = bytes

SCHEMA = "CREATE TABLE tree (key BLOB PRIMARY KEY, parent BLOB, value BLOB, checksum BLOB, refs INTEGER);"


class Row(NamedTuple):
    """What a key stands for, and the row before it."""

    key: Key
    parent: Key | None
    value: bytes


class DamagedError(Exception):
    """A row is not as it was written, or not there while something points to it; `keys` are it and what rests on it."""

    def __init__(self, keys: Sequence[Key]) -> None:
        super().__init__()
        self.keys = keys


class Tree:
    """Reference-counted rows, in a transaction of their owner's. All of it is O(what is added or removed).

    References from other rows of the tree count by themselves, those from elsewhere by `move`.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def __contains__(self, key: Key | None) -> bool:
        return self._connection.execute("SELECT 1 FROM tree WHERE key = ?", (key,)).fetchone() is not None

    def grow(self, rows_backwards: Iterable[Row]) -> None:
        """Add what is missing of a path, given from its end: where one row is known, so are those before it."""
        missing = list(takewhile(lambda row: row.key not in self, rows_backwards))
        for row in reversed(missing):
            if row.parent is not None and row.parent not in self:
                return
            self._connection.execute("INSERT INTO tree VALUES (?, ?, ?, ?, 0)", sealed(*row))
            self._hold(row.parent)

    def move(self, old: Iterable[Key | None], new: Iterable[Key | None]) -> list[Key]:
        """Point to the new rows instead of the old; returns the keys of those that are gone for it."""
        for key in new:
            self._hold(key)
        return [gone for key in old for gone in self._release(key)]

    def path(self, key: Key | None) -> list[Row]:
        """The rows from the root to a key, none without one; raises `DamagedError`."""
        rows: list[Row] = []
        while key is not None:
            query = "SELECT key, parent, value, checksum FROM tree WHERE key = ?"
            row = self._connection.execute(query, (key,)).fetchone()
            if row is None or not is_intact(row):
                raise DamagedError([*(row.key for row in rows), key])
            rows.append(Row(*row[:-1]))
            key = rows[-1].parent
        return rows[::-1]

    def cut(self, keys: Sequence[Key]) -> None:
        """Remove a damaged row, the last of the keys, and those that rest on it, so that they can be added again."""
        before: list[tuple[Key]] = []
        for key in keys:
            before = self._connection.execute("DELETE FROM tree WHERE key = ? RETURNING parent", (key,)).fetchall()
        self.move([parent for (parent,) in before], ())

    def _hold(self, key: Key | None) -> None:
        self._connection.execute("UPDATE tree SET refs = refs + 1 WHERE key = ?", (key,))

    def _release(self, key: Key | None) -> Iterator[Key]:
        while key is not None:
            query = "UPDATE tree SET refs = coalesce(refs, 0) - 1 WHERE key = ? RETURNING refs, parent"
            found = self._connection.execute(query, (key,)).fetchall()
            if not found or found[0][0] > 0:
                return
            self._connection.execute("DELETE FROM tree WHERE key = ?", (key,))
            yield key
            key = found[0][1]


def sealed(*row: object) -> tuple[object, ...]:
    """A row with its checksum: SQLite finds out damage to its pages' structure, but not to what they hold."""
    return (*row, _checksum(row))


def is_intact(row: Sequence[Any]) -> bool:
    """Whether a row is as it was written."""
    return bool(row[-1] == _checksum(row[:-1]))


def _checksum(row: Iterable[object]) -> bytes:
    hasher = xxhash.xxh3_64()
    for column in row:
        data = column if isinstance(column, bytes) else ascii(column).encode()
        hasher.update(b"%b %d " % (type(column).__name__.encode(), len(data)))
        hasher.update(data)
    return hasher.digest()
