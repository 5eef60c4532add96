"""Tools that a model may call, and which of them it should."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

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
                param = f"tools[{index}].function.name"
                raise InvalidRequestError(f"two tools are called {name!r}: rename one", param=param)
        unknown = sorted((self.allowed or frozenset()) - set(names))
        if unknown:
            raise InvalidRequestError(
                f"tool_choice names {', '.join(unknown)}, but tools has {', '.join(names) or 'none'}",
                param="tool_choice",
                code="invalid_value",
            )
        if self.mode == "required" and not self.callable:
            raise InvalidRequestError("tool_choice asks for a call, but there is no tool to call", param="tool_choice")

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
