"""Chat templates that came with a model from anywhere: rendered in a sandbox, since they may loop or gobble memory."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from slipstream.chat.template import ChatTemplate
from slipstream.errors import InvalidRequestError, ModelError
from slipstream.fields import MESSAGES, SANDBOX_MEMORY, SANDBOX_SECONDS
from slipstream.sandbox import Allowance, Sandbox, SandboxDiedError, SandboxError
from slipstream.tokenizer.provenance import Traced

_KNOWN = frozenset({"872be49dbb638044ad01b60388f48d469ff2980e5f0dccdc22ec907db54d0788"})
"""SHA-256 of the templates that this project ships models with, and has read: SmolLM2's."""

_RUN = re.compile(rb"(.)\1*", re.DOTALL)


def template_of(source: str, variables: Mapping[str, str], allowance: Allowance | None = None) -> "Template":
    """A model's chat template: rendered here if it's a known one, else in a sandbox, with an allowance for each time.

    Raises `ModelError` if it does not compile, or takes too much to.
    """
    known = hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest() in _KNOWN
    return ChatTemplate(source, variables) if known else ForeignTemplate(source, variables, allowance)


class ForeignTemplate:
    """A chat template whose code runs in a process with limits of time and memory; as `ChatTemplate` else."""

    def __init__(self, source: str, variables: Mapping[str, str], allowance: Allowance | None = None) -> None:
        self.sandbox = Sandbox("slipstream.chat.foreign:Rendering", source, dict(variables), allowance=allowance)
        try:
            names, self.shown = self.sandbox.call("facts")
        except SandboxDiedError as error:
            self.close()
            message = f"the model's chat template can't be compiled and tried: {error}"
            raise ModelError(message) from error
        except SandboxError as error:
            self.close()
            raise ModelError(str(error)) from error
        self.variables = frozenset(names)
        """What it can be told, by name."""

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> Traced:
        """As `ChatTemplate.render`; one that takes too much refuses the messages, too."""
        try:
            return _traced(*self.sandbox.call("render", list(messages), tools, kwargs))
        except SandboxDiedError as error:
            complaint = f"the model's chat template can't render these messages: {error} ("
            limits = complaint, SANDBOX_SECONDS, ", ", SANDBOX_MEMORY, ")"
            raise InvalidRequestError(*limits, param=MESSAGES, code="invalid_messages") from error
        except SandboxError as error:
            raise InvalidRequestError(str(error), param=MESSAGES, code="invalid_messages") from error

    def close(self) -> None:
        """End the process."""
        self.sandbox.close()


Template = ChatTemplate | ForeignTemplate
"""What a chat template is to others."""


def _traced(text: str, runs: Sequence[tuple[int, int]]) -> Traced:
    """A text with the mask that comes as runs of equal values."""
    mask = b"".join(bytes((value,)) * count for value, count in runs)
    if len(mask) != len(text):
        raise SandboxError("the chat template's sandbox answers nonsense")
    return Traced(text, mask)


class Rendering:
    """What runs in the sandbox. The template is compiled by the first call, under the limits of a call."""

    def __init__(self, source: str, variables: Mapping[str, str]) -> None:
        self._given = source, variables

    @cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate(*self._given)

    def facts(self) -> tuple[list[str], str]:
        """The names of its variables, and what it shows of itself."""
        return sorted(self._template.variables), self._template.shown

    def render(self, *arguments: Any) -> tuple[str, list[tuple[int, int]]]:
        """The text, and its mask as values, each with how many characters in a row have it."""
        text = self._template.render(*arguments)
        return str.__add__("", text), [(run[0][0], len(run[0])) for run in _RUN.finditer(text.mask)]
