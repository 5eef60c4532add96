"""A turn costs its new messages, as the official client sees it."""

import asyncio
import json
from typing import Any

import httpx
from openai import OpenAI

from tests.server.process import MODEL, Server, assert_reused

SYSTEM = {"role": "system", "content": "You are a terse assistant who answers in one short sentence. " * 4}
KEYS = {
    "session_id",
    "prompt_tokens",
    "reused_tokens",
    "delta_tokens",
    "completion_tokens",
    "forced_tokens",
    "drafted_tokens",
    "accepted_tokens",
    "forward_passes",
    "queue_ms",
    "prefill_ms",
    "decode_ms",
    "response_cache",
    "exact",
    "warnings",
    "reuse_break",
}


def ask(client: OpenAI, messages: list[Any], **params: Any) -> Any:
    defaults = {"model": MODEL, "temperature": 0, "max_tokens": 12}
    return client.chat.completions.create(messages=messages, **(defaults | params))


def token_count(http: httpx.Client, text: str) -> int:
    return http.post("/tokenize", json={"content": text}).json()["count"]


def test_second_turn_computes_only_what_is_new(client: OpenAI, http: httpx.Client) -> None:
    asked = [SYSTEM, {"role": "user", "content": "Name a planet."}]
    first = ask(client, asked)
    answer = first.choices[0].message
    second = ask(client, [*asked, answer.model_dump(), {"role": "user", "content": "And another, please."}])

    assert first.usage.total_tokens == first.usage.prompt_tokens + first.usage.completion_tokens
    report = second.slipstream
    assert second.usage.prompt_tokens_details.cached_tokens == report["reused_tokens"]
    assert_reused(second, first)
    glue = "<|im_end|>\n<|im_start|>user\nAnd another, please.<|im_end|>\n<|im_start|>assistant\n"
    assert report["prompt_tokens"] == first.usage.total_tokens + token_count(http, glue)
    assert report["session_id"] == first.slipstream["session_id"]


def test_reserialised_tool_call_costs_nothing(client: OpenAI, http: httpx.Client) -> None:
    def history(arguments: str) -> list[dict[str, Any]]:
        function = {"name": "weather", "arguments": arguments}
        call = {"id": "call_1", "type": "function", "function": function}
        return [
            SYSTEM,
            {"role": "user", "content": "What is the weather in Oslo?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": "4 degrees, rain"},
        ]

    arguments = {"city": "Oslo", "units": "metric"}
    first = ask(client, history(json.dumps(arguments)))
    answer = {"role": "assistant", "content": [{"type": "text", "text": first.choices[0].message.content}]}
    later = {"role": "user", "content": "And tomorrow?"}
    second = ask(client, [*history(json.dumps(arguments, indent=3, sort_keys=True)), answer, later])

    assert_reused(second, first)
    glue = "<|im_end|>\n<|im_start|>user\nAnd tomorrow?<|im_end|>\n<|im_start|>assistant\n"
    assert second.usage.prompt_tokens == first.usage.total_tokens + token_count(http, glue)


def test_streamed_answer_is_found_by_the_next_turn(client: OpenAI) -> None:
    asked = [SYSTEM, {"role": "user", "content": "Name a river."}]
    chunks = list(ask(client, asked, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    first = chunks[-1].slipstream
    second = ask(client, [*asked, {"role": "assistant", "content": text}, {"role": "user", "content": "Where?"}])
    assert second.slipstream["reused_tokens"] >= first["prompt_tokens"] + first["completion_tokens"]


def test_without_reuse_the_same_answer_costs_everything(client: OpenAI) -> None:
    messages = [SYSTEM, {"role": "user", "content": "Name a colour and a number."}]
    params = {"temperature": 0.9, "seed": 11}
    afresh = {"slipstream": {"response_cache": False}}
    ask(client, messages, **params)
    warm = ask(client, messages, **params, extra_body=afresh)
    cold = ask(client, messages, **params, extra_body={"slipstream": {"reuse": False}})
    assert cold.choices == warm.choices
    assert warm.usage.prompt_tokens_details.cached_tokens == warm.usage.prompt_tokens - 1
    assert cold.usage.prompt_tokens_details.cached_tokens == 0
    assert cold.slipstream["delta_tokens"] == cold.usage.prompt_tokens


def test_report_has_every_counter(client: OpenAI) -> None:
    body = {"slipstream": {"session_id": "mine", "speculation": False, "jump_forward": False}, "ignore_eos": True}
    report = ask(client, [{"role": "user", "content": "Hello."}], max_tokens=4, extra_body=body).slipstream
    assert set(report) == KEYS
    assert report["session_id"] == "mine"
    assert report["completion_tokens"] == report["forward_passes"] == 4
    assert report["response_cache"] == "miss"
    assert report["queue_ms"] >= 0
    assert report["prefill_ms"] > 0
    assert report["decode_ms"] > 0


def test_choices_differ_by_seed(client: OpenAI) -> None:
    messages = [{"role": "user", "content": "Tell me about the sea."}]
    together = ask(client, messages, temperature=1, seed=5, n=3)
    alone = [ask(client, messages, temperature=1, seed=5 + index) for index in range(3)]
    assert [choice.index for choice in together.choices] == [0, 1, 2]
    assert [choice.message for choice in together.choices] == [one.choices[0].message for one in alone]
    assert len({choice.message.content for choice in together.choices}) == 3
    assert together.usage.prompt_tokens == alone[0].usage.prompt_tokens
    assert together.usage.completion_tokens == sum(one.usage.completion_tokens for one in alone)


def test_developer_means_system(http: httpx.Client) -> None:
    def tokens(role: str) -> list[int]:
        messages = [{"role": role, "content": "Be brief."}, {"role": "user", "content": "Hello!"}]
        return http.post("/tokenize", json={"messages": messages}).json()["tokens"]

    assert tokens("developer") == tokens("system")


def test_eight_streams_at_once_answer_as_each_would_alone(server: Server) -> None:
    questions = [[SYSTEM, {"role": "user", "content": f"Count from {index}."}] for index in range(8)]

    async def stream(client: Any, seed: int, messages: list[Any]) -> str:
        params = {"model": MODEL, "temperature": 1, "seed": seed, "max_tokens": 24, "stream": True}
        chunks = await client.chat.completions.create(messages=messages, **params)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

    async def all_at_once() -> tuple[list[str], list[str]]:
        async with server.async_openai() as client:
            together = await asyncio.gather(*(stream(client, *each) for each in enumerate(questions)))
            return together, [await stream(client, *each) for each in enumerate(questions)]

    together, alone = asyncio.run(all_at_once())
    assert together == alone
    assert len(set(together)) > 1
