"""What the messages of a conversation stand in: its tools, and what else its chat template is told."""

import json
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from slipstream import fields
from slipstream.errors import InvalidRequestError

_DEEPEST = 64
_RESERVED = ("messages", "tools", "add_generation_prompt", "bos_token", "eos_token")

Schema = Mapping[str, Any]


INPUT = "input"
"""The one parameter of a tool that takes text."""


@dataclass(frozen=True, slots=True)
class TextGrammar:
    """What a text must fit: a grammar, or nothing."""

    syntax: Literal["lark", "regex", "text"] = "text"
    definition: str = ""


@dataclass(frozen=True, slots=True)
class Tool:
    """A function as its caller describes it; `parameters` is a JSON Schema of an object.

    If it is `strict`, a schema that a grammar can't hold is refused; otherwise a call is checked once it's there.
    """

    name: str
    description: str = ""
    parameters: Schema = field(default_factory=dict)
    strict: bool = False
    deferred: bool = False
    """Whether it's described where a message brings it up, and not in front of all messages."""
    text: TextGrammar | None = None
    """What its only parameter must fit, where arguments are JSON, if it takes text; None if it takes an object."""
    place: int | str | None = field(default=None, compare=False, repr=False)
    """Where its request has it, for errors to name, if it isn't where it stands among the tools."""

    @classmethod
    def of_text(cls, name: str, description: str = "", text: TextGrammar | None = None) -> "Tool":
        """A tool that takes text, which to the model is a function of one parameter."""
        text = text or TextGrammar()
        parameter = {"type": "string"}
        if text.syntax != "text":
            parameter["description"] = f"Must fit this {text.syntax} grammar:\n{text.definition}"
        properties = {INPUT: parameter}
        schema = {"type": "object", "properties": properties, "required": [INPUT], "additionalProperties": False}
        return cls(name, description, schema, text=text)

    def as_dict(self) -> dict[str, Any]:
        """The form that chat templates and models know."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


def place_of(tools: Sequence[Tool], index: int) -> int | str:
    """Where the request has one of its tools."""
    place = tools[index].place if index < len(tools) else None
    return index if place is None else place


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
        names: dict[str, int] = {}
        for index, tool in enumerate(self.tools):
            if names.setdefault(tool.name, index) != index:
                raise InvalidRequestError(
                    f"two tools are named {tool.name!r}: rename one",
                    param=fields.TOOL_NAME.at(place_of(self.tools, index)),
                )
        if not names:
            return  # a session may have them
        unknown = sorted((self.allowed or frozenset()) - names.keys())
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

    @property
    def described(self) -> tuple[Tool, ...]:
        """The tools that stand in front of all messages."""
        return tuple(tool for tool in self.tools if not tool.deferred)

    def canonical(self) -> str:
        """A text that is equal for tools that read the same in a prompt."""
        return json.dumps([tool.as_dict() for tool in self.described], sort_keys=True)


NO_TOOLS = ToolUse()


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
