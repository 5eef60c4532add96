"""What a tool-call format has to say: how tools enter the prompt, what an answer looks like, how it is read."""

import secrets
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from slipstream.chat.formats.reading import Reading, Steps
from slipstream.chat.messages import Message
from slipstream.chat.tools import ToolUse

Mark = Callable[[str], str]
"""Gives the Lark expression of a text that the vocabulary may hold as one special token."""


class ToolFormat(Protocol):
    """One family's way to call tools."""

    name: str

    def recognises(self, template: str) -> bool:
        """Whether a model with this chat template was trained on the format."""
        ...

    def messages(self, messages: Sequence[Message], use: ToolUse) -> list[dict[str, Any]]:
        """The messages as the template takes them."""
        ...

    def template_tools(self, use: ToolUse) -> list[dict[str, Any]] | None:
        """The tools as the template takes them; None where they are part of the messages."""
        ...

    def grammar(self, use: ToolUse, mark: Mark) -> str:
        """The Lark rules of an answer, from `start`: with mode "auto" text or calls, with "required" calls alone."""
        ...

    def read(self, reading: Reading, use: ToolUse) -> Steps[None]:
        """Read an answer's text and calls, telling at once what no further text can change.

        How the text was cut into pieces makes no difference to what they add up to.
        """
        ...

    def new_call_id(self) -> str:
        """An id that no other call has, in the form that the template wants."""
        ...


class NativeTools:
    """The part that formats share whose templates take tools and calls as they are."""

    def messages(self, messages: Sequence[Message], use: ToolUse) -> list[dict[str, Any]]:  # noqa: ARG002
        """Calls with parsed arguments, as templates expect them."""
        return [message_dict(message) for message in messages]

    def template_tools(self, use: ToolUse) -> list[dict[str, Any]] | None:
        """All tools of the request, or None if it has none."""
        return [tool.as_dict() for tool in use.tools] or None

    def new_call_id(self) -> str:
        """An id such as OpenAI's."""
        return f"call_{secrets.token_hex(12)}"


def message_dict(message: Message) -> dict[str, Any]:
    """A message the way that templates which know tools take it."""
    result: dict[str, Any] = {"role": message.role, "content": message.text}
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
