"""What outlives the server's end, however it came, and what is right when something did not."""

import json
import resource
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import httpx
import pytest

from slipstream.models import Model
from tests.server.process import MODEL, Server, running_server
from tests.short_model import TOKEN_BYTES, room_for

Messages = list[dict[str, Any]]

SYSTEM = {"role": "system", "content": "You are a keeper of a lighthouse, and answer in one short sentence. " * 3}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "light",
            "description": "Switches the light.",
            "parameters": {
                "type": "object",
                "properties": {"on": {"type": "boolean"}, "colour": {"enum": ["red", "green"]}},
                "required": ["on", "colour"],
            },
        },
    }
]
SEEDED = {"temperature": 0.8, "seed": 5}


@dataclass
class Place:
    """Where a server keeps its state, and what it logs."""

    folder: Path

    @property
    def kv_files(self) -> list[Path]:
        return sorted((self.folder / "state" / "kv").glob("*.safetensors"))

    @property
    def kv_bytes(self) -> int:
        return sum(path.stat().st_size for path in (self.folder / "state" / "kv").iterdir())

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    @contextmanager
    def served(self, *options: str) -> Iterator[Server]:
        folder, log = self.folder / "state", self.folder / "log"
        log.write_text("")
        with running_server("--state-dir", str(folder), *options, log=log) as server:
            yield server
        assert "Traceback" not in self.log

    def copy(self, folder: Path) -> "Place":
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)
        return Place(folder)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def chat(http: httpx.Client, messages: Messages, session: str | None = None, **params: Any) -> Any:
    body = {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 12, **params}
    response = http.post("/v1/chat/completions", json=body, headers={"X-Session-Id": session} if session else {})
    assert response.status_code == 200, response.text
    return response.json()


def streamed(http: httpx.Client, messages: Messages, session: str) -> dict[str, Any]:
    body = {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 12, "stream": True}
    response = http.post("/v1/chat/completions", json=body, headers={"X-Session-Id": session})
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    deltas = [choice["delta"].get("content") or "" for line in lines for choice in json.loads(line)["choices"]]
    return {"role": "assistant", "content": "".join(deltas)}


def message(answer: Any) -> dict[str, Any]:
    return answer["choices"][0]["message"]


def said(answer: Any) -> tuple[Any, ...]:
    """What an answer says; ids of calls are random."""
    calls = [call["function"] for call in message(answer).get("tool_calls") or []]
    return message(answer).get("content"), calls, answer["choices"][0]["finish_reason"]


def session(http: httpx.Client, name: str) -> Any:
    response = http.get(f"/v1/sessions/{name}")
    assert response.status_code == 200, response.text
    return response.json()


def sessions(http: httpx.Client) -> dict[str, Any]:
    """What lasts of each, in order."""
    volatile = ("kv_tokens", "kv_bytes", "saved_bytes", "busy")
    data = http.get("/v1/sessions").json()["data"]
    return {each["id"]: {name: value for name, value in each.items() if name not in volatile} for each in data}


def afresh(http: httpx.Client, messages: Messages, **params: Any) -> Any:
    """The answer to the whole messages that rests on nothing; leaves no session."""
    try:
        return chat(http, messages, "oracle", **params, slipstream={"reuse": False})
    finally:
        assert http.delete("/v1/sessions/oracle").status_code == 200


def go_on(http: httpx.Client, name: str, *, named: bool, new: Messages | None = None, **params: Any) -> Any:
    """The next turn of a session, which must say what one says that reuses nothing; its report."""
    new = new or [user("And then? 🌊")]
    before = session(http, name)
    whole = [*before["messages"], *new]
    if before["tools"]:
        params["tools"] = before["tools"]
    expected = afresh(http, whole, **params)
    answer = chat(http, new if named else whole, name if named else None, **params)
    assert said(answer) == said(expected)
    report = answer["slipstream"]
    assert report["session_id"] == name
    assert expected["slipstream"]["reused_tokens"] == 0
    return report | {"known": before["tokens"], "new": report["prompt_tokens"] - before["tokens"]}


def assert_only_new(report: dict[str, Any]) -> None:
    assert report["reused_tokens"] == report["known"]
    assert report["delta_tokens"] == report["new"]


