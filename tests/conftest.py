"""Fixtures that several kinds of tests share."""

import functools
import ssl
from collections.abc import Iterator

import hypothesis
import pytest

from slipstream.engine.grammar import GrammarCompiler
from slipstream.models import DEFAULT_MODEL, Model, ModelStore
from slipstream.tokenizer import Tokenizer
from tests.short_model import add_short_model

# The same examples at every run, however long each takes; `pytest --hypothesis-profile=default` looks for new ones.
hypothesis.settings.register_profile(
    "repeatable", derandomize=True, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("repeatable")

# Each client of HTTP reads all authorities of the world, which takes 40 ms, and none here needs them.
ssl.create_default_context = functools.cache(ssl.create_default_context)


@pytest.fixture(scope="session")
def whole_model() -> Model:
    """The default model, pulled if it isn't there, with all its layers."""
    return ModelStore().ensure(DEFAULT_MODEL)


@pytest.fixture(scope="session")
def model(whole_model: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """The default model cut short, in a store of its own, where whatever is started from now on finds it by name."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLIPSTREAM_HOME", str(home))
        yield add_short_model(home, whole_model)


@pytest.fixture(scope="session")
def tokenizer(model: Model) -> Tokenizer:
    return Tokenizer.from_file(model.tokenizer_path)


@pytest.fixture(scope="module")
def compiler(model: Model, tokenizer: Tokenizer) -> GrammarCompiler:
    manifest = model.manifest
    return GrammarCompiler(tokenizer, vocab_size=manifest.vocab_size, stop_token_ids=manifest.stop_token_ids)
