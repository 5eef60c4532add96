"""A model's own chat template, rendered in a sandbox with what templates on model hubs expect."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Environment, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from slipstream.errors import InvalidRequestError, ModelError


class ChatTemplate:
    """Renders messages to the text that a model was trained on.

    `variables` are offered to the template, as `bos_token` and `eos_token`. Raises `ModelError` if the source does not
    compile.
    """

    def __init__(self, source: str, variables: Mapping[str, str]) -> None:
        self.source = source
        try:
            self._template = _environment().from_string(source, globals=dict(variables))
        except TemplateError as error:
            raise ModelError(f"the model's chat template does not compile: {error}") from error

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None) -> str:
        """The text of `messages` and the beginning of the assistant's next one.

        Raises `InvalidRequestError` with the template's own words where it refuses the messages.
        """
        try:
            return self._template.render(messages=messages, tools=tools, add_generation_prompt=True)
        except Exception as error:  # it's foreign code, and may raise whatever it likes
            raise InvalidRequestError(
                f"the model's chat template refuses these messages: {error}", param="messages", code="invalid_messages"
            ) from error


def _environment() -> Environment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().astimezone().strftime(form)
    return environment


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's words for training; here its body is rendered as it stands."""

    tags = {"generation"}  # noqa: RUF012 - jinja's interface

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: jinja's own filter escapes for HTML, which models were not trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)
