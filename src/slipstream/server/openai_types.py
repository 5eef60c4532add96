"""What OpenAI's endpoints answer with, as far as this server fills it in.

The official package has all of it, and takes a second to import; tests hold these to its types.
"""

from typing import Any, Literal

from pydantic import BaseModel

from slipstream.server.extension import TurnReport

FinishReason = Literal["stop", "length", "tool_calls"]


class PromptTokensDetails(BaseModel):
    """Of a prompt's tokens."""

    cached_tokens: int
    """Whose KV was there already."""


class Usage(BaseModel):
    """What a response cost, in tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Function(BaseModel):
    """The function of a call, or in a stream a piece of it."""

    name: str | None = None
    arguments: str
    """JSON."""


class ToolCall(BaseModel):
    """A call, or in a stream a piece of one, which has the call's `index`."""

    index: int | None = None
    id: str | None = None
    type: Literal["function"] | None = None
    function: Function


class ChatAnswer(BaseModel):
    """An answer, or in a stream a piece of one."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    """What a model that reasons thought first, in the field that other servers use for it."""
    tool_calls: list[ToolCall] | None = None


class TopLogprob(BaseModel):
    """A token and how likely it was."""

    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob):
    """A token of the answer, and the likeliest at its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Of an answer, or of a piece of one."""

    content: list[ChatLogprob]
    refusal: None = None


class ChatChoice(BaseModel):
    """One answer: whole in `message`, or a piece of it in `delta`."""

    index: int
    message: ChatAnswer | None = None
    delta: ChatAnswer | None = None
    finish_reason: FinishReason | None = None
    logprobs: ChatLogprobs | None = None


class Completion(BaseModel):
    """A response, or a piece of a streamed one; a response and the last piece say what the turn cost."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: Usage | None = None
    slipstream: TurnReport | None = None


class ChatCompletion(Completion):
    """Of a conversation."""

    object: Literal["chat.completion", "chat.completion.chunk"]
    choices: list[ChatChoice]


class TextLogprobs(BaseModel):
    """Log-probabilities of a plain completion, in columns."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(BaseModel):
    """One continuation of a plain prompt, or a piece of it; its reason is null until the last."""

    index: int
    text: str
    finish_reason: Literal["stop", "length"] | None
    logprobs: TextLogprobs | None


class TextCompletion(Completion):
    """Of a plain prompt."""

    object: Literal["text_completion"]
    choices: list[TextChoice]


class Model(BaseModel):
    """A served model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    max_model_len: int
    """Tokens that prompt and answer may have together."""


class Conversation(BaseModel):
    """A conversation of the Responses API, which is a session here."""

    id: str
    object: Literal["conversation"] = "conversation"
    created_at: int
    metadata: dict[str, Any] = {}


class DeletedConversation(BaseModel):
    """What is left of one."""

    id: str
    object: Literal["conversation.deleted"] = "conversation.deleted"
    deleted: Literal[True] = True
