"""Runs: in which order, what is written down, what happens to servers that fail, and who is paused meanwhile."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from slipstream.errors import SlipstreamError
from slipstream.models import Model, Progress
from slipstream_bench.peers.base import Configuration, Endpoint, Peer, PeerError
from slipstream_bench.peers.process import free_port, paused, server_process
from slipstream_bench.peers.url import AtURL
from slipstream_bench.records import ConstraintKind, Result, RunFile, TurnResult
from slipstream_bench.runner import Plan, Server, run
from slipstream_bench.workloads import WORKLOADS, Workload
from tests.unit.openai_stand_in import StandIn, stand_in
from tests.waiting import HANG, wait_until

WARM_UP_REQUESTS = 6
CONFIGURATION = Configuration("default", "as it comes")


class StandInPeer(Peer):
    """A peer whose process does nothing, beside a stand-in that answers."""

    configurations = (CONFIGURATION,)

    def __init__(self, name: str, fails_after: int | None = None) -> None:
        super().__init__(cast(Model, None))
        self.name = name  # type: ignore[misc]
        self.fails_after = fails_after
        self.starts = 0
        self.process_group = 0
        self.requests: list[dict[str, Any]] = []

    def installed(self) -> bool:
        return True

    def setup(self, progress: Progress) -> None:
        raise AssertionError

    @contextmanager
    def running(self, configuration: Configuration) -> Iterator[Endpoint]:
        self.starts += 1
        process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True)
        self.process_group = process.pid
        try:
            with stand_in(self.fails_after) as server:
                self.requests = server.requests
                yield endpoint(server, process.pid)
        finally:
            process.kill()
            process.wait()


class Unstartable(StandInPeer):
    @contextmanager
    def running(self, configuration: Configuration) -> Iterator[Endpoint]:
        self.starts += 1
        raise PeerError("no such instruction")
        yield


def endpoint(server: StandIn, process_group: int) -> Endpoint:
    return Endpoint(
        base_url=server.url,
        model="some-model",
        process_group=process_group,
        version="1",
        extra_body={"own_field": 1},
        without_response_cache={"cache": False},
    )


class Log:
    """Whom a run has told of what; and, at each turn, whether the processes of `peers` are paused."""

    def __init__(self, *peers: StandInPeer) -> None:
        self.peers = peers
        self.units: list[tuple[str, int, str]] = []
        self.paused: list[tuple[str, dict[str, bool]]] = []

    def starting(self, server: str) -> None:
        pass

    def begins(self, round_number: int, workload: Workload, server: str, turns: int) -> None:
        self.units.append((workload.name, round_number, server.removesuffix(":default")))

    def took(self, turn: TurnResult) -> None:
        groups = {peer.name: peer.process_group for peer in self.peers if peer.process_group}
        self.paused.append((self.units[-1][2], {name: is_paused(group) for name, group in groups.items()}))

    def ends(self, result: Result) -> None:
        pass


def is_paused(process: int) -> bool:
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def plan(*peers: Peer, workloads: tuple[str, ...] = ("agent-6",), rounds: int = 1, constraint: str = "") -> Plan:
    return Plan(
        servers=[Server(peer, CONFIGURATION) for peer in peers],
        workloads=[WORKLOADS[name] for name in workloads],
        rounds=rounds,
        seed=0,
        constraint=cast(ConstraintKind, constraint or "response_format"),
    )


def test_servers_alternate_within_a_workload_and_each_round_begins_with_another(tmp_path: Path) -> None:
    a, b = StandInPeer("a"), StandInPeer("b")
    log = Log(a, b)
    run(plan(a, b, workloads=("agent-6", "rewrite"), rounds=2), RunFile(tmp_path), log)
    assert log.units == [
        ("agent-6", 0, "a"),
        ("agent-6", 0, "b"),
        ("rewrite", 0, "a"),
        ("rewrite", 0, "b"),
        ("agent-6", 1, "b"),
        ("agent-6", 1, "a"),
        ("rewrite", 1, "b"),
        ("rewrite", 1, "a"),
    ]
    assert (a.starts, b.starts) == (1, 1)


def test_servers_that_are_not_measured_are_paused(tmp_path: Path) -> None:
    a, b = StandInPeer("a"), StandInPeer("b")
    log = Log(a, b)
    run(plan(a, b, rounds=2), RunFile(tmp_path), log)
    assert all(not states[measured] for measured, states in log.paused)
    others = [state for measured, states in log.paused for name, state in states.items() if name != measured]
    assert others
    assert all(others)


def test_all_servers_get_the_same_requests(tmp_path: Path) -> None:
    a, b = StandInPeer("a"), StandInPeer("b")
    run(plan(a, b, workloads=("agent-6", "fleet-8")), RunFile(tmp_path), Log())
    assert len(a.requests) == WARM_UP_REQUESTS + 6 + 8 * 6
    assert a.requests == b.requests


def test_requests_carry_a_servers_own_fields_and_switch_off_its_response_cache_unless_repeats_are_measured(
    tmp_path: Path,
) -> None:
    peer = StandInPeer("a")
    run(plan(peer, workloads=("agent-6", "repeat")), RunFile(tmp_path), Log())
    novel, repeats = peer.requests[: WARM_UP_REQUESTS + 6], peer.requests[WARM_UP_REQUESTS + 6 :]
    assert all((request["own_field"], request["cache"]) == (1, False) for request in novel)
    assert not any("cache" in request for request in repeats)
    assert len(repeats) == 3 * 6


@pytest.mark.parametrize("constraint", ["response_format", "tools"])
def test_a_turn_is_recorded_as_its_client_saw_it(tmp_path: Path, constraint: str) -> None:
    peer = StandInPeer("a")
    file = RunFile(tmp_path)
    run(plan(peer, constraint=constraint), file, Log())
    (result,) = file.results
    assert [turn.tool for turn in result.turns[:2]] == ["read_file", "search_code"]
    for turn, request in zip(result.turns, peer.requests[WARM_UP_REQUESTS:], strict=True):
        assert turn.valid
        assert turn.prompt_tokens is not None
        assert turn.prompt_tokens - (turn.cached_tokens or 0) == 9
        assert turn.output_tokens == 7
        assert turn.first_token_seconds is not None
        assert 0 < turn.first_token_seconds <= turn.seconds <= result.seconds
        assert ("tools" in request) == (constraint == "tools")
    conversation = peer.requests[-1]["messages"]
    said = [
        m["content"] or m["tool_calls"][0]["function"]["arguments"] for m in conversation if m["role"] == "assistant"
    ]
    assert said == [turn.answer for turn in result.turns[:-1]]


def test_a_run_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    a, b = StandInPeer("a"), StandInPeer("b")
    run(plan(a), RunFile(tmp_path), Log())
    log = Log()
    run(plan(a, b, rounds=2), RunFile(tmp_path), log)
    assert log.units == [("agent-6", 0, "b"), ("agent-6", 1, "b"), ("agent-6", 1, "a")]
    assert len(RunFile(tmp_path).results) == 4


def test_a_server_that_fails_is_recorded_with_its_error_and_started_anew(tmp_path: Path) -> None:
    failing, sound = StandInPeer("failing", fails_after=WARM_UP_REQUESTS + 2), StandInPeer("sound")
    file = RunFile(tmp_path)
    run(plan(failing, sound, rounds=2), file, Log())
    failed = [result for result in file.results if result.server == "failing:default"]
    assert failing.starts == 2
    for result in failed:
        assert "out of luck" in (result.error or "")
        assert [turn.error is None for turn in result.turns] == [True, True, False]
    assert all(result.error is None for result in file.results if result.server == "sound:default")
    again = Log()
    failing.fails_after = None
    run(plan(failing, sound, rounds=2), RunFile(tmp_path), again)
    assert again.units == [("agent-6", 0, "failing"), ("agent-6", 1, "failing")]


def test_a_server_that_does_not_start_is_tried_once(tmp_path: Path) -> None:
    peer = Unstartable("broken")
    file = RunFile(tmp_path)
    run(plan(peer, workloads=("agent-6", "rewrite"), rounds=2), file, Log())
    assert peer.starts == 1
    assert ["no such instruction" in (result.error or "") for result in file.results] == [True] * 4


def test_a_server_at_a_url_is_asked_for_the_model_that_it_lists(tmp_path: Path) -> None:
    with stand_in() as server:
        peer = AtURL(cast(Model, None), server.url + "/")
        file = RunFile(tmp_path)
        found = Plan([Server(peer, peer.compared_by)], [WORKLOADS["agent-6"]], 1, 0, "response_format")
        run(found, file, Log())
        (result,) = file.results
        assert (result.error, result.server) == (None, f"{server.url}:as-found")
        assert {request["model"] for request in server.requests} == {"the-model"}


def test_a_url_that_nothing_answers_at_fails_by_its_name(tmp_path: Path) -> None:
    peer = AtURL(cast(Model, None), f"http://127.0.0.1:{free_port()}/v1")
    file = RunFile(tmp_path)
    run(Plan([Server(peer, peer.compared_by)], [WORKLOADS["agent-6"]], 1, 0, "response_format"), file, Log())
    assert "lists no model" in (file.results[0].error or "")


def test_the_last_line_of_a_run_that_was_killed_is_dropped(tmp_path: Path) -> None:
    RunFile(tmp_path).add(Result(workload="agent-6", round=0, server="a"))
    path = tmp_path / "run.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:25])
    file = RunFile(tmp_path)
    file.add(Result(workload="agent-6", round=1, server="a"))
    assert [result.round for result in RunFile(tmp_path).results] == [0, 1]


def test_a_later_result_takes_the_place_of_a_failed_one(tmp_path: Path) -> None:
    failed = Result(workload="agent-6", round=0, server="a", error="died")
    file = RunFile(tmp_path)
    file.add(failed)
    assert not file.has("agent-6", 0, "a")
    file.add(failed.model_copy(update={"error": None}))
    (result,) = RunFile(tmp_path).results
    assert result.error is None
    assert file.has("agent-6", 0, "a")


def test_a_file_that_is_no_run_file_is_refused_by_name_and_line(tmp_path: Path) -> None:
    (tmp_path / "run.jsonl").write_text('{"kind": "shopping list"}\n')
    with pytest.raises(SlipstreamError, match=r"run\.jsonl, line 1"):
        RunFile(tmp_path)


def test_a_process_that_ends_before_it_is_ready_says_why(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no weights')"]
    with (
        pytest.raises(PeerError, match="no weights"),
        server_process(command, f"http://127.0.0.1:{free_port()}", tmp_path / "log"),
    ):
        pass


def test_a_process_that_never_answers_is_given_up_and_ended(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60)"]
    log = tmp_path / "log"
    with (
        pytest.raises(PeerError, match="not ready"),
        server_process(command, f"http://127.0.0.1:{free_port()}", log, timeout=1),
    ):
        pass
    started = log.read_text().strip()  # not even that on a machine that is busy
    assert not started or not Path(f"/proc/{started}").exists()


def test_a_paused_server_is_stopped_too_with_its_workers(tmp_path: Path) -> None:
    port = free_port()
    script = f"sleep 60 & exec {sys.executable} -m http.server {port} --bind 127.0.0.1"
    log = tmp_path / "log"
    with server_process(["sh", "-c", script], f"http://127.0.0.1:{port}", log, timeout=HANG) as group, paused([group]):
        members = [path for path in Path("/proc").glob("[0-9]*/stat") if fields(path)[2:3] == [str(group)]]
        assert len(members) == 2
        wait_until(lambda: all(fields(path)[0] == "T" for path in members))
    wait_until(lambda: all(fields(path)[:1] in (["Z"], []) for path in members))


def fields(stat: Path) -> list[str]:
    """State, parent, process group and so on of a process; nothing if it ended meanwhile."""
    try:
        return stat.read_text().rpartition(")")[2].split()
    except OSError:
        return []
