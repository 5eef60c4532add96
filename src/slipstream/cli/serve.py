"""`slipstream serve`: the HTTP server."""

from inspect import Parameter, Signature
from typing import Annotated, Any, get_origin

from annotated_types import Ge, Le
from pydantic import ByteSize
from pydantic.fields import FieldInfo
from rich.console import Console
from typer import Option

from slipstream.cli.loading import load_engine
from slipstream.cli.options import Model, readable_errors
from slipstream.config import Config, EngineConfig, LimitsConfig, ServerConfig
from slipstream.lasting import lasting


def serve(**options: Any) -> None:
    """Serve a model to any client that speaks OpenAI's or Anthropic's protocol.

    Point an OpenAI client at http://HOST:PORT/v1, an Anthropic client at http://HOST:PORT. /health tells when it's
    ready, /metrics how it does, /docs what it takes.
    Every option can also be given as an environment variable, named with each option.

    Examples:

      slipstream serve

      slipstream serve --model ./Qwen3-0.6B-Q8_0.gguf --kv-memory 4GiB --port 9000

      slipstream serve --state-dir ~/.local/state/slipstream
    """
    with lasting():
        from slipstream import server  # what this takes to import, other commands need not wait for

    given = {name: value for name, value in options.items() if value is not None}
    parts = {
        part: {name: given.pop(name) for name in kind.model_fields if name in given} for part, kind in _PARTS.items()
    }
    with readable_errors():
        config = ServerConfig.model_validate(given | parts)
        server.run(lambda: load_engine(config.model, config.engine, Console()), config)


def _parameter(name: str, field: FieldInfo, panel: str | None) -> Parameter:
    """The option that sets a field; a bound that is excluded is left to the configuration to check."""
    if name == "model":
        return Parameter(name, Parameter.KEYWORD_ONLY, default=field.default, annotation=Model)
    kind: Any = field.annotation
    default = field.default
    rules: dict[type, Any] = {type(rule): rule for rule in field.metadata}
    if get_origin(kind) is tuple:
        kind, default = list[str], None
    option: Any = Option(
        help=field.description,
        rich_help_panel=panel,
        min=rules[Ge].ge if Ge in rules and kind is not ByteSize else None,
        max=rules[Le].le if Le in rules else None,
        file_okay=not name.endswith("_dir"),
    )
    kind = str if kind is ByteSize else kind
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])


_PARTS: dict[str, type[Config]] = {"engine": EngineConfig, "limits": LimitsConfig}
serve.__signature__ = Signature(  # type: ignore[attr-defined]
    [
        _parameter(name, field, panel)
        for panel, config in ((None, ServerConfig), ("Engine", EngineConfig), ("Limits", LimitsConfig))
        for name, field in config.model_fields.items()
        if name not in _PARTS
    ]
)
