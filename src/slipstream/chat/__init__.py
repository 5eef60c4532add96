"""Chat: from messages to exact token ids, and from generated tokens back to messages."""

from slipstream.chat.conversations import Conversations, Prompt
from slipstream.chat.ledger import Ledger
from slipstream.chat.messages import Message, ToolCall
from slipstream.chat.template import ChatTemplate

__all__ = ["ChatTemplate", "Conversations", "Ledger", "Message", "Prompt", "ToolCall"]