def talk(http: httpx.Client) -> dict[str, str]:
    """Hold a conversation of each kind; the names of their sessions."""
    messages: Messages = [SYSTEM, user("Who are you?")]
    for text in ("Is it dark?", "Is it cold?"):
        answer = chat(http, messages)
        messages += [message(answer), user(text)]
    unnamed = chat(http, messages, **SEEDED)["slipstream"]["session_id"]

    chat(http, [SYSTEM, user("Name a ship.")], "named")
    chat(http, [user("Where is it? ☂ \u2028 日本")], "named", **SEEDED)

    call = message(chat(http, [SYSTEM, user("Light!")], "tools", tools=TOOLS, tool_choice="required", max_tokens=60))
    result = {"role": "tool", "tool_call_id": call["tool_calls"][0]["id"], "content": "done"}
    chat(http, [result], "tools", tools=TOOLS)

    first = streamed(http, [SYSTEM, user("Name a storm.")], "streamed")
    streamed(http, [SYSTEM, user("Name a storm."), first, user("And a calm.")], "streamed")
    return {"unnamed": unnamed, "named": "named", "tools": "tools", "streamed": "streamed"}


def wait_until_saved(server: Server) -> None:
    server.wait_until_idle()
    server.wait_for(lambda metrics: metrics["slipstream_state_unsaved_parts"] == 0)


@pytest.fixture(scope="module")
def ended(model: Model, tmp_path_factory: pytest.TempPathFactory) -> tuple[Place, dict[str, str], dict[str, Any]]:
    """The state of a server that talked and was asked to end; copy it. The names of its sessions, and their list."""
    place = Place(tmp_path_factory.mktemp("ended"))
    with place.served() as server, server.http() as http:
        names = talk(http)
        assert http.patch("/v1/sessions/named", json={"pinned": True}).status_code == 200
        listed = sessions(http)
        assert len(listed) == 4
    return place, names, listed


Ended = tuple[Place, dict[str, str], dict[str, Any]]


def test_conversations_go_on_where_they_were(ended: Ended, tmp_path: Path) -> None:
    place, names, listed = ended[0].copy(tmp_path), ended[1], ended[2]
    with place.served() as server, server.http() as http:
        assert list(sessions(http)) == list(listed)
        assert sessions(http) == listed
        server.wait_for(lambda metrics: metrics["slipstream_kv_sequences pinned"] == 1)
        for kind, params in (("unnamed", {}), ("tools", SEEDED), ("streamed", SEEDED)):
            assert_only_new(go_on(http, names[kind], named=kind != "unnamed", **params))
        forced: Any = {"tool_choice": "required", "max_tokens": 60}
        assert_only_new(go_on(http, "tools", named=True, new=[user("Again!")], **forced))
        pinned = go_on(http, "named", named=True)
        assert pinned["reused_tokens"] >= pinned["known"] - 3, (
            "all but the beginning of an answer that wasn't asked for"
        )
        assert session(http, "named")["pinned"]
        assert server.metrics()["slipstream_state_restored_tokens_total"] > 0


def test_fork_rollback_and_append_after_a_restart(ended: Ended, tmp_path: Path) -> None:
    place, names, _ = ended[0].copy(tmp_path), ended[1], ended[2]
    with place.served() as server, server.http() as http:
        forked = http.post(f"/v1/sessions/{names['unnamed']}/fork", json={"id": "forked", "keep": 3})
        assert forked.status_code == 201, forked.text
        assert forked.json()["parent"] == names["unnamed"]
        assert http.post("/v1/sessions/streamed/rollback", json={"keep": 3}).status_code == 200
        appended = http.post("/v1/sessions/tools/messages", json={"messages": [user("A ship!")]})
        assert appended.status_code == 200, appended.text
        for name in ("forked", "streamed", "tools"):
            go_on(http, name, named=True)
            go_on(http, name, named=True, **SEEDED)
        assert_only_new(go_on(http, names["unnamed"], named=False))
        listed = sessions(http)
    with place.served() as server, server.http() as http:
        assert sessions(http) == listed
        for name in ("forked", "streamed", "tools"):
            assert_only_new(go_on(http, name, named=True))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1000] ^= 4
    path.write_bytes(data)


