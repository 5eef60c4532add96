"""One server for all tests that don't need one of their own."""

from collections.abc import Iterator

import httpx
import pytest
from openai import OpenAI

from slipstream.models import Model
from tests.server.process import Server, running_server


@pytest.fixture(scope="session")
def server(model: Model) -> Iterator[Server]:
    with running_server() as server:
        yield server


@pytest.fixture(scope="session")
def whole_server(model: Model, whole_model: Model) -> Iterator[Server]:
    """With all layers of the model, for tests that ask for some sense."""
    home = {"SLIPSTREAM_HOME": str(whole_model.path.parents[1])}
    with running_server("--kv-memory", "256MiB", environment=home) as server:
        yield server


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[OpenAI]:
    with server.openai() as client:
        yield client


@pytest.fixture(scope="session")
def whole_client(whole_server: Server) -> Iterator[OpenAI]:
    with whole_server.openai() as client:
        yield client


@pytest.fixture(scope="session")
def http(server: Server) -> Iterator[httpx.Client]:
    with server.http() as http:
        yield http


@pytest.fixture(scope="session")
def whole_http(whole_server: Server) -> Iterator[httpx.Client]:
    with whole_server.http() as http:
        yield http
