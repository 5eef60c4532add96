"""Messages as OpenAI's clients send them, and what they mean."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator

from slipstream.chat import Message, ToolCall
from slipstream.server.custom_tools import custom_arguments
from slipstream.server.errors import missing, not_read, unreadable


def _as_parts(content: object) -> object:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class ContentPart(BaseModel):
    """A part of a message's content."""

    type: str
    text: str | None = None
    refusal: str | None = None


class CalledFunction(BaseModel):
    """What a tool call calls; `arguments` is JSON text."""

    name: str
    arguments: str


class CalledCustomTool(BaseModel):
    """The same of a tool whose `input` is text."""

    name: str
    input: str


class MessageToolCall(BaseModel):
    """A call in an assistant's message."""

    id: str
    type: Literal["function", "custom"] = "function"
    function: CalledFunction | None = None
    custom: CalledCustomTool | None = None


class ChatMessage(BaseModel):
    """A message of a conversation; fields that aren't known are ignored.

    Servers and their clients have two names for the reasoning of an earlier answer, which few chat templates want.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[list[ContentPart] | None, BeforeValidator(_as_parts)] = None
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: str | None = None
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


def chat_messages(messages: Sequence[ChatMessage]) -> tuple[Message, ...]:
    """The messages in no protocol's terms. Several parts of text are joined by line ends.

    Raises `InvalidRequestError` naming the field.
    """
    return tuple(_message(message, f"messages[{index}]") for index, message in enumerate(messages))


def _message(message: ChatMessage, param: str) -> Message:
    if message.content is None and message.role != "assistant":
        raise missing(f"{param}.content")
    if message.tool_call_id is None and message.role == "tool":
        raise missing(f"{param}.tool_call_id")
    parts = enumerate(message.content or ())
    in_result = message.role == "tool"
    text = "\n".join(_text(part, f"{param}.content[{index}]", in_result=in_result) for index, part in parts)
    if message.role == "assistant":
        # Without its name: some clients add the agent's to an answer that had none, and it's the same answer.
        calls = enumerate(message.tool_calls or ())
        return Message(
            "assistant",
            text,
            tool_calls=tuple(_call(call, f"{param}.tool_calls[{index}]") for index, call in calls),
            reasoning=message.reasoning_content or message.reasoning or "",
        )
    role = "system" if message.role == "developer" else message.role
    return Message(role, text, tool_call_id=message.tool_call_id, name=message.name)


def _call(call: MessageToolCall, param: str) -> ToolCall:
    if call.type == "function" and call.function is not None:
        return ToolCall(call.id, call.function.name, call.function.arguments)
    if call.type == "function" or call.custom is None:
        raise missing(f"{param}.{call.type}")
    return ToolCall(call.id, call.custom.name, custom_arguments(call.custom.input))


def _text(part: ContentPart, param: str, *, in_result: bool) -> str:
    if part.type not in ("text", "refusal"):
        if in_result:  # the client keeps it in its history, so a refusal would end the conversation for ever
            return not_read(part.type)
        raise unreadable(param, part.type)
    text = part.text if part.type == "text" else part.refusal
    if text is None:
        raise missing(f"{param}.{part.type}")
    return text
