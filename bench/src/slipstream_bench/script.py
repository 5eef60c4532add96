"""What an agent's client says whatever the server answers: system message, tools, the results of its calls."""

from dataclasses import dataclass
from typing import Any

ToolDefinition = dict[str, Any]
"""As in OpenAI's `tools`."""


@dataclass(frozen=True, slots=True)
class ScriptedTurn:
    """What comes in with a turn, and the tool that its answer has to call."""

    tool: str
    result: str = ""
    """Of the call before."""
    user: str = ""


@dataclass(frozen=True, slots=True)
class Script:
    """One agent's side of a conversation."""

    system: str
    tools: tuple[ToolDefinition, ...]
    turns: tuple[ScriptedTurn, ...]

    def parameters(self, tool: str) -> dict[str, Any]:
        """The JSON Schema of a tool's arguments."""
        functions = (definition["function"] for definition in self.tools)
        parameters: dict[str, Any] = next(f["parameters"] for f in functions if f["name"] == tool)
        return parameters


def tool_definition(name: str, description: str, parameters: dict[str, Any]) -> ToolDefinition:
    """A function as a tool."""
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}
