"""The state's database: what is read is what was written, or it's found out."""

import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from slipstream.chat import Message, Part, Tool
from slipstream.chat.ledger import LedgerEntry
from slipstream.chat.messages import ToolCall
from slipstream.errors import StateError
from slipstream.sessions import Database, SessionState
from slipstream.tokens import Tokens

MODEL = "fingerprint"
WEATHER = Tool("weather", "Tells it: 天気 ☂", {"type": "object", "properties": {"city": {"type": "string"}}})
CALL = ToolCall("call_1", "weather", '{"city": "T\\u00f8nsberg", "x": 1.50}')
MESSAGES = (
    Message("system", "Be brief.\x00\u2028\ufeff"),
    Message("user", "Sunny? ☀️ 👩‍👩‍👧 \U0010ffff"),
    Message("assistant", "", (CALL, CALL)),
    Message("tool", "no", tool_call_id="call_1", name="weather"),
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.db"


@pytest.fixture
def database(path: Path) -> Iterator[Database]:
    database = Database(path, MODEL)
    yield database
    database.close()


def state(name: str = "agent", *, node: bytes | None = None, tenant: str = "", used: float = 2.5, **more: Any) -> Any:
    fields = {"messages": MESSAGES, "tools": (WEATHER,), "template_kwargs": {"enable_thinking": False}, "tokens": 77}
    fields |= {"created": 1.25, "ttl": 60.0} | more
    return SessionState(id=name, tenant=tenant, used=used, node=node, **fields)


def part(key: bytes, parent: bytes | None, tokens: list[int]) -> Part:
    ids = np.asarray(tokens, np.int32)
    return Part(key, LedgerEntry(parent, ids, "conv_1", 1), Tokens(ids))


def ledger(database: Database) -> dict[bytes, tuple[bytes | None, list[int], str]]:
    return {key: (entry.parent, entry.tokens.tolist(), entry.conversation_id) for key, entry in database.parts()}


def reopened(database: Database, path: Path, model: str = MODEL) -> Database:
    database.close()
    return Database(path, model)


def test_session_comes_back_as_it_was(database: Database, path: Path) -> None:
    saved = state("a" * 256, node=b"\x00\xff" * 8, pinned=True, parent="par=ent")
    database.save(saved)
    again = reopened(database, path)
    assert list(again.sessions()) == [saved]
    again.close()


def test_saving_again_replaces_and_tenants_are_apart(database: Database) -> None:
    database.save(state(used=1.0))
    database.save(state(used=3.0, messages=MESSAGES[:1], tools=()))
    database.save(state(used=2.0, tenant="other"))
    assert [(s.tenant, s.used, len(s.messages)) for s in database.sessions()] == [("other", 2.0, 4), ("", 3.0, 1)]
    database.delete(state(tenant="other"))
    database.delete(state("nobody"))
    assert [s.tenant for s in database.sessions()] == [""]


@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=4), used=st.floats(0, 1e12))
@settings(max_examples=50, deadline=None)
def test_any_text_comes_back(tmp_path_factory: pytest.TempPathFactory, texts: list[str], used: float) -> None:
    database = Database(tmp_path_factory.mktemp("state") / "state.db", MODEL)
    saved = state(
        used=used,
        messages=tuple(Message("user", text, (ToolCall(text, text, text),), text, text) for text in texts),
        tools=tuple(Tool(text, text, {text: [text, None, 1.5, {text: True}]}) for text in texts),
    )
    database.save(saved)
    assert list(database.sessions()) == [saved]
    database.close()


def test_order_of_a_schema_stays(database: Database) -> None:
    """The template renders it in that order."""
    tool = Tool("f", "", {"z": {"y": 1, "b": 2}, "a": [{"d": 1, "c": 2}]})
    database.save(state(tools=(tool,)))
    (back,) = database.sessions()
    assert repr(back.tools[0].as_dict()) == repr(tool.as_dict())


def test_ledger_comes_back_parents_first_and_for_its_model_alone(database: Database, path: Path) -> None:
    keys = [bytes([255 - number]) * 16 for number in range(20)]
    for number, key in enumerate(keys):
        parent = keys[number - 1] if number else None
        database.save(state(node=key), part(key, parent, [number, 2**31 - 1]))
    again = reopened(database, path)
    seen: set[bytes | None] = {None}
    for key, entry in again.parts():
        assert entry.parent in seen
        assert entry.tokens.dtype == np.int32
        seen.add(key)
    assert ledger(again)[keys[5]] == (keys[4], [5, 2**31 - 1], "conv_1")
    other = reopened(again, path, "another model")
    assert ledger(other) == {}
    mine = reopened(other, path)
    assert list(ledger(mine)) == keys
    mine.close()


