"""The bench's command, with this server and its workloads in earnest."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from slipstream.cli.app import app
from slipstream.models import Model
from slipstream_bench import cli
from slipstream_bench.peers import Peer, Slipstream

RUN = ("run", "-w", "agent-6", "--turns", "3", "-s", "slipstream", "--rounds", "1")


@pytest.fixture(scope="module")
def folder(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run that is finished."""
    folder = tmp_path_factory.mktemp("bench")
    bench(*RUN, "--out", str(folder))
    return folder


def bench(*arguments: str, status: int = 0) -> str:
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exit_code == status, result.output
    return result.output


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "run.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def test_a_run_measures_each_turn_of_valid_calls(folder: Path) -> None:
    (result,) = records(folder, "result")
    assert result["error"] is None
    assert len(result["turns"]) == 3
    for turn in result["turns"]:
        assert turn["valid"]
        assert turn["report"]["response_cache"] == "off"
        assert turn["output_tokens"] == turn["report"]["completion_tokens"] > 0


def test_a_turn_recomputes_its_delta_and_no_more(folder: Path) -> None:
    (server,) = json.loads((folder / "summary.json").read_text())["workloads"][0]["servers"]
    assert server["beyond_delta"] == 0
    assert server["recomputed_tokens"] > 30


def test_the_report_shows_the_floor_and_the_machine(folder: Path) -> None:
    known = json.loads((folder / "summary.json").read_text())
    (workload,) = known["workloads"]
    assert workload["floor"]["ratio"]["median"] > 0  # which may be below 1 on a busy machine
    assert known["machine"]["cores"] >= 1
    page, text = (folder / "report.html").read_text(), (folder / "benchmarks.md").read_text()
    for report in (page, text):
        assert known["machine"]["cpu"] in report
        assert "slipstream:default" in report


def test_a_run_that_is_finished_has_nothing_more_to_do(folder: Path) -> None:
    before = (folder / "run.jsonl").read_text()
    bench(*RUN, "--out", str(folder))
    assert (folder / "run.jsonl").read_text() == before


def test_a_run_with_other_settings_does_not_go_on_with_this_one(folder: Path) -> None:
    output = bench("run", "-s", "slipstream", "--seed", "7", "--out", str(folder), status=1)
    assert "seed 0, not 7" in output


def test_a_report_can_be_made_again(folder: Path) -> None:
    made = [folder / name for name in ("summary.json", "report.html", "benchmarks.md")]
    before = [path.read_text() for path in made]
    for path in made:
        path.unlink()
    assert "agent-6" in bench("report", str(folder))
    assert [path.read_text() for path in made] == before


@pytest.mark.long
def test_ablations_are_servers_of_their_own(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIPSTREAM_API_KEY", "of a server of the user's own")
    monkeypatch.setenv("SLIPSTREAM_MAX_RUNNING", "none of this bench's business")
    arguments = ("-w", "agent-6", "-s", "slipstream:no-reuse", "--constraint", "tools", "--rounds", "1")
    bench("run", *arguments, "--out", str(tmp_path))
    (result,) = records(tmp_path, "result")
    assert result["server"] == "slipstream:no-reuse"
    assert [turn["cached_tokens"] for turn in result["turns"]] == [0] * 6
    assert all(turn["valid"] for turn in result["turns"])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("-w", "agent-7"), "agent-6, coding-35"),
        (("-s", "slipsteam"), "slipstream"),
        (("-s", "slipstream:worst"), "no-speculation"),
    ],
)
def test_a_name_that_nothing_has_is_answered_with_those_there_are(
    arguments: tuple[str, ...], told: str, tmp_path: Path, model: Model
) -> None:
    assert told in bench("run", *arguments, "--out", str(tmp_path / "out"), status=1)
    assert not (tmp_path / "out").exists()


def test_a_server_that_is_not_set_up_says_how(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Missing(Slipstream):
        name = "missing"

        def installed(self) -> bool:
            return False

    known: dict[str, type[Peer]] = {"slipstream": Slipstream, "missing": Missing}
    monkeypatch.setattr(cli, "PEERS", known)
    assert "slipstream bench setup missing" in bench("run", "-s", "missing", "--out", str(tmp_path), status=1)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)  # with the results of all that is set up
    assert "left out: missing" in bench("run", "-w", "agent-6", "--turns", "3", "--rounds", "1", "--out", str(tmp_path))
    assert "not set up on this machine, so not run" in (tmp_path / "benchmarks.md").read_text()


def test_the_list_has_workloads_and_servers(model: Model) -> None:
    output = bench("list")
    for name in ("fleet-8-concurrent", "bfcl-multi-turn", "slipstream:no-speculation"):
        assert name in output


def test_this_server_needs_no_setting_up(model: Model) -> None:
    assert "needs no setting up" in bench("setup", "slipstream")


def test_without_its_package_the_command_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slipstream.cli.bench.entry_points", lambda **_: ())
    assert bench("run", "-w", "agent-6", status=1).splitlines() == [
        "Error: slipstream-bench is not installed: pip install ./bench, in a checkout of Slipstream"
    ]


def test_a_folder_without_results_is_no_report(tmp_path: Path) -> None:
    assert "no results" in bench("report", str(tmp_path), status=1)
