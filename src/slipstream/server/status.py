"""What is served and how it fares: `/v1/models`, `/health`, `/metrics`."""

import asyncio
import time
from typing import Literal

from fastapi import APIRouter, Request, Response
from prometheus_client.exposition import choose_encoder
from pydantic import BaseModel

from slipstream.runtime import Runtime
from slipstream.server.metrics import Metrics
from slipstream.server.openai_common import check_model


class Model(BaseModel):
    """A served model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    max_model_len: int
    """Tokens that prompt and answer may have together."""


class ModelList(BaseModel):
    """All of them."""

    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    """The server listens only once the model is ready, so it is well unless its engine ended."""

    status: Literal["ok", "stopped"]
    exact: bool
    """Whether the same request gives the same tokens on this machine, whatever was cached, batched or drafted."""


def router(runtime: Runtime, metrics: Metrics) -> APIRouter:
    """The routes."""
    routes = APIRouter()
    model = Model(
        id=runtime.model.name,
        created=int(time.time()),
        owned_by="slipstream",
        max_model_len=runtime.core.limits.max_sequence,
    )

    @routes.get("/health")
    async def health(response: Response) -> Health:
        response.status_code = 200 if runtime.core.alive else 503
        return Health(status="ok" if runtime.core.alive else "stopped", exact=runtime.exact)

    @routes.get("/v1/models")
    async def models() -> ModelList:
        return ModelList(object="list", data=[model])

    @routes.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Model:
        check_model(runtime, name)
        return model

    @routes.get("/metrics")
    async def all_metrics(http: Request) -> Response:
        encode, content_type = choose_encoder(http.headers.get("accept", ""))
        text = await asyncio.to_thread(encode, metrics.registry)
        return Response(text, headers={"Content-Type": content_type})

    return routes