def test_kv_that_was_damaged_is_computed_and_saved_again(ended: Ended, tmp_path: Path) -> None:
    place, names, listed = ended[0].copy(tmp_path), ended[1], ended[2]
    for path, damage in zip(place.kv_files, cycle((Path.unlink, cut, flip)), strict=False):
        damage(path)
    with place.served() as server, server.http() as http:
        assert sessions(http) == listed
        reports = [go_on(http, names[kind], named=kind != "unnamed") for kind in ("unnamed", "tools", "streamed")]
        assert all(report["delta_tokens"] > report["new"] for report in reports)
        assert "are computed again" in place.log
        assert "no good and removed" in place.log
        wait_until_saved(server)
    with place.served() as server, server.http() as http:
        for kind in ("unnamed", "tools", "streamed"):
            assert_only_new(go_on(http, names[kind], named=kind != "unnamed", **SEEDED))


def test_without_its_database_a_client_that_resends_everything_is_answered(ended: Ended, tmp_path: Path) -> None:
    place = ended[0].copy(tmp_path)
    for path in (tmp_path / "state").glob("state.db*"):
        path.unlink()
    with place.served() as server, server.http() as http:
        assert sessions(http) == {}
        assert place.kv_files == [], "nobody knows what it belongs to"
        whole = [SYSTEM, user("Who are you?"), {"role": "assistant", "content": "A keeper."}, user("Of what?")]
        for params in ({}, SEEDED):
            assert said(chat(http, whole, **params)) == said(afresh(http, whole, **params))


@pytest.mark.long
def test_damaged_database_is_set_aside_and_the_server_starts(ended: Ended, tmp_path: Path) -> None:
    place = ended[0].copy(tmp_path)
    database = tmp_path / "state" / "state.db"
    data = bytearray(database.read_bytes())
    data[4096:8192] = b"\xa5" * 4096
    database.write_bytes(data)
    with place.served() as server, server.http() as http:
        assert sessions(http) == {}
        assert "is damaged" in place.log
        chat(http, [SYSTEM, user("Hello?")], "new")
        go_on(http, "new", named=True)


@pytest.mark.long
@pytest.mark.parametrize("options", [["--threads", "1"], ["--tool-format", "hermes"]])
def test_other_options_give_right_answers(ended: Ended, tmp_path: Path, options: list[str]) -> None:
    place, names, listed = ended[0].copy(tmp_path), ended[1], ended[2]
    with place.served(*options) as server, server.http() as http:
        assert sessions(http) == listed
        for kind in ("unnamed", "tools", "streamed"):
            report = go_on(http, names[kind], named=kind != "unnamed")
            if "--threads" not in options:
                assert_only_new(report)
        if "--threads" in options:
            assert "another model, runtime or machine" in place.log


def test_killed_server_loses_nothing_that_was_saved(model: Model, tmp_path: Path) -> None:
    place = Place(tmp_path)
    with place.served() as server, server.http() as http:
        names = talk(http)
        wait_until_saved(server)
        last = chat(http, [user("A last word.")], "named")
        messages, listed = session(http, "named")["messages"], sessions(http)
        server.process.kill()
        server.process.wait()
    assert messages[-1]["content"] == message(last)["content"]
    with place.served() as server, server.http() as http:
        assert sessions(http) == listed
        assert session(http, "named")["messages"] == messages
        for kind, params in (("unnamed", SEEDED), ("tools", {}), ("streamed", {})):
            assert_only_new(go_on(http, names[kind], named=kind != "unnamed", **params))
        go_on(http, "named", named=True)
        wait_until_saved(server)
        server.process.kill()
        server.process.wait()
    with place.served() as server, server.http() as http:
        for kind in names:
            assert_only_new(go_on(http, names[kind], named=kind != "unnamed"))


