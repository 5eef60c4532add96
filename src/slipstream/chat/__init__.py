"""Chat: from messages to exact token ids, and from generated text back to messages."""

from slipstream.chat.answers import AnswerReader
from slipstream.chat.conversations import Conversations, Part, Prompt
from slipstream.chat.foreign import Template, template_of
from slipstream.chat.messages import Message, ToolCall
from slipstream.chat.reading import AnswerDelta
from slipstream.chat.setting import NO_SETTING, NO_TOOLS, Schema, Setting, Tool, ToolUse
from slipstream.chat.template import ChatTemplate

__all__ = [
    "NO_SETTING",
    "NO_TOOLS",
    "AnswerDelta",
    "AnswerReader",
    "ChatTemplate",
    "Conversations",
    "Message",
    "Part",
    "Prompt",
    "Schema",
    "Setting",
    "Template",
    "Tool",
    "ToolCall",
    "ToolUse",
    "template_of",
]
