"""A prompt that is too long, in the words by which each protocol's clients notice and recover.

There is no code that all of them know. Claude Code asks for a shorter answer, or compacts the conversation, by regular
expressions over Anthropic's own message, digits without separators; opencode, LiteLLM and LangChain look for pieces of
OpenAI's.
"""

from slipstream.errors import ContextLengthError


def overflow_message(error: ContextLengthError, path: str, explained: str) -> str:
    """The message at a path; `explained` is what it says anywhere, which names the limit and the way out."""
    prompt, wanted, limit = error.prompt, error.wanted, error.limit
    if path.startswith("/v1/messages"):
        if prompt >= limit:
            return f"prompt is too long: {prompt} tokens > {limit - 1} maximum"
        advice = "decrease input length or `max_tokens` and try again"
        return f"input length and `max_tokens` exceed context limit: {prompt} + {wanted} > {limit}, {advice}"
    if path.startswith("/v1/responses"):
        return (
            f"Your input exceeds the context window of this model. Please adjust your input and try again. {explained}"
        )
    if path.startswith(("/v1/chat/", "/v1/completions")):
        asked = f"you requested {prompt + wanted} tokens ({prompt} in the messages, {wanted} in the completion)"
        return (
            f"This model's maximum context length is {limit} tokens. However, {asked}. "
            f"Please reduce the length of the messages or completion. {explained}"
        )
    return explained
