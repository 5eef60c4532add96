"""The ASGI application, put together."""

from importlib.metadata import version

from fastapi import FastAPI

from slipstream.config import ServerConfig
from slipstream.runtime import Runtime
from slipstream.server import (
    anthropic_messages,
    openai_chat,
    openai_completions,
    openai_responses,
    sessions,
    status,
    tokens,
)
from slipstream.server.errors import install_error_handlers
from slipstream.server.gate import Gate, RequestCounter
from slipstream.server.intake import Intake
from slipstream.server.metrics import Metrics
from slipstream.server.turn import TurnRunner


def create_app(runtime: Runtime, config: ServerConfig) -> FastAPI:
    """An application that serves a runtime; whoever runs it closes that."""
    app = FastAPI(title="Slipstream", version=version("slipstream"), redoc_url=None)
    metrics = Metrics(runtime)
    runner = TurnRunner(runtime, metrics, config)
    app.state.limits, app.state.metrics = config.limits, metrics
    app.include_router(openai_chat.router(runner))
    app.include_router(openai_completions.router(runner))
    app.include_router(openai_responses.conversations(runtime.sessions))
    app.include_router(openai_responses.router(runner))
    app.include_router(anthropic_messages.router(runner))
    app.include_router(sessions.router(runtime.sessions))
    app.include_router(tokens.router(runtime))
    app.include_router(status.router(runtime, runner.names, metrics, step_timeout=config.step_timeout))
    app.add_middleware(Intake, limits=config.limits, metrics=metrics)
    app.add_middleware(Gate, api_key=config.api_key)
    install_error_handlers(app)
    app.add_middleware(RequestCounter, metrics=metrics)  # the last one added is the first to see a request
    return app
