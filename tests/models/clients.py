"""The official clients of three protocols, each having a conversation with tools in its own terms."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from anthropic import Anthropic
from openai import OpenAI

from tests.server.process import Server
from tests.waiting import HANG

Mode = Literal["required", "auto"]
"""Whether an answer has to call."""


class Tool(NamedTuple):
    """A function that models may call."""

    name: str
    description: str
    schema: dict[str, Any]


class Call(NamedTuple):
    """A call as the client got it."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Answer:
    """What a turn came to, and what the server reports on it."""

    reasoning: str
    text: str
    calls: tuple[Call, ...]
    ended: str
    report: dict[str, Any]
    as_message: list[Any]
    """What the client puts into the conversation for it."""

    @property
    def said(self) -> tuple[Any, ...]:
        """All of it, without what differs between two answers to the same request."""
        return self.reasoning, self.text, [(call.name, call.arguments) for call in self.calls], self.ended


class Client(Protocol):
    """One protocol's client."""

    def question(self, text: str) -> list[Any]:
        """A user's message."""
        ...

    def results(self, calls: Sequence[Call], texts: Sequence[str]) -> list[Any]:
        """Messages with the results of calls."""
        ...

    def request(self, messages: list[Any], mode: Mode, *, limit: int, **options: Any) -> tuple[str, dict[str, Any]]:
        """The path and the body of the request that `ask` sends."""
        ...

    def ask(self, messages: list[Any], mode: Mode, *, stream: bool, limit: int, **options: Any) -> Answer:
        """The next answer, of `limit` tokens at most; `options` are the request's `slipstream` object."""
        ...


class Chat:
    """Chat completions of OpenAI's client. `bias` is added to these tokens' logits."""

    def __init__(self, server: Server, model: str, system: str, tools: Sequence[Tool], bias: Sequence[int]) -> None:
        self._client = server.openai()
        self._system = [{"role": "system", "content": system}]
        functions = [{"name": tool.name, "description": tool.description, "parameters": tool.schema} for tool in tools]
        self._params: dict[str, Any] = {
            "model": model,
            "temperature": 0,
            "parallel_tool_calls": False,
            "tools": [{"type": "function", "function": function} for function in functions],
            "logit_bias": {str(token): 100 for token in bias},
        }

    def question(self, text: str) -> list[Any]:
        return [{"role": "user", "content": text}]

    def results(self, calls: Sequence[Call], texts: Sequence[str]) -> list[Any]:
        return [
            {"role": "tool", "tool_call_id": call.id, "content": text} for call, text in zip(calls, texts, strict=True)
        ]

    def request(self, messages: list[Any], mode: Mode, *, limit: int, **options: Any) -> tuple[str, dict[str, Any]]:
        params = self._params | {"messages": self._system + messages, "tool_choice": mode, "max_tokens": limit}
        return "/v1/chat/completions", params | {"slipstream": options}

    def ask(self, messages: list[Any], mode: Mode, *, stream: bool, limit: int, **options: Any) -> Answer:
        _, params = self.request(messages, mode, limit=limit, **options)
        body = {"slipstream": params.pop("slipstream")}
        if stream:
            with self._client.chat.completions.stream(**params, extra_body=body) as events:
                chunks = [event.chunk for event in events if event.type == "chunk"]
                completion: Any = events.current_completion_snapshot
                report: dict[str, Any] = chunks[-1].slipstream  # type: ignore[attr-defined]
                deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
                reasoning = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
        else:
            completion = self._client.chat.completions.create(**params, extra_body=body)
            report = completion.slipstream
            reasoning = getattr(completion.choices[0].message, "reasoning_content", None) or ""
        (choice,) = completion.choices
        message = choice.message
        calls = [Call(call.id, call.function.name, call.function.arguments) for call in message.tool_calls or []]
        sent_back = [message.model_dump(exclude_none=True)]
        return Answer(reasoning, message.content or "", tuple(calls), choice.finish_reason, report, sent_back)


