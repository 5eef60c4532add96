"""What is answered is what the official packages declare, to the letter: their clients let much pass."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from anthropic.types import Message, MessageTokensCount, RawMessageStreamEvent
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.conversations import Conversation, ConversationDeletedResource
from pydantic import TypeAdapter

TOOL = {"type": "object", "properties": {"room": {"enum": ["kitchen", "cellar"]}}, "required": ["room"]}
MESSAGES = [{"role": "user", "content": "It is dark in the cellar."}]
CHAT = {
    "messages": MESSAGES,
    "max_tokens": 30,
    "temperature": 0,
    "tools": [{"type": "function", "function": {"name": "light", "parameters": TOOL}}],
}
CLAUDE = {
    "messages": MESSAGES,
    "max_tokens": 30,
    "temperature": 0,
    "tools": [{"name": "light", "input_schema": TOOL}],
}


def posted(http: httpx.Client, path: str, body: dict[str, Any]) -> Any:
    response = http.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def events(http: httpx.Client, path: str, body: dict[str, Any]) -> Iterator[Any]:
    with http.stream("POST", path, json=body | {"stream": True}) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                yield json.loads(line.removeprefix("data: "))


@pytest.mark.parametrize(
    "extra", [{"tool_choice": "none", "logprobs": True, "top_logprobs": 2}, {"tool_choice": "required"}]
)
def test_chat(http: httpx.Client, extra: dict[str, Any]) -> None:
    body = CHAT | extra
    whole = ChatCompletion.model_validate(posted(http, "/v1/chat/completions", body))
    assert whole.model_extra is not None
    assert set(whole.model_extra) == {"slipstream"}
    for event in events(http, "/v1/chat/completions", body | {"stream_options": {"include_usage": True}}):
        chunk = ChatCompletionChunk.model_validate(event)
        assert set(chunk.model_extra or {}) <= {"slipstream"}
        assert not any(choice.model_extra or choice.delta.model_extra for choice in chunk.choices)


def test_completions(http: httpx.Client) -> None:
    body = {"prompt": "One, two,", "max_tokens": 5, "logprobs": 2, "temperature": 0}
    whole = Completion.model_validate(posted(http, "/v1/completions", body))
    assert set(whole.model_extra or {}) == {"slipstream"}
    for event in events(http, "/v1/completions", body):
        event["choices"] = [
            choice | {"finish_reason": choice["finish_reason"] or "stop"} for choice in event["choices"]
        ]
        assert set(Completion.model_validate(event).model_extra or {}) <= {"slipstream"}


@pytest.mark.parametrize("choice", ["none", "any"])
def test_messages(http: httpx.Client, choice: str) -> None:
    body = CLAUDE | {"tool_choice": {"type": choice}}
    whole = Message.model_validate(posted(http, "/v1/messages", body))
    assert set(whole.model_extra or {}) == {"slipstream"}
    adapter: TypeAdapter[RawMessageStreamEvent] = TypeAdapter(RawMessageStreamEvent)
    for event in events(http, "/v1/messages", body):
        if event["type"] != "ping":
            assert set(adapter.validate_python(event).model_extra or {}) <= {"slipstream"}
    count = posted(http, "/v1/messages/count_tokens", {"messages": MESSAGES})
    assert not MessageTokensCount.model_validate(count).model_extra


def test_models_and_conversations(http: httpx.Client) -> None:
    (model,) = http.get("/v1/models").json()["data"]
    of_others = {
        "type",
        "display_name",
        "created_at",
        "lifecycle",
        "max_input_tokens",
        "max_tokens",
    }  # who ask here too
    assert set(Model.model_validate(model).model_extra or {}) == {"max_model_len", "kv_tokens", *of_others}
    made = Conversation.model_validate(posted(http, "/v1/conversations", {}))
    assert not made.model_extra
    gone = http.delete(f"/v1/conversations/{made.id}").json()
    assert not ConversationDeletedResource.model_validate(gone).model_extra
