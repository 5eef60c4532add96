"""`make gpu-check` on a processor: every part runs, and results are compared with those that were kept."""

import json
import sys
from pathlib import Path

import pytest
import torch

from slipstream.models import Model
from slipstream_bench import gpu_check
from slipstream_bench.gpu_agents import MODES

pytestmark = pytest.mark.torch


def test_on_a_processor(
    whole_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLIPSTREAM_HOME", str(whole_model.path.parents[1]))  # whose tokenizer it takes
    kept = tmp_path / "kept"
    kept.mkdir()
    arguments = ["--device", "cpu", "--seconds", "1e9", "--out", str(kept / "a.json"), "--kept", str(kept)]
    monkeypatch.setattr(sys, "argv", ["gpu_check", *arguments])
    gpu_check.main()
    report = json.loads((kept / "a.json").read_bytes())
    results = report["results"]
    assert {result["part"] for result in results} == {"product", "attention", "exactness", "step", "agents"}
    assert all(result["exact"] for result in results if result["choice"] not in ("library", "transformers"))
    by_part = {part: [each for each in results if each["part"] == part] for part in ("step", "exactness", "agents")}
    assert all(result["ms"] and result["floor_ms"] is not None for result in by_part["step"])
    assert int(by_part["exactness"][0]["note"].split()[0]) >= gpu_check.TINY.scenarios
    assert [result["choice"] for result in by_part["agents"]] == [*(mode.name for mode in MODES), "transformers"]
    assert all(result["ms"]["turn"] > 0 for result in by_part["agents"])
    tokens_a_step = [float(result["note"].split()[2]) for result in by_part["agents"][:-1]]
    assert tokens_a_step[0] > 1.5 * tokens_a_step[1], "forced tokens and drafts bring several tokens a step"
    assert "Not a GPU" in capsys.readouterr().out
    results[0]["ms"] = dict.fromkeys(results[0]["ms"], 1e6)
    (kept / "a.json").write_text(json.dumps(report))
    rows = [gpu_check.Result(**result) for result in results]
    rows[0].ms = dict.fromkeys(rows[0].ms, 5e5)
    monkeypatch.setenv("COLUMNS", "200")
    gpu_check.print_table(report["machine"], rows, results)
    assert "(x0.50)" in capsys.readouterr().out


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check"])
    with pytest.raises(SystemExit, match=r"there is no GPU .* ARGS='--device cpu'"):
        gpu_check.main()
