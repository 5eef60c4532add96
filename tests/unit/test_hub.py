"""Models by name from a hub: `slipstream pull` against one on this machine, as a process of its own."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from slipstream.errors import ModelError
from slipstream.models import CATALOG, Model, ModelStore
from slipstream.models.sources import HubSource, parse_source
from tests.unit.hub_stand_in import Hub, hub
from tests.unit.test_gguf import split
from tests.unit.test_models import write_gguf

Pull = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    folder = tmp_path_factory.mktemp("hub")
    small, large = write_gguf(folder / "small.gguf"), write_gguf(folder / "large.gguf", seed=1)
    parts = split(small, 3)
    entry = CATALOG["qwen3-4b"].source
    with hub(
        {
            "some/Tiny-GGUF": {"Tiny-Q4_K_M.gguf": small, "Tiny-Q8_0.gguf": large, "mmproj-Q8_0.gguf": large},
            "some/Parts-GGUF": {f"Q5_K_M/Parts-Q5_K_M{part.name[1:]}": part for part in parts},
            "some/Eights-GGUF": {"a-Q8_0.gguf": small, "b-q8_0.gguf": large},
            "some/Nothing": {"README.md": small},
            getattr(entry, "repo", ""): {"Qwen3-4B-Q4_K_M.gguf": small},
        }
    ) as server:
        yield server


@pytest.fixture
def models(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "home")


@pytest.fixture
def pull(served: Hub, tmp_path: Path) -> Pull:
    def run(*arguments: str, offline: bool = False) -> subprocess.CompletedProcess[str]:
        served.fetched.clear()
        environment = os.environ | {
            "HF_ENDPOINT": served.url,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_OFFLINE": str(int(offline)),
            "SLIPSTREAM_HOME": str(tmp_path / "home"),
        }
        code = "from slipstream.cli.app import app; app()"
        command = [sys.executable, "-c", code, "pull", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    return run


def only(models: ModelStore) -> Model:
    (model,) = models.list()
    return model


def test_a_quantisation_stands_for_its_file(pull: Pull, served: Hub, models: ModelStore) -> None:
    done = pull("some/Tiny-GGUF:q4_k_m")
    assert done.returncode == 0, done.stderr
    model = only(models)
    assert (model.name, served.fetched) == ("tiny-q4_k_m", ["Tiny-Q4_K_M.gguf"])
    assert model.manifest.source == "hub repository some/Tiny-GGUF, file Tiny-Q4_K_M.gguf"
    for same in ("some/Tiny-GGUF", "some/Tiny-GGUF:Q4_K_M", "some/Tiny-GGUF:Tiny-Q4_K_M.gguf", "Some/tiny-gguf:Q4_K_M"):
        assert models.get(same) == model
    assert models.get("some/Tiny-GGUF:Q8_0") is None
    assert pull("some/Tiny-GGUF", offline=True).returncode == 0


def test_a_repository_without_an_ir_means_its_usual_quantisation(pull: Pull, models: ModelStore) -> None:
    assert pull("some/Tiny-GGUF").returncode == 0
    assert only(models).name == "tiny-q4_k_m"


def test_all_parts_of_a_model_are_fetched(pull: Pull, served: Hub, models: ModelStore) -> None:
    done = pull("some/Parts-GGUF:Q5_K_M")
    assert done.returncode == 0, done.stderr
    names = [f"Q5_K_M/Parts-Q5_K_M-{index:05}-of-00003.gguf" for index in (1, 2, 3)]
    assert (only(models).name, served.fetched) == ("parts-q5_k_m", names)
    assert models.get(f"some/Parts-GGUF:{names[2]}") == only(models)


def test_a_catalog_name_is_a_file_in_a_repository(pull: Pull, models: ModelStore) -> None:
    done = pull("qwen3-4b")
    assert done.returncode == 0, done.stderr
    model = only(models)
    assert model.name == "qwen3-4b"
    assert models.get("Qwen/Qwen3-4B-GGUF:Q4_K_M") == models.get("qwen3-4b") == model
    row = next(line for line in pull("--list").stdout.splitlines() if "qwen3-4b " in line)
    assert row.split()[-1] == "yes"


def test_a_name_in_the_catalog_is_kept_for_its_repository(models: ModelStore, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "qwen3-4b.gguf")
    assert models.ensure(str(path)).name.startswith("qwen3-4b-")
    assert models.get("qwen3-4b") is None


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ("some/Tiny-GGUF:Q3_K_M", "no GGUF file of Q3_K_M. Name one: some/Tiny-GGUF:ONE of Q4_K_M, Q8_0"),
        ("some/Tiny-GGUF:Q4_K", "no GGUF file of Q4_K. Name one"),
        ("some/Eights-GGUF", "no GGUF file of Q4_K_M. Name one: some/Eights-GGUF:ONE of Q8_0, q8_0"),
        ("some/Eights-GGUF:Q8_0", "several files of Q8_0. Name one: some/Eights-GGUF:FILE of a-Q8_0.gguf, b-q8_0.gguf"),
        ("some/Nothing", "neither an OpenVINO IR nor a GGUF file"),
        ("some/Unknown:Q4_K_M", "can't fetch hub repository some/Unknown, Q4_K_M"),
    ],
)
def test_none_or_several_list_the_choices(pull: Pull, served: Hub, models: ModelStore, spec: str, named: str) -> None:
    done = pull(spec)
    assert (done.returncode, models.list(), served.fetched) == (1, [], [])
    assert named in " ".join(done.stderr.split())


def test_a_model_that_is_there_whole_and_in_parts_is_taken_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [f"m-q4_k_m-0000{index}-of-00002.gguf" for index in (1, 2)]
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda *_: [*parts, "m-q4_k_m.gguf"])
    assert HubSource("some/m", quantisation="Q4_K_M").resolved().file == "m-q4_k_m.gguf"


def test_any_part_stands_for_its_model() -> None:
    assert parse_source("some/m:m-00002-of-00003.gguf") == HubSource("some/m", "m-00001-of-00003.gguf")


def test_a_path_with_a_colon_is_no_repository(models: ModelStore) -> None:
    with pytest.raises(ModelError, match="no file or folder"):
        models.ensure("./some/m:Q4_K_M")
