"""Sessions of an engine in one's own process."""

import sqlite3
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from slipstream import (
    Engine,
    EngineConfig,
    InvalidRequestError,
    Message,
    SamplingParams,
    SessionConflictError,
    SessionNotFoundError,
    Tool,
    ToolUse,
)
from slipstream.chat import Part
from slipstream.models import Model
from slipstream.sessions.database import Database
from slipstream.sessions.saved_kv import SavedKV
from slipstream.sessions.state import SessionState
from tests.short_model import room_for
from tests.waiting import HANG, wait_until

GREEDY = SamplingParams(temperature=0, max_tokens=12)
SEEDED = SamplingParams(temperature=0.9, seed=3, max_tokens=12)
LONG = "A tree, a house, a river and a road. " * 40
TOOL = Tool("look_up", "Look it up", {"type": "object", "properties": {}})


@pytest.fixture(scope="module")
def engine(model: Model) -> Iterator[Engine]:
    """With memory for more than the context, so that there's some to pin."""
    with Engine(model, EngineConfig.model_validate({"kv_memory": room_for(10_000)})) as engine:
        yield engine


def afresh(engine: Engine, messages: tuple[Message, ...], params: SamplingParams) -> tuple[int, ...]:
    """What a whole conversation is answered when nothing that is known may be used."""
    prompt = engine.conversations.prompt(messages)
    return engine.generate(prompt.tokens.ids.tolist(), params, reuse=False).token_ids


def settled(engine: Engine) -> None:
    """Wait until nothing is computed ahead any more."""
    wait_until(lambda: engine.sessions.ahead.waiting == 0)


@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_whatever_was_done_to_a_session_its_answer_is_that_of_its_messages(
    engine: Engine, params: SamplingParams
) -> None:
    session = engine.session("You keep a list of things.")
    session.send("A tree.", params=params)
    session.send("A house.", params=params)
    session.append("A river.", Message("assistant", "Noted."))
    session.rollback(6)
    fork = session.fork(3)
    fork.append("A road.")
    for each, new in ((session, ()), (fork, ()), (session.fork(), ("A hill.",)), (fork.fork(4), ("A cat.",))):
        asked = (*each.messages, *(Message("user", text) for text in new))
        assert each.send(*new, params=params).token_ids == afresh(engine, asked, params)
        assert each.messages[:-1] == asked


def test_what_was_appended_is_computed_while_nothing_else_is(engine: Engine) -> None:
    session = engine.session("You keep a list of things.")
    session.append(LONG)
    wait_until(lambda: session.info().kv_tokens == session.info().state.tokens)
    assert session.send(params=GREEDY).counters.delta_tokens == 1


def test_what_certainly_follows_an_answer_is_computed_ahead(engine: Engine) -> None:
    session = engine.session("You keep a list of things.")
    first = session.send("A tree.", params=GREEDY).counters
    settled(engine)
    second = session.send("A house.", params=GREEDY).counters
    assert second.reused_tokens > first.prompt_tokens + first.completion_tokens


def test_a_turn_is_exact_and_prompt_while_another_session_is_computed_ahead(engine: Engine) -> None:
    session = engine.session("You keep a list of things.")
    ahead = engine.session(f"A long one. {LONG}")
    answer = session.send("A tree.", params=GREEDY)
    assert answer.token_ids == afresh(engine, session.messages[:-1], GREEDY)
    wait_until(lambda: ahead.info().kv_tokens == ahead.info().state.tokens)
    assert ahead.send("A house.", params=GREEDY).token_ids == afresh(engine, ahead.messages[:-1], GREEDY)


def test_a_session_is_found_by_its_id(engine: Engine) -> None:
    session = engine.session("You are terse.", ToolUse((TOOL,)), id="by-id")
    session.send("A tree.", params=GREEDY, tools=ToolUse((TOOL,), "none"))
    again = engine.session("This is ignored.", id="by-id")
    assert again.messages == session.messages
    assert again.messages[0].text == "You are terse."
    assert again.tools.tools == (TOOL,)


def test_an_unfinished_stream_changes_nothing_and_frees_the_session(engine: Engine) -> None:
    session = engine.session("You are terse.")
    stream = session.stream("Go on.", params=SamplingParams(temperature=0, max_tokens=2000, ignore_eos=True))
    next(stream)
    with pytest.raises(SessionConflictError, match="another request"):
        session.send("x", params=GREEDY)
    for action in (lambda: session.append("x"), lambda: session.rollback(0), session.delete):
        with pytest.raises(SessionConflictError):
            action()
    stream.close()
    assert session.messages == (Message("system", "You are terse."),)
    assert session.send("A tree.", params=GREEDY).token_ids == afresh(engine, session.messages[:-1], GREEDY)


