"""What the messages of a conversation stand in: its tools, and what else its chat template is told."""

import json
from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from slipstream import fields
from slipstream.chat.tools import NO_TOOLS, ToolUse
from slipstream.errors import InvalidRequestError

_DEEPEST = 64
_RESERVED = ("messages", "tools", "add_generation_prompt", "bos_token", "eos_token")


@dataclass(frozen=True, slots=True)
class Setting:
    """Tools and `template_kwargs`, JSON values by the names that a chat template has for them (`enable_thinking`).

    Raises `InvalidRequestError` for names whose values come from elsewhere.
    """

    tools: ToolUse = NO_TOOLS
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in _RESERVED:
            if name in self.template_kwargs:
                advice = f" has {name!r}, which the template gets from elsewhere: leave it out"
                raise InvalidRequestError(fields.TEMPLATE_KWARGS, advice, param=fields.TEMPLATE_KWARG.at(name))
        try:
            json.dumps(self.template_kwargs, allow_nan=False, ensure_ascii=False).encode()
            shallow = not _is_deeper(self.template_kwargs, _DEEPEST)
        except (ValueError, RecursionError):
            shallow = False
        if not shallow:
            raise InvalidRequestError(fields.TEMPLATE_KWARGS, f" must be valid JSON, nested at most {_DEEPEST} deep")

    def in_session(self, session: "Setting") -> "Setting":
        """The same with what a session has, unless it brings its own."""
        kwargs = self.template_kwargs or session.template_kwargs
        return Setting(self.tools.in_session(session.tools.tools), kwargs)

    def known_to(self, names: Container[str]) -> "Setting":
        """The same without values that a template has no name for, so that they make no difference."""
        kwargs = {name: value for name, value in self.template_kwargs.items() if name in names}
        return replace(self, template_kwargs=kwargs)

    def canonical(self) -> str:
        """A text that is equal for settings that read the same in a prompt."""
        return self.tools.canonical() + json.dumps(self.template_kwargs, sort_keys=True)


def _is_deeper(value: Any, depth: int) -> bool:
    """Whether JSON is nested deeper than that."""
    if not isinstance(value, dict | list):
        return False
    return depth == 0 or any(
        _is_deeper(each, depth - 1) for each in (value.values() if isinstance(value, dict) else value)
    )


NO_SETTING = Setting()


SWITCHES = ("enable_thinking", "thinking")
"""What templates call the variable that says whether to reason."""


def reasoning_kwargs(effort: str | None, *, enabled: bool | None = None) -> dict[str, Any]:
    """How templates are told how hard to reason, or whether to at all, each by the names that it knows.

    `effort` is OpenAI's `reasoning_effort`, "none" of which switches reasoning off.
    """
    kwargs: dict[str, Any] = {} if effort in (None, "none") else {"reasoning_effort": effort}
    if enabled is None and effort is not None:
        enabled = effort != "none"
    return kwargs if enabled is None else kwargs | dict.fromkeys(SWITCHES, enabled)
