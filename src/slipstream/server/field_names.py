"""What each protocol calls the fields of a turn. A field that its table lacks goes by its name in Python."""

from collections.abc import Mapping

from slipstream import fields
from slipstream.config import FLAGS

COMPLETIONS = FLAGS | {
    fields.TOOL_MODE: "tool_choice",
    fields.ALLOWED_TOOLS: "tool_choice",
    fields.TEMPLATE_KWARGS: "chat_template_kwargs",
    fields.TEMPLATE_KWARG: "chat_template_kwargs.{}",
    fields.CHOICES: "n",
}
CHAT = COMPLETIONS | {
    fields.PROMPT: "messages",
    fields.TOOL_NAME: "tools[{}].function.name",
    fields.TOOL_PARAMETERS: "tools[{}].function.parameters",
    fields.TOOL_TEXT: "tools[{}].custom.format.grammar.definition",
    fields.TOOL_CALL_NAME: "tool_calls[{}].function.name",
    fields.TOOL_CALL_ARGUMENTS: "tool_calls[{}].function.arguments",
    fields.RESPONSE_SCHEMA: "response_format.json_schema.schema",
    "logprobs": "top_logprobs",
}
RESPONSES = COMPLETIONS | {
    fields.PROMPT: "input",
    fields.MESSAGES: "input",
    fields.TOOL_TEXT: "tools[{}].format.definition",
    fields.RESPONSE_SCHEMA: "text.format.schema",
    fields.SESSION_ID: "conversation",
    fields.MAX_TOKENS: "max_output_tokens",
}
CONVERSATIONS = RESPONSES | {fields.PROMPT: "items", fields.MESSAGES: "items", fields.SESSION_ID: "conversation_id"}
ANTHROPIC = COMPLETIONS | {
    fields.PROMPT: "messages",
    fields.TOOL_PARAMETERS: "tools[{}].input_schema",
    fields.RESPONSE_SCHEMA: "output_config.format.schema",
    "stop": "stop_sequences",
}

_BY_PATH = {
    "/v1/completions": COMPLETIONS,
    "/v1/responses": RESPONSES,
    "/v1/conversations": CONVERSATIONS,
    "/v1/messages": ANTHROPIC,
    "/tokenize": CHAT | {fields.PROMPT: "content"},
}


def names_at(path: str) -> Mapping[str, str]:
    """The names that the protocol spoken at a path has; sessions have those of chat completions."""
    return next((names for prefix, names in _BY_PATH.items() if path.startswith(prefix)), CHAT)
