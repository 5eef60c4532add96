"""The ASGI application, put together."""

from importlib.metadata import version

from fastapi import FastAPI

from slipstream.config import ServerConfig
from slipstream.embedded import Engine
from slipstream.server import (
    anthropic_messages,
    openai_chat,
    openai_completions,
    openai_conversations,
    openai_responses,
    sessions,
    status,
    tokens,
)
from slipstream.server.errors import install_error_handlers
from slipstream.server.gate import Gate, RequestCounter
from slipstream.server.metrics import Metrics
from slipstream.server.turn import TurnRunner


def create_app(engine: Engine, config: ServerConfig) -> FastAPI:
    """An application that serves the engine; whoever runs it closes the engine."""
    app = FastAPI(title="Slipstream", version=version("slipstream"), redoc_url=None)
    metrics = Metrics(engine)
    runner = TurnRunner(engine, metrics, config)
    app.include_router(openai_chat.router(runner))
    app.include_router(openai_completions.router(runner))
    app.include_router(openai_conversations.router(engine.sessions))
    app.include_router(openai_responses.router(runner))
    app.include_router(anthropic_messages.router(runner))
    app.include_router(sessions.router(engine.sessions))
    app.include_router(tokens.router(engine))
    app.include_router(status.router(engine, metrics))
    app.add_middleware(Gate, api_key=config.api_key)
    install_error_handlers(app)
    app.add_middleware(RequestCounter, metrics=metrics)  # the last one added is the first to see a request
    return app
