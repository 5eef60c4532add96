"""Token ids of texts and conversations: `POST /tokenize` and `POST /detokenize`, as llama-server and vLLM have them."""

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from slipstream.chat import Setting
from slipstream.errors import InvalidRequestError
from slipstream.server.access import TenantName
from slipstream.server.openai_messages import ChatMessage, chat_messages
from slipstream.server.openai_tools import ToolDefinition, chat_tools, tool_use
from slipstream.server.turn import TurnRunner


class TokenizeRequest(BaseModel):
    """One of `content` and `prompt`, which mean the same, or `messages`, with tools and template variables.

    The answer has the ids that a completion, or a chat completion, of the same would compute. So a text begins with
    the beginning-of-text token if the model wants one; `add_special`, or vLLM's `add_special_tokens`, leaves it out.
    """

    content: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    tools: list[ToolDefinition] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_special: bool = True
    add_special_tokens: bool = True


class Tokens(BaseModel):
    """Token ids, how many they are, and how many prompt and answer may have together."""

    tokens: list[int]
    count: int
    max_model_len: int


class DetokenizeRequest(BaseModel):
    """Token ids, as `/tokenize` gives them."""

    tokens: list[int]


class Text(BaseModel):
    """A text, special tokens included, under both names."""

    content: str
    prompt: str


def add_routes(app: FastAPI, runner: TurnRunner) -> None:
    """Add the routes, answered on other threads than the event loop's."""
    runtime = runner.runtime

    @app.post("/tokenize")
    def tokenize(body: TokenizeRequest, tenant: TenantName) -> Tokens:
        given = [name for name in ("content", "prompt", "messages") if getattr(body, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            message = f"send one of content, prompt and messages; this request has {found}"
            raise InvalidRequestError(message, param=given[1] if given else "content")
        if body.messages is not None:
            setting = Setting(tool_use(chat_tools(body.tools)), body.chat_template_kwargs or {})
            prompt = runtime.conversations.prompt(chat_messages(body.messages), setting, tenant=tenant)
            tokens = list(map(int, prompt.tokens.ids))
        else:
            encode = runtime.encode if body.add_special and body.add_special_tokens else runtime.tokenizer.encode
            tokens = encode(getattr(body, given[0]))
        return Tokens(tokens=tokens, count=len(tokens), max_model_len=runtime.core.limits.max_sequence)

    @app.post("/detokenize")
    def detokenize(body: DetokenizeRequest) -> Text:
        text = runtime.tokenizer.decode(body.tokens, skip_special=False)
        return Text(content=text, prompt=text)