def test_parents_come_first_after_pruning_too(database: Database, path: Path) -> None:
    """Rows are numbered anew when the last ones are gone."""
    a, b, c, d = (letter * 16 for letter in (b"a", b"b", b"c", b"d"))
    for key, parent in ((a, None), (b, a), (c, b)):
        database.save(state(node=key), part(key, parent, [1]))
    database.save(state(node=a))
    assert database.prune() == {a}
    for key, parent in ((d, a), (c, d), (b, c)):
        database.save(state(node=key), part(key, parent, [2]))
    again = reopened(database, path)
    assert list(ledger(again)) == [a, d, c, b]
    again.close()


def test_known_part_stays_as_it_is(database: Database) -> None:
    """Its continuations rest on its tokens."""
    database.save(state(), part(b"k" * 16, None, [1, 2]))
    database.save(state(), part(b"k" * 16, None, [3]))
    assert ledger(database)[b"k" * 16] == (None, [1, 2], "conv_1")


def test_two_models_may_know_the_same_conversation(database: Database, path: Path) -> None:
    root, child = b"r" * 16, b"c" * 16
    database.save(state(node=root), part(root, None, [1]))
    other = reopened(database, path, "another model")
    other.save(state(node=child), part(root, None, [2]))
    other.save(state(node=child), part(child, root, [3]))
    assert other.prune() == {root, child}
    assert ledger(other) == {root: (None, [2], "conv_1"), child: (root, [3], "conv_1")}
    mine = reopened(other, path)
    assert ledger(mine) == {root: (None, [1], "conv_1")}
    mine.close()


def test_pruning_keeps_what_sessions_lead_to(database: Database, path: Path) -> None:
    root, left, right, alone = (letter * 16 for letter in (b"r", b"1", b"2", b"3"))
    database.save(state("left", node=left), part(root, None, [1]))
    database.save(state("left", node=left), part(left, root, [2]))
    database.save(state("right", node=right), part(right, root, [3]))
    database.save(state("alone", node=alone), part(alone, None, [4]))
    assert database.prune() == {root, left, right, alone}
    database.delete(state("left"))
    database.delete(state("alone"))
    assert database.prune() == {root, right}
    again = reopened(database, path)
    assert set(ledger(again)) == {root, right}
    again.delete(state("right"))
    assert again.prune() == set()
    assert ledger(again) == {}
    again.close()


def test_records_come_back_by_kind(database: Database, path: Path) -> None:
    database.put_record("response", "", "one", b"1")
    database.put_record("response", "", "two", b"\x00\xff")
    database.put_record("response", "t", "one", b"3")
    database.put_record("other", "", "one", b"4")
    database.put_record("response", "", "one", b"5")
    database.delete_record("response", "t", "one")
    again = reopened(database, path)
    assert list(again.records("response")) == [("", "two", b"\x00\xff"), ("", "one", b"5")]
    assert list(again.records("nothing")) == []
    again.close()


def test_records_may_be_deleted_while_they_are_read(database: Database) -> None:
    for number in range(3):
        database.put_record("response", "", str(number), b"")

    def read() -> None:
        for tenant, name, _ in database.records("response"):
            database.delete_record("response", tenant, name)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(5)
    assert not thread.is_alive(), "it waits for itself"
    assert list(database.records("response")) == []


def test_many_threads_may_write(database: Database) -> None:
    def write(writer: int) -> None:
        for number in range(30):
            key = bytes([writer, number]) * 8
            database.save(state(f"{writer}", node=key), part(key, None, [writer]))
            database.checkpoint()

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list(database.sessions())) == 6
    assert len(ledger(database)) == 180


def test_second_opener_is_refused(database: Database, path: Path) -> None:
    database.save(state())
    script = f"from pathlib import Path; from slipstream.sessions import Database; Database(Path({str(path)!r}), 'm')"
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "StateError" in other.stderr
    assert "in use by another server" in other.stderr
    with pytest.raises(StateError, match="in use by another server"):
        Database(path, MODEL)
    assert list(path.parent.glob("*damaged*")) == []
    database.save(state(used=9.0))
    assert [s.used for s in database.sessions()] == [9.0]


