"""One server for each family, with a tiny model of it."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from slipstream.models import Model
from slipstream.tokenizer import Tokenizer
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
