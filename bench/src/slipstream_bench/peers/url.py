"""A server that runs already, at a URL."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from slipstream.models import Model
from slipstream_bench.peers.base import Configuration, Endpoint, Peer, PeerError


class AtURL(Peer):
    """Whatever speaks OpenAI's chat completions under `url`; the bench neither starts nor pauses it."""

    def __init__(self, model: Model, url: str) -> None:
        super().__init__(model)
        self.name = url.rstrip("/")  # type: ignore[misc]  # each has its own
        note = "was running already, with a model of its own choice, and was not paused while others were measured"
        self.configurations = (Configuration("as-found", self.name, (note,)),)  # type: ignore[misc]

    @contextmanager
    def running(self, configuration: Configuration) -> Iterator[Endpoint]:  # noqa: ARG002 - there is but one
        """The first model that it lists; `$OPENAI_API_KEY` is its key."""
        key = os.environ.get("OPENAI_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            response = httpx.get(f"{self.name}/models", headers=headers, timeout=30, trust_env=False)
            model = response.raise_for_status().json()["data"][0]["id"]
        except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
            raise PeerError(f"{self.name}/models lists no model: {error}. The URL has to end with /v1") from error
        yield Endpoint(self.name, model, None, "", api_key=key)