def test_what_was_committed_outlives_a_killed_process(path: Path) -> None:
    script = f"""
import os, signal
from pathlib import Path
from slipstream.sessions import Database, SessionState
database = Database(Path({str(path)!r}), "m")
for number in range(50):
    database.save(SessionState(str(number), "", (), (), {{}}, 1.0, float(number), 1.0))
    if number == 20: database.checkpoint()
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    again = Database(path, "m")
    assert [s.id for s in again.sessions()] == [str(number) for number in range(50)]
    again.close()


def test_later_version_is_refused_and_left_alone(database: Database, path: Path) -> None:
    database.save(state())
    database.close()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(StateError, match="later version"):
        Database(path, MODEL)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("content", [b"not a database" * 1000, bytes(8192), b"SQLite format 3\x00" + bytes(5000)])
def test_damaged_file_is_set_aside(path: Path, caplog: pytest.LogCaptureFixture, content: bytes) -> None:
    path.write_bytes(content)
    path.with_name("state.db-wal").write_bytes(b"of another file")
    database = Database(path, MODEL)
    assert "is damaged" in caplog.text
    (aside,) = path.parent.glob("state.db.damaged-*")
    assert aside.read_bytes() == content
    assert list(database.sessions()) == []
    database.save(state())
    assert list(reopened(database, path).sessions()) == [state()]


def test_file_that_cannot_be_opened_is_left_alone(path: Path) -> None:
    path.mkdir()
    with pytest.raises(sqlite3.OperationalError, match="unable to open"):
        Database(path, MODEL)
    assert list(path.parent.iterdir()) == [path]


def filled(path: Path) -> tuple[list[SessionState], dict[bytes, Any], list[Any]]:
    """Make a file of many pages; what is in it."""
    database = Database(path, MODEL)
    for number in range(30):
        key = bytes([number]) * 16
        parent = bytes([number - 1]) * 16 if number % 5 else None
        database.save(state(f"s{number}", node=key, used=float(number)), part(key, parent, [number] * 200))
        database.put_record("response", "", str(number), b'{"answer": %d}' % number)
    content = list(database.sessions()), ledger(database), list(database.records("response"))
    database.close()
    return content


@pytest.mark.parametrize("size", [1, 16, 600])
def test_random_damage_never_shows_what_was_not_written(tmp_path: Path, size: int) -> None:
    original = tmp_path / "original.db"
    sessions, parts, records = filled(original)
    whole = original.read_bytes()
    random = np.random.default_rng(size)
    damaged_whole = 0
    for attempt in range(120):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        data = bytearray(whole)
        at = int(random.integers(0, len(data) - size)) if attempt % 4 else int(random.integers(0, 200))
        data[at : at + size] = random.bytes(size)
        (folder / "state.db").write_bytes(data)
        database = Database(folder / "state.db", MODEL)
        damaged_whole += bool(list(folder.glob("*damaged*")))
        for session in database.sessions():
            assert session in sessions, (attempt, at)
        for key, entry in ledger(database).items():
            assert parts.get(key) == entry, (attempt, at)
        for record in database.records("response"):
            assert record in records, (attempt, at)
        database.prune()
        database.save(state("new", node=b"n" * 16), part(b"n" * 16, None, [1]))
        assert "new" in {session.id for session in database.sessions()}
        database.close()
        shutil.rmtree(folder)
    assert 0 < damaged_whole < 120


def test_damaged_part_takes_its_continuations_along(
    database: Database, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They would be on their own, and in the way of the part when it comes back."""
    a, b, c, d = (letter * 16 for letter in (b"a", b"b", b"c", b"d"))
    for key, parent in ((a, None), (b, a), (c, b), (d, c)):
        database.save(state(node=key), part(key, parent, [1, 2, 3]))
    database.close()
    connection = sqlite3.connect(path)
    connection.execute("UPDATE ledger SET tokens = x'010000000200000004000000' WHERE key = ?", (b,))
    connection.commit()
    connection.close()
    database = Database(path, MODEL)
    assert list(ledger(database)) == [a]
    assert "1 damaged rows of the saved ledger" in caplog.text
    assert list(database.sessions()) == [state(node=d)]
    for key, parent in ((b, a), (c, b)):
        database.save(state(node=key), part(key, parent, [4]))
    again = reopened(database, path)
    assert list(ledger(again)) == [a, b, c]
    again.close()


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.999])
def test_log_that_ends_early_costs_the_last_commits_alone(tmp_path: Path, kept: float) -> None:
    """The state after any number of commits is a good one."""
    source = Database(tmp_path / "state.db", MODEL)
    for number in range(20):
        source.save(state(str(number), used=float(number)))
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("state.db", "state.db-wal"):
        data = (tmp_path / name).read_bytes()
        (copy / name).write_bytes(data if name == "state.db" else data[: int(len(data) * kept)])
    source.close()
    again = Database(copy / "state.db", MODEL)
    names = [session.id for session in again.sessions()]
    assert names == [str(number) for number in range(len(names))]
    assert (len(names) >= 18) == (kept > 0.9)
    again.close()
