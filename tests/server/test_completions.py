"""Completions of plain text, and the tokens they are made of."""

from itertools import chain
from typing import Any

import httpx
import pytest
from openai import OpenAI

from tests.server.process import MODEL


def complete(client: OpenAI, prompt: Any, **params: Any) -> Any:
    defaults = {"model": MODEL, "temperature": 0, "max_tokens": 6}
    return client.completions.create(prompt=prompt, **(defaults | params))


def test_text_and_its_token_ids_give_the_same(client: OpenAI, http: httpx.Client) -> None:
    text = "The capital of France is"
    tokens = http.post("/tokenize", json={"prompt": text}).json()["tokens"]
    by_text, by_tokens = complete(client, text), complete(client, tokens)
    assert by_text.choices == by_tokens.choices
    assert by_text.usage.prompt_tokens == len(tokens)
    assert by_text.slipstream["session_id"] is None


@pytest.mark.parametrize("form", ["texts", "tokens"])
def test_several_prompts(client: OpenAI, http: httpx.Client, form: str) -> None:
    texts: list[Any] = ["Once upon a time", "In the beginning"]
    prompts = texts
    if form == "tokens":
        prompts = [http.post("/tokenize", json={"content": text}).json()["tokens"] for text in texts]
    together = complete(client, prompts, n=2, temperature=1, seed=1)
    assert [choice.index for choice in together.choices] == [0, 1, 2, 3]
    alone = [complete(client, text, temperature=1, seed=seed).choices[0].text for text in texts for seed in (1, 2)]
    assert [choice.text for choice in together.choices] == alone
    assert together.usage.completion_tokens == 24
    assert together.usage.prompt_tokens == sum(complete(client, text).usage.prompt_tokens for text in texts)


def test_stream_equals_the_whole(client: OpenAI) -> None:
    whole = complete(client, "One, two, three,", logprobs=2)
    *others, last = complete(client, "One, two, three,", logprobs=2, stream=True)
    chunks = [*others, last]
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in others] == [None] * len(others)
    assert last.choices[0].finish_reason == "length"
    assert last.slipstream["completion_tokens"] == 6
    for column in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        pieces = [getattr(chunk.choices[0].logprobs, column) for chunk in chunks if chunk.choices[0].logprobs]
        assert list(chain(*pieces)) == getattr(whole.choices[0].logprobs, column)
    assert "".join(whole.choices[0].logprobs.tokens) == whole.choices[0].text


def test_usage_of_a_stream(client: OpenAI) -> None:
    *_, last = complete(client, "Hello", stream=True, stream_options={"include_usage": True})
    assert last.choices == []
    assert last.usage.completion_tokens == last.slipstream["completion_tokens"] == 6


def test_sixteen_tokens_by_default(client: OpenAI) -> None:
    assert client.completions.create(model=MODEL, prompt="A list of words:").usage.completion_tokens <= 16


def test_tokens_and_back(http: httpx.Client) -> None:
    text = "<|im_start|>user\nNaïve 日本 🙂"
    tokens = http.post("/tokenize", json={"content": text}).json()
    assert tokens["count"] == len(tokens["tokens"])
    assert tokens["max_model_len"] > 1000
    back = http.post("/detokenize", json={"tokens": tokens["tokens"]}).json()
    assert back == {"content": text, "prompt": text}


def test_tokens_of_a_conversation_are_those_of_its_prompt(client: OpenAI, http: httpx.Client) -> None:
    messages: Any = [{"role": "user", "content": "How many tokens is this?"}]
    tokens = http.post("/tokenize", json={"messages": messages}).json()
    text = http.post("/detokenize", json={"tokens": tokens["tokens"]}).json()["content"]
    assert text.endswith("<|im_start|>user\nHow many tokens is this?<|im_end|>\n<|im_start|>assistant\n")
    answer = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=1)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == tokens["count"]
