"""Tools that a model may call, and which of them it should."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from slipstream import fields
from slipstream.errors import InvalidRequestError

Schema = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Tool:
    """A function as its caller describes it; `parameters` is a JSON Schema of an object."""

    name: str
    description: str = ""
    parameters: Schema = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The form that chat templates and models know."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools of a request, and how they may be used.

    `mode` "none" forbids calls, "auto" leaves them to the model, "required" makes the answer a call. `allowed` are the
    names that may be called, all of `tools` by default. With `parallel` an answer may hold several calls.
    """

    tools: tuple[Tool, ...] = ()
    mode: Literal["none", "auto", "required"] = "auto"
    allowed: frozenset[str] | None = None
    parallel: bool = True

    def __post_init__(self) -> None:
        names = [tool.name for tool in self.tools]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise InvalidRequestError(f"two tools are named {name!r}: rename one", param=fields.TOOL_NAME.at(index))
        if not names:
            return  # a session may have them
        unknown = sorted((self.allowed or frozenset()) - set(names))
        if unknown:
            raise InvalidRequestError(
                fields.ALLOWED_TOOLS, f" names {', '.join(unknown)}, but ", fields.TOOLS, f" has {', '.join(names)}"
            )
        if self.mode == "required" and not self.callable:
            raise InvalidRequestError(fields.TOOL_MODE, " asks for a call, but there is no tool to call")

    def in_session(self, tools: tuple[Tool, ...]) -> "ToolUse":
        """The same with the tools of a session, unless it brings its own.

        Raises `InvalidRequestError` if a call is asked for and there is nothing to call.
        """
        use = self if self.tools else replace(self, tools=tools)
        if not use.tools and (use.mode == "required" or use.allowed):
            advice = " asks for a call, but there are no tools: send them as "
            raise InvalidRequestError(fields.TOOL_MODE, advice, fields.TOOLS, code="unsupported_value")
        return use

    @property
    def callable(self) -> tuple[Tool, ...]:
        """The tools that the answer may call."""
        if self.mode == "none":
            return ()
        return tuple(tool for tool in self.tools if self.allowed is None or tool.name in self.allowed)

    def canonical(self) -> str:
        """A text that is equal for tools that read the same in a prompt."""
        return json.dumps([tool.as_dict() for tool in self.tools], sort_keys=True)


NO_TOOLS = ToolUse()
