"""These tests need torch, so they run when they are asked for: `make test-torch`."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from slipstream.models import Model


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Importing torch takes seconds, which other runs need not spend."""
    if config.getoption("-m") != "torch":
        return True if collection_path.name.startswith("test_") else None
    os.environ["TRITON_INTERPRET"] = "1"  # before anybody imports Triton: kernels run in its interpreter
    os.environ["OMP_NUM_THREADS"] = "1"  # and torch: what is computed is small, and threads wait for each other busily
    return None


@pytest.fixture(scope="session")
def home(whole_model: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A store of its own for tiny models, once the default model is found in the usual one."""
    home = tmp_path_factory.mktemp("torch")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLIPSTREAM_HOME", str(home))
        yield home


@pytest.fixture(scope="session")
def tiny(home: Path, whole_model: Model, request: pytest.FixtureRequest) -> Model:
    """A tiny model of the architecture that the test names."""
    from tests.torch_backend.tiny import add_tiny_model

    return add_tiny_model(home, request.param, whole_model)
