"""The examples, run as they are; what they print must show that state was reused."""

import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import httpx

from tests.server.process import MODEL, Server
from tests.waiting import HANG

EXAMPLES = Path(__file__).parents[2] / "examples"
Row = dict[str, str]


def run(server: Server, name: str, *options: str) -> str:
    """What an example prints; it must end well."""
    command = [sys.executable, EXAMPLES / name, "--base-url", server.url, "--model", MODEL, *options]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=HANG, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def table(printed: str) -> list[Row]:
    """The rows of the table in it, by the names of the columns."""
    header = next(line for line in printed.splitlines() if line.startswith("┃"))
    names = [name.strip() for name in header.strip("┃").split("┃")]
    rows = [line.strip("│").split("│") for line in printed.splitlines() if line.startswith("│")]
    return [dict(zip(names, map(str.strip, row), strict=True)) for row in rows]


def session_ids(http: httpx.Client) -> set[str]:
    return {session["id"] for session in http.get("/v1/sessions?limit=1000").json()["data"]}


def test_workers_share_the_planners_context(server: Server, http: httpx.Client) -> None:
    before = session_ids(http)
    printed = run(server, "planner.py")
    context = int(re.findall(r"context is computed: (\d+) tokens", printed)[0])
    *workers, planner = table(printed)
    assert {worker["session"] for worker in workers} == {"transport", "shelves", "readers"}
    for row in (*workers, planner):
        assert int(row["reused"]) >= context - 3  # which end with the line that opens an answer
    for worker in workers:
        assert int(worker["computed"]) <= 30
    assert int(planner["prompt"]) > context + sum(int(worker["answer"]) for worker in workers)
    assert session_ids(http) <= before


def test_turns_of_the_coding_agent_cost_their_new_tokens(server: Server) -> None:
    turns = table(run(server, "coding_agent.py", "--turns", "16"))
    assert len(turns) == 16
    assert len({turn["call"] for turn in turns}) >= 3
    for before, turn in pairwise(turns):
        new = int(turn["prompt"]) - int(before["prompt"]) - int(before["answer"])
        assert 0 < int(turn["computed"]) <= new <= 200
    assert 1500 < int(turns[-1]["prompt"]) < 4000


def test_responses_go_on_from_any_other(server: Server) -> None:
    printed = table(run(server, "responses_chain.py"))
    rows = {row["response"]: row for row in printed}
    assert [row["after"] for row in printed] == ["-", "first", "second", "answer", "answer"]
    for row in printed[1:]:
        earlier = rows[row["after"]]
        assert int(row["cached"]) >= int(earlier["input"]) + int(earlier["output"])
        assert int(row["computed"]) > 0


def test_anthropics_client_reads_what_is_cached(server: Server) -> None:
    turns = table(run(server, "claude_style.py"))
    assert [turn["stop_reason"] for turn in turns][:2] == ["tool_use"] * 2
    assert len(turns) == 6
    for before, turn in pairwise(turns):
        known = sum(int(before[column]) for column in ("cache_read", "cache_write", "output"))
        assert int(turn["cache_read"]) >= known
        assert int(turn["cache_write"]) > 0
