"""The ASGI application, put together."""

from importlib.metadata import version

from fastapi import Depends, FastAPI
from starlette.middleware.cors import CORSMiddleware

from slipstream.config import ServerConfig
from slipstream.runtime import Runtime
from slipstream.server import (
    anthropic_messages,
    docs,
    openai_chat,
    openai_completions,
    openai_responses,
    sessions,
    status,
    tokens,
)
from slipstream.server.access import Access, require_json
from slipstream.server.bodies import BodyRoute
from slipstream.server.errors import install_error_handlers
from slipstream.server.gate import RequestCounter, RootPath
from slipstream.server.intake import Intake
from slipstream.server.keys import KeyRing
from slipstream.server.metrics import Metrics
from slipstream.server.openapi import DescribedApp, OpenAIError, errors
from slipstream.server.traces import Traces, otlp_provider
from slipstream.server.turn import TurnRunner
from slipstream.server.turn_log import log_turn

_PARTS = (openai_chat, openai_completions, openai_responses, anthropic_messages, sessions, tokens, status)


def create_app(runtime: Runtime, config: ServerConfig, keys: KeyRing) -> FastAPI:
    """An application that serves a runtime; whoever runs it closes that, and sends it HTTP alone, see `serve.py`."""
    app = DescribedApp(
        title="Slipstream",
        version=version("slipstream"),
        openapi_url=None,  # see docs.py
        dependencies=[Depends(require_json)],
        responses=errors(OpenAIError),
        servers=[{"url": config.root_path}] if config.root_path else None,
    )
    metrics = Metrics(runtime)
    observers = [log_turn, Traces(otlp_provider(), runtime.model.name).record] if config.traces else [log_turn]
    runner = TurnRunner(runtime, metrics, config, observers)
    app.state.limits, app.state.metrics = config.limits, metrics
    app.router.route_class = BodyRoute
    for part in _PARTS:
        part.add_routes(app, runner)
    docs.add_routes(app)
    app.add_middleware(Intake, limits=config.limits, metrics=metrics)
    app.add_middleware(Access, keys=keys, config=config)
    install_error_handlers(app)
    if config.allow_origin:
        exposed = ["Retry-After", "X-Request-Id"]
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.allow_origin,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=exposed,
        )
    app.add_middleware(RequestCounter, metrics=metrics)
    app.add_middleware(RootPath, root_path=config.root_path)  # the last one added is the first to see a request
    return app