@pytest.mark.long
def test_evicted_conversations_come_back_from_disk(model: Model, tmp_path: Path) -> None:
    """Memory for some 1,400 tokens, conversations of 2,400 together."""
    place = Place(tmp_path)
    with place.served("--kv-memory", room_for(1400)) as server, server.http() as http:
        for number in range(8):
            chat(http, [user(f"{number} seagulls sit on the roof. " * 40)], str(number))
        wait_until_saved(server)
        assert server.metrics()["slipstream_kv_evictions_total"] > 0
        for round in range(2):
            before = server.metrics()["slipstream_state_restored_tokens_total"]
            for number in range(8):
                report = go_on(http, str(number), named=True, **(SEEDED if round else {}))
                assert report["delta_tokens"] <= report["new"] + 32
            assert server.metrics()["slipstream_state_restored_tokens_total"] > before


@pytest.mark.long
def test_small_disk_is_not_overrun(model: Model, tmp_path: Path) -> None:
    place, limit = Place(tmp_path), 1000 * TOKEN_BYTES
    largest, done = 0, threading.Event()

    def watch() -> None:
        nonlocal largest
        while not done.wait(0.01):
            sizes = []
            for path in (tmp_path / "state" / "kv").glob("*"):
                try:
                    sizes.append(path.stat().st_size)
                except FileNotFoundError:
                    continue
            largest = max(largest, sum(sizes))

    with place.served("--state-disk", room_for(1000)) as server, server.http() as http:
        watcher = threading.Thread(target=watch)
        watcher.start()
        for number in range(8):
            chat(http, [user(f"{number} seagulls sit on the roof. " * 40)], str(number))
            go_on(http, str(number), named=True)
        wait_until_saved(server)
        assert server.metrics()["slipstream_state_bytes"] == place.kv_bytes <= limit
        done.set()
        watcher.join()
    assert limit / 2 < largest <= limit


@pytest.mark.long
def test_full_disk_costs_no_answer(ended: Ended, tmp_path: Path) -> None:
    """No file may grow any more; pages that SQLite and the log have already may be written."""
    place, names, _ = ended[0].copy(tmp_path), ended[1], ended[2]
    with place.served() as server, server.http() as http:
        go_on(http, "streamed", named=True)
        wait_until_saved(server)
        limits = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (2**16, -1))
        for name in ("tools", "streamed"):
            for params in ({}, SEEDED):
                go_on(http, name, named=True, **params)
        go_on(http, names["unnamed"], named=False)
        wait_until_saved(server)
        assert "can't be saved" in place.log
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, limits)
        go_on(http, "streamed", named=True)
        wait_until_saved(server)
        listed = sessions(http)
    with place.served() as server, server.http() as http:
        assert sessions(http)["streamed"] == listed["streamed"]
        for name in ("tools", "streamed", "named"):
            go_on(http, name, named=True)


def test_a_full_disk_keeps_what_it_can_not_delete(model: Model, tmp_path: Path) -> None:
    """A stored response and a session, whose deletion would have to grow the log: each stays whole, and goes later."""
    with Place(tmp_path).served() as server, server.http() as http:
        stored = http.post("/v1/responses", json={"input": "Who keeps the light?", "max_output_tokens": 4}).json()
        chat(http, [user("Who keeps the boat?")], "boat")
        wait_until_saved(server)
        things = {f"/v1/responses/{stored['id']}": "output", "/v1/sessions/boat": "messages"}
        before = {path: http.get(path).json()[field] for path, field in things.items()}
        limits = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (0, -1))
        for path, field in things.items():
            refused = http.delete(path)
            assert (refused.status_code, refused.json()["error"]["code"]) == (507, "storage_failed"), refused.text
            assert http.get(path).json()[field] == before[path]
        assert chat(http, [user("And you?")])["usage"]["completion_tokens"] > 0
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, limits)
        for path in things:
            assert http.delete(path).is_success
            assert http.get(path).status_code == 404
    with Place(tmp_path).served() as server, server.http() as http:
        assert [http.get(path).status_code for path in things] == [404, 404]


@pytest.mark.long
def test_second_server_on_the_same_state_is_refused(ended: Ended, tmp_path: Path) -> None:
    place = ended[0].copy(tmp_path)
    with place.served() as server, server.http() as http:
        with pytest.raises(AssertionError, match="ended with status 1"), place.served():
            pass
        assert "is in use by another server" in " ".join(place.log.split())
        time.sleep(0.1)
        assert len(sessions(http)) == 4
