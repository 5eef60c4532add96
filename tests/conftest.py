"""Fixtures that several kinds of tests share."""

import pytest

from slipstream.models import DEFAULT_MODEL, Model, ModelStore
from slipstream.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def model() -> Model:
    """The default model, pulled if it isn't there."""
    return ModelStore().ensure(DEFAULT_MODEL)


@pytest.fixture(scope="session")
def tokenizer(model: Model) -> Tokenizer:
    return Tokenizer.from_file(model.tokenizer_path)
