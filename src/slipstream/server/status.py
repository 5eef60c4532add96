"""What is served and how it fares: `/v1/models`, `/health`, `/metrics`."""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Literal

from fastapi import FastAPI, HTTPException, Request, Response
from prometheus_client.exposition import choose_encoder
from pydantic import BaseModel

from slipstream.runtime import MemoryUse
from slipstream.server.access import client_of
from slipstream.server.openapi import Responses
from slipstream.server.turn import TurnRunner


class Model(BaseModel):
    """A served model, under one of its names, as OpenAI's and Anthropic's clients read it."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["slipstream"] = "slipstream"
    max_model_len: int
    """Tokens that prompt and answer may have together."""
    kv_tokens: int
    """Tokens of context that the KV memory holds, of all conversations together."""
    type: Literal["model"] = "model"
    display_name: str
    created_at: datetime
    lifecycle: Literal["active"] = "active"
    max_input_tokens: int
    max_tokens: int


class ModelList(BaseModel):
    """All of them, on one page."""

    object: Literal["list"] = "list"
    data: list[Model]
    has_more: Literal[False] = False
    first_id: str
    last_id: str


class Health(BaseModel):
    """The server listens only once the model is ready, so it is well unless its engine ended, or hangs in a step."""

    status: Literal["ok", "stalled", "stopped"]
    exact: bool
    """Whether the same request gives the same tokens on this machine, whatever was cached, batched or drafted."""
    kv_tokens: int
    """Tokens of context that the KV memory holds, of all conversations together."""
    memory: MemoryUse


_METRICS: Responses = {200: {"content": {"text/plain": {}, "application/openmetrics-text": {}}}}


def add_routes(app: FastAPI, runner: TurnRunner) -> None:
    """Add the routes."""
    runtime, names = runner.runtime, runner.names
    created, longest = int(time.time()), runtime.core.limits.max_sequence
    readers = ThreadPoolExecutor(1, "slipstream-metrics")  # so that none waits for requests that wait

    def model(name: str) -> Model:
        return Model(
            id=name,
            created=created,
            max_model_len=longest,
            kv_tokens=runtime.core.limits.capacity,
            display_name=name,
            created_at=datetime.fromtimestamp(created, UTC),
            max_input_tokens=longest,
            max_tokens=longest,
        )

    @app.head("/", include_in_schema=False)
    @app.get("/")
    async def root() -> dict[str, str]:  # some clients look whether anybody is there
        return {"server": "slipstream", "documentation": "/docs"}

    @app.get("/health", responses={503: {"model": Health}})
    async def health(response: Response) -> Health:
        status: Literal["ok", "stalled", "stopped"] = "ok"
        if not runtime.core.alive:
            status = "stopped"
        elif runtime.core.stalled_seconds > runner.config.step_timeout:
            status = "stalled"
        response.status_code = 200 if status == "ok" else 503
        return Health(
            status=status,
            exact=runtime.exact,
            kv_tokens=runtime.core.limits.capacity,
            memory=runtime.memory,
        )

    @app.get("/v1/models")
    async def models() -> ModelList:
        return ModelList(data=[model(name) for name in names.all], first_id=names.all[0], last_id=names.all[-1])

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Model:
        return model(names.check(name))

    @app.get("/metrics", response_class=Response, responses=_METRICS)
    async def all_metrics(http: Request) -> Response:
        if not client_of(http).operator:
            raise HTTPException(403, "metrics are about all tenants: ask with an operator's key")
        encode, content_type = choose_encoder(http.headers.get("accept", ""))
        reading = asyncio.get_running_loop().run_in_executor(readers, encode, runner.metrics.registry)
        return Response(await reading, headers={"Content-Type": content_type})
