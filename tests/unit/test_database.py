"""The state's database: what is read is what was written, or it's found out."""

import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from slipstream.chat import Message, Setting, Tool, ToolUse
from slipstream.chat.ledger import LedgerEntry
from slipstream.chat.messages import ToolCall
from slipstream.chat.setting import TextGrammar
from slipstream.errors import StateError
from slipstream.sessions import Database, History, SessionState, StoredResponse

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


def state(
    name: str = "agent",
    messages: tuple[Message, ...] = MESSAGES,
    *,
    tools: tuple[Tool, ...] = (WEATHER,),
    node: bytes | None = None,
    tenant: str = "",
    used: float = 2.5,
    **more: Any,
) -> SessionState:
    fields = {"tokens": 77, "created": 1.25, "ttl": 60.0} | more
    setting, history = Setting(ToolUse(tools), {"enable_thinking": False}), History().then(*messages)
    return SessionState(id=name, tenant=tenant, history=history, setting=setting, used=used, node=node, **fields)


def stored(history: History, response: str = "") -> StoredResponse:
    return StoredResponse(response, "", history, 0)


def said(*texts: str) -> tuple[Message, ...]:
    return tuple(Message("user", text) for text in texts)


def part(key: bytes, parent: bytes | None, tokens: list[int]) -> tuple[bytes, LedgerEntry]:
    return key, LedgerEntry(parent, np.asarray(tokens, np.int32), "conv_1", 1)


def sessions(database: Database) -> list[SessionState]:
    """All sessions, as they are read, least recently used first."""
    listed = sorted(database.listed(), key=lambda session: session[2])
    found = [database.session(tenant, id) for tenant, id, *_ in listed]
    return [session for session in found if session is not None]


def ledger(database: Database, *keys: bytes) -> dict[bytes, tuple[bytes | None, list[int], str]]:
    """What the ledger leads to from each of some keys, parents before their children."""
    return {
        key: (entry.parent, entry.tokens.tolist(), entry.conversation_id)
        for asked in keys
        for key, entry in database.recorded(asked)
    }


def row_count(database: Database) -> int:
    """How many rows there are for messages, settings and the ledger."""
    rows = database._connection.execute("SELECT count(*) FROM tree").fetchone()[0]
    assert isinstance(rows, int)
    return rows


def reopened(database: Database, path: Path, model: str = MODEL) -> Database:
    database.close()
    return Database(path, model)


def change(path: Path, query: str, *values: object) -> None:
    """Change a file that nobody has open, behind everybody's back."""
    connection = sqlite3.connect(path)
    assert connection.execute(query, values).rowcount == 1
    connection.commit()
    connection.close()


def test_session_comes_back_as_it_was(database: Database, path: Path) -> None:
    node = b"\x00\xff" * 8
    saved = state("a" * 256, node=node, pinned=True, parent="par=ent")
    database.save(saved, [part(node, None, [1])])
    again = reopened(database, path)
    assert sessions(again) == [saved]
    assert again.listed(pinned=True) == again.listed()
    again.close()


def test_saving_again_replaces_and_tenants_are_apart(database: Database) -> None:
    database.save(state(used=1.0))
    database.save(state(used=3.0, messages=MESSAGES[:1], tools=()))
    database.save(state(used=2.0, tenant="other"))
    assert [(s.tenant, s.used, len(s.messages)) for s in sessions(database)] == [("other", 2.0, 4), ("", 3.0, 1)]
    database.delete("other", "agent")
    database.delete("", "nobody")
    assert [s.tenant for s in sessions(database)] == [""]
    assert database.session_count() == 1
    assert database.listed(pinned=True) == []


@given(texts=st.lists(st.text(), max_size=4), used=st.floats(0, 1e12))
@settings(max_examples=50)
def test_any_text_comes_back(tmp_path_factory: pytest.TempPathFactory, texts: list[str], used: float) -> None:
    """Lone surrogates, too, which no encoding of Unicode has."""
    database = Database(tmp_path_factory.mktemp("state") / "state.db", MODEL)
    saved = state(
        used=used,
        messages=tuple(Message("user", text, (ToolCall(text, text, text),), text, text, text) for text in texts),
        tools=tuple(Tool(text, text, {text: [text, None, 1.5, {text: True}]}) for text in dict.fromkeys(texts)),
    )
    database.save(saved)
    assert sessions(database) == [saved]
    database.close()


