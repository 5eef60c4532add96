"""One engine for the tests that don't need one of their own."""

from collections.abc import Iterator

import pytest

from slipstream import Engine, EngineConfig
from slipstream.models import Model
from tests.short_model import room_for


@pytest.fixture(scope="session")
def engine(model: Model) -> Iterator[Engine]:
    """With KV memory for about 3,100 tokens."""
    with Engine(model, EngineConfig.model_validate({"kv_memory": room_for(3200)})) as engine:
        yield engine