def test_of_many_threads_one_gets_the_turn(engine: Engine) -> None:
    session = engine.session("You are terse.")
    refused: list[Exception] = []
    begin = threading.Barrier(6)

    def ask() -> None:
        begin.wait()
        try:
            session.send("A tree.", params=SamplingParams(temperature=0, max_tokens=40, ignore_eos=True))
        except SessionConflictError as error:
            refused.append(error)

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 5
    assert len(session.messages) == 3


def test_a_turn_that_fails_frees_the_session(engine: Engine) -> None:
    session = engine.session("You are terse.")
    for _ in range(2):
        with pytest.raises(InvalidRequestError, match="too long"):
            session.send("word " * 9000, params=GREEDY)
    assert len(session.messages) == 1


def test_more_than_memory_can_spare_is_not_pinned(engine: Engine) -> None:
    session = engine.session("word " * 2500)
    wait_until(lambda: session.info().kv_tokens == session.info().state.tokens)
    with pytest.raises(InvalidRequestError, match="no room"):
        session.pin()
    assert not session.info().state.pinned
    assert engine.core.stats().kv.pinned_sequences == 0


def test_a_pinned_session_that_is_deleted_before_it_is_computed_holds_nothing(engine: Engine) -> None:
    settled(engine)
    session = engine.session(f"Deleted. {LONG}", pinned=True)
    session.delete()
    settled(engine)
    assert engine.core.stats().kv.pinned_sequences == 0


def test_a_deleted_session_is_gone(engine: Engine) -> None:
    session = engine.session("Nobody else says this.")
    session.send("A tree.", params=GREEDY)
    settled(engine)
    before = engine.core.stats().kv
    session.delete()
    assert engine.core.stats().kv.free > before.free
    for action in (lambda: session.messages, session.info, session.delete, lambda: session.append("x"), session.pin):
        with pytest.raises(SessionNotFoundError, match=session.id):
            action()


def test_without_a_state_dir_nothing_is_saved(engine: Engine) -> None:
    session = engine.session("You are terse.")
    for action in (session.save, session.load):
        with pytest.raises(InvalidRequestError, match="state"):
            action()


def test_a_conversation_that_comes_again_while_it_is_removed_from_disk_is_saved_again(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    removing, go_on, removed = threading.Event(), threading.Event(), threading.Event()
    remove = SavedKV.remove

    def held_up(saved: SavedKV, keys: Iterable[bytes]) -> None:
        removing.set()
        assert go_on.wait(HANG)
        remove(saved, keys)
        removed.set()

    monkeypatch.setattr(SavedKV, "remove", held_up)
    computed = EngineConfig.model_validate({"state_dir": tmp_path, "response_cache_memory": 0})
    with Engine(model, computed) as engine:
        first = engine.session("You keep a list of things.")
        first.send("A tree.", params=GREEDY)
        wait_until(lambda: first.info().saved_bytes > 0)
        first.delete()
        assert removing.wait(HANG)
        again = engine.session("You keep a list of things.")
        again.send("A tree.", params=GREEDY)
        go_on.set()
        assert removed.wait(HANG)
        connector = engine.sessions.connector
        assert connector is not None
        wait_until(lambda: connector.unsaved_parts == 0)
        assert again.info().saved_bytes > 0
        again.delete()
    assert not [*tmp_path.glob("kv/*")], "what was deleted just before the end is gone, too"


@pytest.mark.parametrize("interval", [0.05, HANG], ids=["soon", "at the end"])
def test_what_a_full_disk_did_not_take_is_saved_when_it_does(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, interval: float
) -> None:
    """Sessions that nobody uses meanwhile."""
    monkeypatch.setattr("slipstream.sessions.directory._EXPIRY_INTERVAL", interval)

    saved, save = set(), Database.save

    def full(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    def recorded(database: Database, state: SessionState, parts: Iterable[Part]) -> list[bytes]:
        gone = save(database, state, parts)
        saved.add(state.id)
        return gone

    config = EngineConfig.model_validate({"state_dir": tmp_path})
    with Engine(model, config) as engine:
        kept = [engine.session(f"You keep list {number}.") for number in range(2)]
        with monkeypatch.context() as patch:
            for method in ("save", "checkpoint"):
                patch.setattr(Database, method, full)
            for session in kept:
                session.send("A tree.", params=GREEDY)
            if interval < HANG:
                wait_until(lambda: "log can't be emptied" in caplog.text)
        monkeypatch.setattr(Database, "save", recorded)
        said = {session.id: session.messages for session in kept}
        if interval < HANG:
            wait_until(lambda: saved >= set(said))
    with Engine(model, config) as engine:
        assert {name: engine.session(id=name).messages for name in said} == said
    assert "Traceback" not in caplog.text
