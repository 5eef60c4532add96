"""One engine for the tests that don't need one of their own."""

from collections.abc import Iterator

import pytest

from slipstream import Engine, EngineConfig
from slipstream.models import Model


@pytest.fixture(scope="session")
def engine(model: Model) -> Iterator[Engine]:
    """With KV memory for about 3,100 tokens."""
    with Engine(model, EngineConfig.model_validate({"kv_memory": "72MiB"})) as engine:
        yield engine