class Responses:
    """Responses of OpenAI's client, which keeps the conversation itself."""

    def __init__(self, server: Server, model: str, system: str, tools: Sequence[Tool], bias: Sequence[int]) -> None:
        self._client: OpenAI = server.openai()
        self._params: dict[str, Any] = {
            "model": model,
            "temperature": 0,
            "store": False,
            "parallel_tool_calls": False,
            "instructions": system,
            "tools": [
                {"type": "function", "name": tool.name, "description": tool.description, "parameters": tool.schema}
                for tool in tools
            ],
        }

    def question(self, text: str) -> list[Any]:
        return [{"role": "user", "content": text}]

    def results(self, calls: Sequence[Call], texts: Sequence[str]) -> list[Any]:
        return [
            {"type": "function_call_output", "call_id": call.id, "output": text}
            for call, text in zip(calls, texts, strict=True)
        ]

    def request(self, messages: list[Any], mode: Mode, *, limit: int, **options: Any) -> tuple[str, dict[str, Any]]:
        params = self._params | {"input": messages, "tool_choice": mode, "max_output_tokens": limit}
        return "/v1/responses", params | {"slipstream": options}

    def ask(self, messages: list[Any], mode: Mode, *, stream: bool, limit: int, **options: Any) -> Answer:
        _, params = self.request(messages, mode, limit=limit, **options)
        body = {"slipstream": params.pop("slipstream")}
        response: Any = self._client.responses.create(**params, stream=stream, extra_body=body)
        if stream:
            response = [event for event in response if event.type in ("response.completed", "response.incomplete")][-1]
            response = response.response
        calls = [item for item in response.output if item.type == "function_call"]
        made = [Call(call.call_id, call.name, call.arguments) for call in calls]
        sent_back = [item.model_dump(exclude_none=True) for item in response.output]
        thoughts = [part.text for item in response.output if item.type == "reasoning" for part in item.content]
        text, report = response.output_text, response.slipstream
        return Answer("".join(thoughts), text, tuple(made), response.status, report, sent_back)


class Messages:
    """Messages of Anthropic's client."""

    def __init__(self, server: Server, model: str, system: str, tools: Sequence[Tool], bias: Sequence[int]) -> None:
        self._client = Anthropic(base_url=server.url, api_key=server.api_key, max_retries=0, timeout=HANG)
        self._params: dict[str, Any] = {
            "model": model,
            "system": system,
            "tools": [
                {"name": tool.name, "description": tool.description, "input_schema": tool.schema} for tool in tools
            ],
        }

    def question(self, text: str) -> list[Any]:
        return [{"role": "user", "content": text}]

    def results(self, calls: Sequence[Call], texts: Sequence[str]) -> list[Any]:
        blocks = [
            {"type": "tool_result", "tool_use_id": call.id, "content": text}
            for call, text in zip(calls, texts, strict=True)
        ]
        return [{"role": "user", "content": blocks}]

    def request(self, messages: list[Any], mode: Mode, *, limit: int, **options: Any) -> tuple[str, dict[str, Any]]:
        choice = {"type": {"required": "any", "auto": "auto"}[mode], "disable_parallel_tool_use": True}
        params = self._params | {"messages": messages, "tool_choice": choice, "max_tokens": limit}
        return "/v1/messages", params | {"temperature": 0, "slipstream": options}

    def ask(self, messages: list[Any], mode: Mode, *, stream: bool, limit: int, **options: Any) -> Answer:
        _, params = self.request(messages, mode, limit=limit, **options)
        body = {name: params.pop(name) for name in ("temperature", "slipstream")}
        if stream:
            with self._client.messages.stream(**params, extra_body=body) as events:
                (report,) = [event.slipstream for event in events if event.type == "message_delta"]
                message: Any = events.get_final_message()
        else:
            message = self._client.messages.create(**params, extra_body=body)
            report = message.slipstream
        text = "".join(block.text for block in message.content if block.type == "text")
        calls = [block for block in message.content if block.type == "tool_use"]
        made = [Call(call.id, call.name, json.dumps(call.input)) for call in calls]
        content = [block.model_dump(exclude_none=True) for block in message.content]
        sent_back = [{"role": "assistant", "content": content}]
        reasoning = "".join(block.thinking for block in message.content if block.type == "thinking")
        return Answer(reasoning, text, tuple(made), message.stop_reason, report, sent_back)


CLIENTS: dict[str, type[Chat] | type[Responses] | type[Messages]] = {
    "chat": Chat,
    "responses": Responses,
    "messages": Messages,
}
