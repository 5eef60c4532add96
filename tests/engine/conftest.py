"""One engine for the tests that don't need one of their own."""

import time
from collections.abc import Iterator

import pytest

from slipstream import Engine, EngineConfig
from slipstream.kv import KVUsage
from slipstream.models import Model


@pytest.fixture(scope="session")
def engine(model: Model) -> Iterator[Engine]:
    """With KV memory for about 3,100 tokens."""
    with Engine(model, EngineConfig.model_validate({"kv_memory": "72MiB"})) as engine:
        yield engine


def settled(engine: Engine) -> KVUsage:
    """What memory holds once the last tokens of all answers have their KV, which is soon after they're out."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        usage = engine.core.call(lambda kv: kv.usage())
        if usage.running_sequences == 0:
            return usage
        time.sleep(0.005)
    raise AssertionError("a sequence never stops running")
