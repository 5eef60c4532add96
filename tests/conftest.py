"""Fixtures that several kinds of tests share."""

import hypothesis
import pytest

from slipstream.engine.grammar import GrammarCompiler
from slipstream.models import DEFAULT_MODEL, Model, ModelStore
from slipstream.tokenizer import Tokenizer

# The same examples at every run; `pytest --hypothesis-profile=default` looks for new ones.
hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def model() -> Model:
    """The default model, pulled if it isn't there."""
    return ModelStore().ensure(DEFAULT_MODEL)


@pytest.fixture(scope="session")
def tokenizer(model: Model) -> Tokenizer:
    return Tokenizer.from_file(model.tokenizer_path)


@pytest.fixture(scope="module")
def compiler(model: Model) -> GrammarCompiler:
    manifest = model.manifest
    return GrammarCompiler(model.tokenizer_path, vocab_size=manifest.vocab_size, stop_token_ids=manifest.stop_token_ids)
