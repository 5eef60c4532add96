"""`make gpu-check` on a processor: every part runs, and results are compared with those that were kept."""

import json
import shlex
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import torch

from slipstream.backend.torch.plain import PlainOperators
from slipstream.models import Model
from slipstream_bench import gpu_check, gpu_device, gpu_operators
from slipstream_bench.gpu_agents import MODES
from slipstream_bench.gpu_peers import PEERS, GPUPeer, find
from slipstream_bench.measurements import gpu_tiling
from tests.torch_backend import peer_stand_in

pytestmark = pytest.mark.torch
OTHERS = ("library", "transformers", "vllm 9.9", "sglang 9.9")
"""Those that aren't ours."""


class Unfused(PlainOperators):
    """What a GPU has as well, so to speak."""

    name = "unfused plain"


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """A Python that has vLLM and SGLang, so to speak."""
    path = tmp_path / "python"
    command = shlex.join([sys.executable, str(Path(peer_stand_in.__file__))])
    path.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    path.chmod(0o755)
    return path


def test_on_a_processor(
    whole_model: Model,
    tmp_path: Path,
    stand_in: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SLIPSTREAM_HOME", str(whole_model.path.parents[1]))  # whose tokenizer it takes
    monkeypatch.setattr(gpu_check, "operators_for", lambda _: [PlainOperators(), Unfused()])
    kept = tmp_path / "kept"
    kept.mkdir()
    arguments = ["--device", "cpu", "--seconds", "1e9", "--out", str(kept / "a.json"), "--kept", str(kept)]
    arguments += ["--peer", f"vllm={stand_in}", "--peer", f"sglang={stand_in}"]
    monkeypatch.setattr(sys, "argv", ["gpu_check", *arguments])
    gpu_check.main()
    report = json.loads((kept / "a.json").read_bytes())
    results = report["results"]
    assert {result["part"] for result in results} == {"product", "attention", "choice", "exactness", "step", "agents"}
    assert all(result["exact"] for result in results if result["choice"] not in OTHERS)
    by_part = {part: [each for each in results if each["part"] == part] for part in ("step", "exactness", "agents")}
    assert all(result["ms"] and result["floor_ms"] is not None for result in by_part["step"])
    assert [result["choice"] for result in by_part["step"]] == ["plain", "unfused plain"]
    of_products = {result["choice"] for result in results if result["part"] == "product"}
    assert of_products == {"library", "library, padded", "plain"}, "those of unfused kernels are the same"
    of_weights = [result["case"] for result in results if result["part"] == "product" and result["choice"] == "plain"]
    assert of_weights == ["tiny", "tiny, int4", "tiny, e2m1", "tiny, e4m3"]
    assert int(by_part["exactness"][0]["note"].split()[0]) >= gpu_check.TINY.scenarios
    assert [result["choice"] for result in by_part["agents"]] == [*(mode.name for mode in MODES), *OTHERS[1:]]
    assert all(result["ms"]["turn"] > 0 for result in by_part["agents"])
    tokens_a_step = [float(result["note"].split()[2]) for result in by_part["agents"][:3]]
    assert tokens_a_step[0] > 1.5 * tokens_a_step[1], "forced tokens and drafts bring several tokens a step"
    assert "Not a GPU" in capsys.readouterr().out
    results[0]["ms"] = dict.fromkeys(results[0]["ms"], 1e6)
    (kept / "a.json").write_text(json.dumps(report))
    rows = [gpu_check.Result(**result) for result in results]
    rows[0].ms = dict.fromkeys(rows[0].ms, 5e5)
    monkeypatch.setenv("COLUMNS", "200")
    gpu_check.print_table(report["machine"], rows, results)
    assert "(x0.50)" in capsys.readouterr().out


def test_a_product_that_can_not_be_used_costs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refused(PlainOperators):
        name = "refused"

        def linear(self, *_: object) -> torch.Tensor:
            raise RuntimeError("requires another library")

    monkeypatch.setattr(gpu_operators, "operators_for", lambda _: [Refused(), PlainOperators()])
    device = gpu_device.Device(torch.device("cpu"), gpu_device.TINY, 1e9)
    with torch.inference_mode():
        found = {(each.case, each.choice): each for each in gpu_operators.products(device)}
    assert found["tiny", "refused"].note == "can't be used here: requires another library"
    assert [each.exact for (_, choice), each in found.items() if choice == "plain"] == [True] * 4
    assert all(each.exact is None and not each.ms for (_, choice), each in found.items() if choice == "refused")


def test_a_part_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Costs none of the others, and is no success."""

    def fails(_: object) -> Iterator[gpu_check.Result]:
        yield gpu_check.Result("product", "first", "")
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(gpu_check, "products", fails)
    for part in ("_scenarios", "_steps", "_agents", "_peers"):
        monkeypatch.setattr(gpu_check.Check, part, lambda _: iter(()))
    out = tmp_path / "found.json"
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--device", "cpu", "--out", str(out)])
    with pytest.raises(SystemExit, match="failed: product"):
        gpu_check.main()
    results = json.loads(out.read_bytes())["results"]
    assert [each["part"] for each in results[:3]] == ["product", "product", "attention"]
    assert results[1]["note"] == "failed: an illegal memory access"
    choices = [each for each in results if each["part"] == "choice"]
    assert [each["choice"] for each in choices] == ["greedy", "greedy, masked", "top_p"]
    assert all(each["exact"] and each["ms"].keys() == {"1", "3"} for each in choices)
    assert "choice 49152 tokens top_p" in capsys.readouterr().err


def test_other_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With what a kernel has no room for."""
    out = tmp_path / "found" / "tiling.json"
    changes = {"block_n": 32}, {"block_k": 0}
    monkeypatch.setattr(gpu_tiling, "_CHANGES", changes)
    monkeypatch.setattr(sys, "argv", ["gpu_tiling", "--device", "cpu", "--out", str(out)])
    gpu_tiling.main()
    results = json.loads(out.read_bytes())["results"]
    tilings, weights = ("as it is", "block_n 32", "block_k 0"), ("tiny", "tiny, 4 bits")
    assert [(each["tiling"], each["weight"]) for each in results] == [*product(tilings, weights)]
    assert [*results[0]["ms"]] == ["1", "17"]
    assert all((not each["ms"]) == (each["tiling"] == "block_k 0") for each in results)
    shown = capsys.readouterr()
    assert "tiny, block_k 0: " in shown.err
    assert shown.out.count("(1.00 to 1.00)") == 4


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check"])
    with pytest.raises(SystemExit, match=r"there is no GPU .* ARGS='--device cpu'"):
        gpu_check.main()


@pytest.mark.parametrize("peer", PEERS, ids=[peer.name for peer in PEERS])
def test_a_server_that_is_not_installed(peer: GPUPeer, stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert find(peer) is None
    assert find(peer, Path("/nowhere/python")) is None
    installed = find(peer, stand_in)
    assert installed is not None
    assert installed.name == f"{peer.name} 9.9"
    program = stand_in.parent / peer.name
    program.symlink_to(stand_in)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(stand_in.parent))
    assert find(peer) == installed


def test_servers_that_are_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--device", "cpu", "--peer", "llama=/usr/bin/python"])
    with pytest.raises(SystemExit, match="vllm, sglang, not llama"):
        gpu_check.main()
