"""What a tool-call format has to say: how tools enter the prompt, what an answer looks like, how it is read."""

import secrets
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from slipstream.chat.messages import Message
from slipstream.chat.reading import Reading, Steps
from slipstream.chat.reasoning import Reasoning
from slipstream.chat.schema import closed_parameters, json_rule
from slipstream.chat.tags import Tag, text_until
from slipstream.chat.tools import Tool, ToolUse


class ToolFormat(Protocol):
    """One family's way to call tools, in one vocabulary."""

    name: str

    @property
    def ends(self) -> tuple[Tag, ...]:
        """What ends a text inside of a call, beside the quotation mark of JSON, and what ends calls."""
        ...

    @property
    def reasoning(self) -> Reasoning | None:
        """Where answers and reasoning are of one piece; None where the template's reasoning goes with the format."""
        ...

    def messages(self, messages: Sequence[Message], use: ToolUse) -> list[dict[str, Any]]:
        """The messages as the template takes them."""
        ...

    def template_tools(self, use: ToolUse) -> list[dict[str, Any]] | None:
        """The tools as the template takes them; None where they are part of the messages."""
        ...

    def grammar(self, use: ToolUse) -> str:
        """The Lark rules of an answer, from `start`: with mode "auto" text or calls, with "required" calls alone."""
        ...

    def said(self, rule: str) -> str:
        """The Lark expression of an answer that is no call and fits a rule."""
        ...

    def read(self, reading: Reading, use: ToolUse) -> Steps[None]:
        """Read an answer's text and calls, telling at once what no further text can change.

        How the text was cut into pieces makes no difference to what they add up to.
        """
        ...

    def read_text(self, reading: Reading) -> Steps[None]:
        """Read an answer that can't call."""
        ...

    def new_call_id(self) -> str:
        """An id that no other call has, in the form that the template wants."""
        ...


class NativeTools:
    """The part that formats share whose templates take tools and calls as they are."""

    ends: tuple[Tag, ...] = ()
    reasoning: Reasoning | None = None

    def messages(self, messages: Sequence[Message], use: ToolUse) -> list[dict[str, Any]]:  # noqa: ARG002
        """Calls with parsed arguments, as templates expect them."""
        return [message_dict(message) for message in messages]

    def template_tools(self, use: ToolUse) -> list[dict[str, Any]] | None:
        """All tools of the request, or None if it has none."""
        return [tool.as_dict() for tool in use.tools] or None

    def said(self, rule: str) -> str:
        """Just that."""
        return rule

    def read_text(self, reading: Reading) -> Steps[None]:
        """All of it is text."""
        return reading.say_all()

    def new_call_id(self) -> str:
        """An id such as OpenAI's."""
        return f"call_{secrets.token_hex(12)}"


def start_rules(use: ToolUse, begin: Tag, calls: str) -> str:
    """Lark rules for `start`: `begin` and `calls`, or with mode "auto" also free text, alone or before them.

    `calls` is the Lark expression of what follows `begin`.
    """
    if use.mode == "required":
        return f"start: {begin.expression} {calls}"
    return f"start: TEXT | head {calls}\n{text_until(begin, 'head')}\nTEXT: /(.|\\n)*/"


def listed_calls(use: ToolUse) -> str:
    """The Lark expression of calls between brackets."""
    return f'"[" call (", " call){MORE} "]"' if use.parallel else '"[" call "]"'


def call_rules(tools: Sequence[Tool], rules_of: Callable[[str, Tool], Sequence[str]]) -> list[str]:
    """Lark rules for `call`, a call of any of the tools; `rules_of` gives those for a rule's name and its tool."""
    names = [f"call_{index}" for index in range(len(tools))]
    rules = (rule for name, tool in zip(names, tools, strict=True) for rule in rules_of(name, tool))
    return ["call: " + " | ".join(names), *rules]


def separated(rule: str, parts: Sequence[tuple[str, bool]], separator: str) -> list[str]:
    """Lark rules for `rule`: the parts in their order, each with whether it must be there, and a separator between."""
    rules = []
    # After each part a separator if another follows: a rule for what may come from each place on.
    for index in range(len(parts), -1, -1):
        for first in (True, False):
            at = rule if first and not index else f"{rule}_{'first' if first else 'then'}_{index}"
            if index == len(parts):
                rules.append(f'{at}: ""')
                continue
            part, required = parts[index]
            taken = f"{'' if first else separator} {part} {rule}_then_{index + 1}"
            left_out = "" if required else f" | {rule}_{'first' if first else 'then'}_{index + 1}"
            rules.append(f"{at}: {taken}{left_out}")
    return rules


def with_json_arguments(rule: str, tool: Tool, before: str, after: str = "") -> list[str]:
    """Lark rules for a call whose arguments are JSON that fits the tool's schema, between two expressions."""
    arguments = json_rule(closed_parameters(tool.parameters))
    return [f"{rule}: {before} {rule}_arguments {after}", f"{rule}_arguments: {arguments}"]


def message_dict(message: Message) -> dict[str, Any]:
    """A message the way that templates which know tools take it."""
    result: dict[str, Any] = {"role": message.role, "content": message.text, **thoughts(message)}
    if message.tool_calls:
        result["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.parsed_arguments()}}
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        result["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        result["name"] = message.name
    return result


def thoughts(message: Message) -> dict[str, Any]:
    """The reasoning of a message, under the names that templates have for it."""
    return dict.fromkeys(("reasoning_content", "reasoning"), message.reasoning) if message.reasoning else {}


MORE = "{0,15}"
"""How many calls may follow the first: a model that has lost its way calls without end."""
