"""Custom tools of OpenAI's protocols, whose input is text. To the model each is a function of one parameter."""

import json
import re
from typing import Any

from pydantic_core import from_json

from slipstream.chat import Tool
from slipstream.chat.schema.losses import UnsupportedError
from slipstream.chat.setting import INPUT, TextGrammar
from slipstream.chat.text_grammar import text_rules
from slipstream.errors import InvalidRequestError

_OPENING = re.compile(rf'\s*\{{\s*"{INPUT}"\s*:\s*"')
_CERTAIN = re.compile(
    r'(?:[^"\\]|\\[^u]|\\u(?![dD][89a-fA-F])[0-9a-fA-F]{4}|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})*+'
)
"""The text of a JSON string as far as no more text can change it: an escape comes whole, and with its other half."""


def custom_tool(name: str, description: str | None, text: TextGrammar, param: str) -> Tool:
    """A custom tool in no protocol's terms; raises `InvalidRequestError` if the field `param` has no grammar."""
    try:
        text_rules(text, "")
    except UnsupportedError:
        pass  # which the answer's warnings say
    except ValueError as error:
        raise InvalidRequestError(f"{param} is no {text.syntax} grammar: {error}", param=param) from None
    return Tool.of_text(name, description or "", text)


def custom_arguments(text: str) -> str:
    """The arguments of a call, by its input."""
    return json.dumps({INPUT: text}, ensure_ascii=False)


def input_of(arguments: str) -> str:
    """The input in the arguments of a call, as far as they go."""
    text = members_of(arguments).get(INPUT, "")
    return text if isinstance(text, str) else ""


def members_of(arguments: str) -> dict[str, Any]:
    """The members of an object in JSON, as far as it goes; none if it is no object."""
    try:
        value = from_json(arguments or "{}", allow_partial="trailing-strings")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


class InputReader:
    """Reads the input of a call from its arguments as they come, at a cost that grows with their length alone."""

    def __init__(self) -> None:
        self._rest = ""
        self._begun = self._ended = False

    def feed(self, piece: str) -> str:
        """What more of the input a piece of the arguments makes certain."""
        self._rest += piece
        if not self._begun and (opening := _OPENING.match(self._rest)):
            self._begun, self._rest = True, self._rest[opening.end() :]
        if not self._begun or self._ended:
            return ""
        certain = _CERTAIN.match(self._rest)
        assert certain is not None  # it may be empty
        self._rest = self._rest[certain.end() :]
        self._ended = self._rest.startswith('"')
        return str(json.loads(f'"{certain[0]}"', strict=False))
