"""`make gpu-check` on a processor: every part runs, and results are compared with those that were kept."""

import json
import sys
from pathlib import Path

import pytest
import torch

from slipstream_bench import gpu_check

pytestmark = pytest.mark.torch


def test_on_a_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    kept = tmp_path / "kept"
    kept.mkdir()
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--out", str(kept / "a.json"), "--kept", str(kept)])
    gpu_check.main()
    report = json.loads((kept / "a.json").read_bytes())
    results = report["results"]
    assert {result["part"] for result in results} == {"product", "attention", "step"}
    assert all(result["exact"] for result in results if result["choice"] == "plain")
    assert all(result["ms"] and result["floor_ms"] is not None for result in results)
    assert "Not a GPU" in capsys.readouterr().out
    results[0]["ms"] = dict.fromkeys(results[0]["ms"], 1e6)
    (kept / "a.json").write_text(json.dumps(report))
    rows = [gpu_check.Result(**result) for result in results]
    rows[0].ms = dict.fromkeys(rows[0].ms, 5e5)
    monkeypatch.setenv("COLUMNS", "200")
    gpu_check.print_table(report["machine"], rows, results)
    assert "(x0.50)" in capsys.readouterr().out