def test_order_of_a_schema_stays(database: Database) -> None:
    """The template renders it in that order."""
    tool = Tool("f", "", {"z": {"y": 1, "b": 2}, "a": [{"d": 1, "c": 2}]})
    database.save(state(tools=(tool,)))
    (back,) = sessions(database)
    assert repr(back.setting.tools.tools[0].as_dict()) == repr(tool.as_dict())


def test_all_of_a_tool_comes_back(database: Database) -> None:
    """Also what earlier versions didn't write."""
    strict = replace(WEATHER, name="strict", strict=True, deferred=True)
    texts = Tool.of_text("note", "Notes"), Tool.of_text("patch", "", TextGrammar("lark", 'start: "a"'))
    saved = state(tools=(WEATHER, strict, *texts))
    database.save(saved)
    assert sessions(database) == [saved]


def test_ledger_comes_back_parents_first_and_for_its_model_alone(database: Database, path: Path) -> None:
    keys = [bytes([255 - number]) * 16 for number in range(20)]
    for number, key in enumerate(keys):
        parent = keys[number - 1] if number else None
        database.save(state(node=key), [part(key, parent, [number, 2**31 - 1])])
    again = reopened(database, path)
    seen: set[bytes | None] = {None}
    for key, entry in again.recorded(keys[-1]):
        assert entry.parent in seen
        assert entry.tokens.dtype == np.int32
        seen.add(key)
    assert ledger(again, keys[-1])[keys[5]] == (keys[4], [5, 2**31 - 1], "conv_1")
    assert all(map(again.knows, keys))
    other = reopened(again, path, "another model")
    assert ledger(other, *keys) == {}
    assert not any(map(other.knows, keys))
    mine = reopened(other, path)
    assert list(ledger(mine, keys[-1])) == keys
    mine.close()


def test_known_part_stays_as_it_is(database: Database) -> None:
    """Its continuations rest on its tokens."""
    key = b"k" * 16
    database.save(state(node=key), [part(key, None, [1, 2])])
    database.save(state(node=key), [part(key, None, [3])])
    assert ledger(database, key) == {key: (None, [1, 2], "conv_1")}


def test_part_without_the_one_before_it_is_not_saved(database: Database) -> None:
    """Its tokens alone would be taken for the whole conversation's."""
    key = b"k" * 16
    database.save(state(node=key), [part(key, b"p" * 16, [3])])
    assert not database.knows(key)
    assert [session.node for session in sessions(database)] == [None]
    database.save(state(node=key), [part(key, b"p" * 16, [3]), part(b"p" * 16, None, [2])])
    assert list(ledger(database, key)) == [b"p" * 16, key]


def test_two_models_may_know_the_same_conversation(database: Database, path: Path) -> None:
    root, child = b"r" * 16, b"c" * 16
    database.save(state(node=root), [part(root, None, [1])])
    other = reopened(database, path, "another model")
    other.save(state(node=root), [part(root, None, [2])])
    other.save(state(node=child), [part(child, root, [3])])
    assert ledger(other, child) == {root: (None, [2], "conv_1"), child: (root, [3], "conv_1")}
    mine = reopened(other, path)
    assert ledger(mine, root, child) == {root: (None, [1], "conv_1")}
    assert [session.node for session in sessions(mine)] == [root]
    mine.delete("", "agent")
    assert row_count(mine) == 0
    mine.close()


def test_what_no_session_leads_to_goes_with_the_last_that_did(database: Database, path: Path) -> None:
    root, left, right, alone = (letter * 16 for letter in (b"r", b"1", b"2", b"3"))
    database.save(state("left", node=root), [part(root, None, [1])])
    database.save(state("left", node=left), [part(left, root, [2])])
    database.save(state("right", node=right), [part(right, root, [3])])
    database.save(state("alone", node=alone), [part(alone, None, [4])])
    assert all(map(database.knows, (root, left, right, alone)))
    assert database.delete("", "left") == [left]
    assert database.delete("", "alone") == [alone]
    again = reopened(database, path)
    assert set(ledger(again, root, left, right, alone)) == {root, right}
    assert set(again.delete("", "right")) == {root, right}
    assert row_count(again) == 0
    again.close()


