"""Messages as OpenAI's clients send them, and what they mean."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator

from slipstream.chat import Message, ToolCall
from slipstream.server.custom_tools import custom_arguments
from slipstream.server.errors import given, not_read, unreadable


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


def parts_text(parts: Sequence[ContentPart], param: str, readable: Sequence[str], *, in_result: bool) -> str:
    """The texts of the parts of `readable` types, joined by line ends; raises `InvalidRequestError` for others.

    In a call's result a text stands for what can't be read. The client keeps it in its history, so a refusal would end
    the conversation for ever.
    """
    texts = []
    for index, part in enumerate(parts):
        if part.type in readable:
            field = "refusal" if part.type == "refusal" else "text"
            texts.append(given(getattr(part, field), f"{param}[{index}].{field}"))
        elif in_result:
            texts.append(not_read(part.type))
        else:
            raise unreadable(f"{param}[{index}]", part.type, readable[0])
    return "\n".join(texts)


def _message(message: ChatMessage, param: str) -> Message:
    if message.role != "assistant":
        given(message.content, f"{param}.content")
    if message.role == "tool":
        given(message.tool_call_id, f"{param}.tool_call_id")
    text = parts_text(message.content or (), f"{param}.content", ("text", "refusal"), in_result=message.role == "tool")
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
    if call.type == "custom":
        custom = given(call.custom, f"{param}.custom")
        return ToolCall(call.id, custom.name, custom_arguments(custom.input))
    function = given(call.function, f"{param}.function")
    return ToolCall(call.id, function.name, function.arguments)
