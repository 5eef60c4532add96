"""What sessions may take, and a disk that refuses to let them go."""

import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest

from slipstream.chat import ChatTemplate, Conversations, Message, Setting
from slipstream.chat.answers import Dialect
from slipstream.engine import EngineCore
from slipstream.errors import LimitError, SessionNotFoundError, StorageError
from slipstream.sessions import Database, SessionLimits, Sessions
from slipstream.tokenizer import Tokenizer
from tests.unit.test_sessions import TEMPLATE, ToyChatTokenizer
from tests.unit.toy_backend import STOP, ToyBackend

LIMITS = SessionLimits(sessions=3, pins=2, memory=20_000, ttl=1000.0)
Open = Callable[..., Sessions]


@pytest.fixture
def opened() -> Iterator[Open]:
    """Makes sessions over an engine, with a database or without."""
    cores: list[EngineCore] = []
    made: list[Sessions] = []

    def make(database: Database | None = None) -> Sessions:
        tokenizer = cast(Tokenizer, ToyChatTokenizer())
        core = EngineCore(ToyBackend(num_blocks=80), tokenizer, context_length=64, stop_token_ids=frozenset({STOP}))
        cores.append(core)
        conversations = Conversations(ChatTemplate(TEMPLATE, {}), tokenizer, Dialect(TEMPLATE))
        made.append(Sessions(core, conversations, limits=LIMITS, database=database))
        return made[-1]

    yield make
    for core, sessions in zip(cores, made, strict=True):
        core.shutdown()
        sessions.close()


def said(text: str = "a") -> list[Message]:
    return [Message("user", text)]


def large(size: int) -> Setting:
    """A variable that the template doesn't show, so that no context bounds it."""
    return Setting(template_kwargs={"unknown": "x" * size})


def test_pinned_sessions_push_nobody_out(opened: Open) -> None:
    sessions = opened()
    for name in ("a", "b", "c"):
        sessions.create("", name, said(name))
    for number in range(2):
        sessions.create("", f"pinned{number}", pinned=True)
    with pytest.raises(LimitError, match="2 \\(max_pins\\)"):
        sessions.create("", "pinned2", pinned=True)
    with pytest.raises(LimitError, match="max_pins"):
        sessions.pin("", "a")
    sessions.pin("", "pinned0")  # which it is
    assert sorted(sessions.ids("")) == ["a", "b", "c", "pinned0", "pinned1"]
    sessions.create("", "d", said("d"))
    assert sorted(sessions.ids("")) == ["b", "c", "d", "pinned0", "pinned1"]


def test_a_tenant_pushes_out_its_own_alone(opened: Open) -> None:
    sessions = opened()
    sessions.create("quiet", "a", said())
    for number in range(9):
        sessions.create("loud", str(number), said())
    assert sessions.ids("quiet") == ["a"]
    assert sessions.ids("loud") == ["8", "7", "6"]


def test_large_sessions_are_refused_or_make_room(opened: Open) -> None:
    sessions = opened()
    with pytest.raises(LimitError, match="max_session_memory"):
        sessions.create("", "huge", said(), large(20_001))
    for name in ("a", "b", "c"):
        sessions.create("", name, said(name), large(8_000))
    assert sorted(sessions.ids("")) == ["b", "c"]


def test_large_sessions_on_disk_leave_memory_alone(opened: Open) -> None:
    sessions = opened(Database(None, "m"))
    for name in ("a", "b", "c"):
        sessions.create("", name, said(name), large(8_000))
    assert sorted(sessions.ids("")) == ["a", "b", "c"]
    assert sum(sessions._directory._memory.values()) <= LIMITS.memory
    assert sessions.get("", "a").messages == tuple(said("a"))


def full(database: Database) -> Callable[[], None]:
    """Let no page be added; returns what makes room again."""
    (pages,) = database._connection.execute("PRAGMA page_count").fetchone()
    database._connection.execute("PRAGMA query_only = 1")

    def again() -> None:
        database._connection.execute("PRAGMA query_only = 0")

    assert pages
    return again


def test_a_session_that_the_disk_keeps_is_not_half_forgotten(opened: Open, tmp_path: Path) -> None:
    database = Database(tmp_path / "state.db", "m")
    sessions = opened(database)
    sessions.create("", "kept", said())
    again = full(database)
    with pytest.raises(StorageError, match="nothing of it was"):
        sessions.delete("", "kept")
    assert sessions.get("", "kept").messages == tuple(said())
    sessions.append("", "kept", said("b"))  # which costs persistence alone
    sessions.create("", "new", said("c"))
    sessions.delete("", "new")  # which disk never had
    with pytest.raises(SessionNotFoundError):
        sessions.get("", "new")
    again()
    sessions.delete("", "kept")
    with pytest.raises(SessionNotFoundError):
        sessions.get("", "kept")
    assert database.session("", "kept") is None


def test_surplus_that_the_disk_keeps_goes_later(opened: Open, tmp_path: Path) -> None:
    database = Database(tmp_path / "state.db", "m")
    sessions = opened(database)
    for name in ("a", "b", "c"):
        sessions.create("", name, said(name))
    again = full(database)
    sessions.create("", "d", said("d"))
    assert sorted(sessions.ids("")) == ["a", "b", "c", "d"]
    again()
    sessions.create("", "e", said("e"))
    assert sorted(sessions.ids("")) == ["c", "d", "e"]


def test_a_full_disk_is_told_by_sqlite(tmp_path: Path) -> None:
    """That the stand-in for a full disk raises what a full disk raises."""
    database = Database(tmp_path / "state.db", "m")
    full(database)
    with pytest.raises(sqlite3.Error):
        database.delete("", "a")