def test_going_back_forgets_what_was_left(database: Database) -> None:
    a, b, c, d = (letter * 16 for letter in (b"a", b"b", b"c", b"d"))
    for key, parent in ((a, None), (b, a), (c, b)):
        assert database.save(state(node=key), [part(key, parent, [1])]) == []
    assert set(database.save(state(node=a, messages=MESSAGES[:1]))) == {b, c}
    assert list(ledger(database, a, b, c)) == [a]
    for key, parent in ((d, a), (c, d), (b, c)):
        database.save(state(node=key), [part(key, parent, [2])])
    assert list(ledger(database, b)) == [a, d, c, b]
    assert [session.messages for session in sessions(database)] == [MESSAGES]


def test_a_message_is_written_once_whoever_has_it(database: Database) -> None:
    """A turn writes what it adds; so do its response, and a fork."""
    texts = tuple(str(number) for number in range(50))
    database.save(state("one", said(*texts)))
    rows = row_count(database)
    assert rows == len(texts) + 1, "a setting, too"
    changes = database._connection.total_changes
    longer = state("one", said(*texts, "new"))
    database.save(longer)
    assert row_count(database) == rows + 1
    few = database._connection.total_changes - changes
    assert few < 12
    database.save_response("", "resp_1", stored(longer.history), max_bytes=10)
    database.save(state("fork", said(*texts[:30])))
    database.save(state("sibling", said(*texts[:30], "another way")))
    assert row_count(database) == rows + 2


def test_deleting_removes_what_one_alone_leads_to(database: Database) -> None:
    a, b, c = state("a", said("1", "2", "3")), state("b", said("1", "2", "4")), state("c", said("1"))
    for each in (a, b, c):
        database.save(each)
    database.save_response("", "resp_1", stored(a.history), max_bytes=10)
    database.delete("", "b")
    assert row_count(database) == 3 + 1
    database.delete("", "a")
    assert row_count(database) == 3 + 1, "the response leads there"
    database.delete_response("", "resp_1")
    assert row_count(database) == 1 + 1
    assert sessions(database) == [c]
    database.delete("", "c")
    assert row_count(database) == 0


@given(data=st.data())
@settings(max_examples=60)
def test_rows_are_those_that_something_leads_to(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Whatever is saved, changed and deleted."""
    database = Database(tmp_path_factory.mktemp("state") / "state.db", MODEL)
    kept: dict[str, History] = {}
    names, texts = st.sampled_from("abcR"), st.lists(st.sampled_from("xyz"), max_size=5)
    for _ in range(data.draw(st.integers(1, 12))):
        name = data.draw(names)
        if data.draw(st.booleans()) or not kept:
            saved = state(name, said(*data.draw(texts)), tools=())
            kept[name] = saved.history
            if name == "R":
                database.save_response("", name, stored(saved.history), max_bytes=10)
            else:
                database.save(saved)
        else:
            kept.pop(name, None)
            (database.delete_response if name == "R" else database.delete)("", name)
        keys = {key for history in kept.values() for key in history.keys}
        assert row_count(database) == len(keys) + bool(kept.keys() - {"R"})
    for name, history in kept.items():
        if name == "R":
            assert database.response("", name) == stored(history)
        else:
            session = database.session("", name)
            assert session is not None
            assert session.history == history
    database.close()


def test_responses_come_back(database: Database, path: Path) -> None:
    one = StoredResponse("{\ud800}", "[]", History().then(*MESSAGES), 1)
    two = StoredResponse("", "", History(), 0)
    database.save_response("", "one", one, max_bytes=100)
    database.save_response("t", "one", two, max_bytes=100)
    database.save_response("", "two", two, max_bytes=100)
    assert database.delete_response("t", "one")
    again = reopened(database, path)
    assert again.response("", "one") == one
    assert one.messages == MESSAGES[1:]
    assert again.response("", "two") == two
    for tenant, name in (("t", "one"), ("", "nothing")):
        assert again.response(tenant, name) is None
        assert not again.delete_response(tenant, name)
    again.close()


def test_responses_that_were_used_last_are_kept() -> None:
    database = Database(None, MODEL)

    def put(name: str, tenant: str = "") -> None:
        history = History().then(*said(name))
        database.save_response(tenant, name, StoredResponse("x" * 92, "", history, 0), max_bytes=300)

    def there(names: str) -> list[str]:
        return [name for name in names if database._row("responses", ("", name))]

    for name in ("a", "b", "c"):
        put(name)
    assert database.response("", "a") is not None
    put("d")
    assert there("abcd") == ["a", "c", "d"]
    assert database.response("somebody else", "a") is None
    assert not database.delete_response("somebody else", "a")
    assert database.delete_response("", "a")
    assert not database.delete_response("", "a")
    for name in "xyz":
        put(name, "somebody else")
    put("e")
    assert there("abcde") == ["c", "d", "e"], "whatever others store"
    assert row_count(database) == 6
    database.close()


def test_many_threads_may_write(database: Database) -> None:
    def write(writer: int) -> None:
        for number in range(30):
            keys = [bytes([writer, at]) * 8 for at in range(number + 1)]
            database.save(state(f"{writer}", node=keys[-1]), [part(keys[-1], ([None, *keys])[-2], [writer])])
            database.checkpoint()

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(sessions(database)) == 6
    assert len(ledger(database, *(bytes([writer, 29]) * 8 for writer in range(6)))) == 180


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
    assert [s.used for s in sessions(database)] == [9.0]


def test_what_was_committed_outlives_a_killed_process(path: Path) -> None:
    script = f"""
import os, signal
from pathlib import Path
from slipstream.chat import NO_SETTING
from slipstream.sessions import Database, History, SessionState
database = Database(Path({str(path)!r}), "m")
for number in range(50):
    database.save(SessionState(str(number), "", History(), NO_SETTING, 1.0, float(number), 1.0))
    if number == 20: database.checkpoint()
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    again = Database(path, "m")
    assert [s.id for s in sessions(again)] == [str(number) for number in range(50)]
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
    assert sessions(database) == []
    database.save(state())
    assert sessions(reopened(database, path)) == [state()]


def test_file_that_cannot_be_opened_is_left_alone(path: Path) -> None:
    path.mkdir()
    with pytest.raises(sqlite3.OperationalError, match="unable to open"):
        Database(path, MODEL)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("code", [sqlite3.SQLITE_IOERR | 5 << 8, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_FULL])
def test_a_file_is_not_damaged_because_its_disk_fails(path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    database = Database(path, MODEL)
    database.save(state())
    database.close()

    def failing(path: Path) -> sqlite3.Connection:
        error = sqlite3.OperationalError("disk I/O error")
        error.sqlite_errorcode = code
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("slipstream.sessions.database._connected", failing)
        with pytest.raises(sqlite3.OperationalError):
            Database(path, MODEL)
    assert sessions(Database(path, MODEL)) == [state()]


def keys_of(number: int) -> tuple[bytes, bytes | None]:
    """A part of the ledger and the one before it."""
    return bytes([number]) * 16, bytes([number - 1]) * 16 if number % 5 else None


def filled(path: Path) -> tuple[list[SessionState], dict[bytes, Any], list[Any]]:
    """Make a file of many pages; what is in it."""
    database = Database(path, MODEL)
    for number in range(30):
        key, parent = keys_of(number)
        saved = state(f"s{number}", (*MESSAGES, *said(*map(str, range(number % 7)))), node=key, used=float(number))
        database.save(saved, [part(key, parent, [number] * 200)])
        database.save_response("", str(number), stored(saved.history, str(number)), max_bytes=10_000)
    content = read(database)
    database.close()
    assert list(map(len, content)) == [30, 30, 30]
    return content


def read(database: Database) -> tuple[list[SessionState], dict[bytes, Any], list[Any]]:
    """Everything that a file of `filled` gives."""
    parts = ledger(database, *(keys_of(number)[0] for number in range(30)))
    found = (database.response("", str(number)) for number in range(30))
    return sessions(database), parts, [response for response in found if response]


@pytest.mark.parametrize("size", [1, 16, 600])
def test_random_damage_never_shows_what_was_not_written(tmp_path: Path, size: int) -> None:
    original = tmp_path / "original.db"
    written, parts, responses = filled(original)
    known = {session.id: session for session in written}
    whole = original.read_bytes()
    random = np.random.default_rng(size)
    damaged_whole = 0
    for attempt in range(60):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        data = bytearray(whole)
        at = int(random.integers(0, len(data) - size)) if attempt % 4 else int(random.integers(0, 200))
        data[at : at + size] = random.bytes(size)
        (folder / "state.db").write_bytes(data)
        database = Database(folder / "state.db", MODEL)
        for again in (False, True):  # the first time finds damage, and drops it
            left, left_parts, left_responses = read(database)
            for session in left:
                expected = known[session.id]
                assert replace(session, node=expected.node) == expected, (attempt, at, again)
                assert session.node in (expected.node, None)
            for key, entry in left_parts.items():
                assert parts.get(key) == entry, (attempt, at, again)
            for response in left_responses:
                assert response in responses, (attempt, at, again)
        new = state("new", said("new"), node=b"n" * 16)
        database.save(new, [part(b"n" * 16, None, [1])])
        assert database.session("", "new") == new
        assert "new" in {session.id for session in sessions(database)}
        database.delete("", "new")
        damaged_whole += bool(list(folder.glob("*damaged*")))
        database.close()
        shutil.rmtree(folder)
    assert 0 < damaged_whole < 60


def test_damaged_part_takes_its_continuations_along(
    database: Database, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They would be on their own, and in the way of the part when it comes back."""
    a, b, c, d = (letter * 16 for letter in (b"a", b"b", b"c", b"d"))
    for key, parent in ((a, None), (b, a), (c, b), (d, c)):
        database.save(state(node=key), [part(key, parent, [1, 2, 3])])
    database.save(state("other", node=a))
    database.close()
    change(
        path, "UPDATE tree SET value = ? WHERE hex(key) LIKE ?", b"conv_1 1\n\x01\x00\x00\x00", "%" + b.hex().upper()
    )
    database = Database(path, MODEL)
    assert ledger(database, d, c, b, a) == {a: (None, [1, 2, 3], "conv_1")}
    assert "a part of the saved ledger is damaged" in caplog.text
    assert sessions(database) == [state(), state("other", node=a)]
    for key, parent in ((b, a), (c, b)):
        database.save(state(node=key), [part(key, parent, [4])])
    again = reopened(database, path)
    assert list(ledger(again, c)) == [a, b, c]
    again.delete("", "agent")
    again.delete("", "other")
    assert row_count(again) == 0
    again.close()


@pytest.mark.parametrize(
    ("damage", "left_over"),
    [
        ("UPDATE tree SET value = '[]' WHERE key = ?", 0),
        ("DELETE FROM tree WHERE key = ?", 2),  # nobody knows what it pointed to
    ],
)
def test_damaged_message_takes_the_sessions_above_it_along(
    database: Database, path: Path, caplog: pytest.LogCaptureFixture, damage: str, left_over: int
) -> None:
    below, above, beside = state("below", said("1", "2")), state("above", said("1", "2", "3", "4")), state("beside")
    for each in (below, above, beside):
        database.save(each)
    database.save_response("", "resp_1", stored(above.history.then(*said("5"))), max_bytes=10)
    database.close()
    change(path, damage, above.history.keys[2])
    database = Database(path, MODEL)
    assert database.session("", "below") == below
    assert caplog.text == "", "nobody has read it yet"
    assert database.session("", "above") is None
    assert database.response("", "resp_1") is None
    assert database.session_count() == 2
    assert "'above' of the saved sessions is damaged" in caplog.text
    assert "'resp_1' of the saved responses is damaged" in caplog.text
    assert "below" not in caplog.text
    assert sessions(database) == [below, beside]
    database.save(above)
    assert database.session("", "above") == above
    for name in ("below", "above", "beside"):
        database.delete("", name)
    assert row_count(database) == left_over
    database.close()


def test_damaged_session_goes_alone(database: Database, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    database.save(state("one"))
    database.save(state("two"))
    database.close()
    change(path, "UPDATE sessions SET tokens = 78 WHERE id = 'one'")
    database = Database(path, MODEL)
    assert database.session("", "one") is None
    assert "'one' of the saved sessions is damaged" in caplog.text
    assert sessions(database) == [state("two")]
    database.delete("", "two")
    assert row_count(database) == 0
    database.close()


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
    names = [session.id for session in sessions(again)]
    assert names == [str(number) for number in range(len(names))]
    assert (len(names) >= 18) == (kept > 0.9)
    again.close()
