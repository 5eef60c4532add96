"""Exact repeats of deterministic requests are answered from memory, and nothing else is."""

import copy
import json
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from slipstream.engine import EngineRequest, Output, SamplingParams
from slipstream.engine.response_cache import ResponseCache
from tests.server.process import Server, running_server
from tests.server.test_errors import function

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
SYSTEM = {"role": "system", "content": "You answer questions about the sea."}
GREEDY = {"temperature": 0, "max_tokens": 12}
SEEDED = {"temperature": 0.9, "seed": 5, "max_tokens": 12}
TOOL = function(
    "set_sail", parameters={"type": "object", "properties": {"sail": {"enum": ["main", "jib"]}}, "required": ["sail"]}
)


def asking(question: str, **params: Any) -> dict[str, Any]:
    return {"messages": [SYSTEM, {"role": "user", "content": question}], **GREEDY, **params}


def post(http: httpx.Client, body: dict[str, Any], path: str = CHAT) -> Any:
    response = http.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def use(response: Any) -> str:
    """What the cache had to do with it."""
    return str(response["slipstream"]["response_cache"])


def stream(http: httpx.Client, body: dict[str, Any]) -> list[Any]:
    text = http.post(CHAT, json=body | {"stream": True}).text
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]


def without_ids(choices: list[Any]) -> list[Any]:
    """Choices without the ids of their calls, which are made up for each response."""
    copies = copy.deepcopy(choices)
    for choice in copies:
        for call in choice["message"].get("tool_calls", ()):
            del call["id"]
    return copies


@pytest.mark.parametrize(
    "params",
    [
        GREEDY,
        SEEDED,
        {**GREEDY, "logprobs": True, "top_logprobs": 3},
        {**SEEDED, "n": 3},
        {**GREEDY, "max_tokens": 40, "stop": [" the", "."]},
        {**GREEDY, "max_tokens": 60, "tools": [TOOL], "tool_choice": "required"},
        {**GREEDY, "max_tokens": 60, "response_format": {"type": "json_object"}},
    ],
    ids=["greedy", "seeded", "logprobs", "three choices", "stop strings", "calls", "json"],
)
def test_a_repeat_is_the_same_answer_and_costs_nothing(http: httpx.Client, params: dict[str, Any]) -> None:
    body = asking(f"Which fish is that? {sorted(params)}", **params)
    first, second = post(http, body), post(http, body)
    assert (use(first), use(second)) == ("miss", "hit")
    assert without_ids(second["choices"]) == without_ids(first["choices"])
    assert second["usage"]["completion_tokens"] == first["usage"]["completion_tokens"] > 0
    assert second["usage"]["prompt_tokens"] == first["usage"]["prompt_tokens"]
    cost = second["slipstream"]
    assert (cost["forward_passes"], cost["delta_tokens"], cost["drafted_tokens"]) == (0, 0, 0)
    assert (cost["prefill_ms"], cost["decode_ms"]) == (0, 0)
    fresh = post(http, body | {"slipstream": {"reuse": False}})
    assert use(fresh) == "off"
    assert without_ids(fresh["choices"]) == without_ids(first["choices"])


@pytest.mark.parametrize("params", [GREEDY, {**SEEDED, "n": 2}], ids=["greedy", "seeded"])
def test_a_streamed_hit_is_the_whole(http: httpx.Client, params: dict[str, Any]) -> None:
    body = asking(f"What is a wave? {sorted(params)}", **params)
    whole, chunks = post(http, body), stream(http, body)
    assert chunks[-1]["slipstream"]["response_cache"] == "hit"
    texts = {choice["index"]: "" for choice in whole["choices"]}
    reasons = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["delta"].get("content") or ""
            reasons[choice["index"]] = choice["finish_reason"]
    assert list(texts.values()) == [choice["message"]["content"] for choice in whole["choices"]]
    assert list(reasons.values()) == [choice["finish_reason"] for choice in whole["choices"]]


def test_what_was_streamed_is_known_as_a_whole(http: httpx.Client) -> None:
    body = asking("What is an ebb?")
    chunks, whole = stream(http, body), post(http, body)
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    assert use(whole) == "hit"
    assert whole["choices"][0]["message"]["content"] == text


def test_plain_completions_are_known_too(http: httpx.Client) -> None:
    body = {"prompt": "The deepest sea is", **GREEDY, "logprobs": 2}
    first, second = post(http, body, COMPLETIONS), post(http, body, COMPLETIONS)
    assert (use(first), use(second)) == ("miss", "hit")
    assert second["choices"] == first["choices"]


def test_what_is_left_to_chance_is_never_known(http: httpx.Client) -> None:
    body = asking("What is a tide?", temperature=1.5)
    answers = [post(http, body) for _ in range(3)]
    assert [use(answer) for answer in answers] == ["off"] * 3
    assert len({answer["choices"][0]["message"]["content"] for answer in answers}) > 1


BASE = asking("Where do whales sleep?", **SEEDED)
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


def schema(definition: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": definition}}}


@pytest.mark.parametrize(
    "changed",
    [
        {"temperature": 0.8},
        {"temperature": 0},
        {"seed": 6},
        {"max_tokens": 11},
        {"top_p": 0.9},
        {"top_k": 7},
        {"min_p": 0.1},
        {"stop": ["x"]},
        {"presence_penalty": 0.5},
        {"frequency_penalty": 0.5},
        {"repetition_penalty": 1.2},
        {"logit_bias": {"100": 5}},
        {"ignore_eos": True},
        {"stop_token_ids": [100]},
        {"logprobs": True},
        {"logprobs": True, "top_logprobs": 1},
        {"tools": [TOOL]},
        {"tools": [TOOL], "tool_choice": "none"},
        {"tools": [TOOL], "tool_choice": "required"},
        {"tools": [function("other")], "tool_choice": "required"},
        schema(SCHEMA),
        schema({**SCHEMA, "properties": {"a": {"type": "boolean"}}}),
        {"messages": [{"role": "user", "content": "Where do whales sleep?"}]},
        {"messages": [*BASE["messages"], {"role": "assistant", "content": ""}, {"role": "user", "content": "?"}]},
    ],
    ids=lambda changed: json.dumps(changed)[:60],
)
def test_whatever_is_changed_makes_another_request(http: httpx.Client, changed: dict[str, Any]) -> None:
    post(http, BASE)
    assert use(post(http, BASE)) == "hit"
    assert use(post(http, BASE | changed)) == "miss"
    assert use(post(http, BASE)) == "hit"


@pytest.mark.parametrize(
    "irrelevant",
    [
        {"slipstream": {"speculation": False, "jump_forward": False}},
        {"top_p": 1.0},
        {"top_p": None},
        {"stream": True},
        {"user": "somebody"},
        {"stop": []},
        {"tool_choice": "none"},
    ],
    ids=json.dumps,
)
def test_what_changes_no_answer_is_no_other_request(http: httpx.Client, irrelevant: dict[str, Any]) -> None:
    body = asking("Do squids dream?", **SEEDED)
    post(http, body)
    if irrelevant.get("stream"):
        assert use(stream(http, body)[-1]) == "hit"
    else:
        assert use(post(http, body | irrelevant)) == "hit"


def test_a_seed_does_not_matter_to_a_greedy_answer(http: httpx.Client) -> None:
    post(http, asking("Is kelp a plant?", seed=1))
    assert use(post(http, asking("Is kelp a plant?", seed=2))) == "hit"


@pytest.mark.parametrize("switch", ["response_cache", "reuse"])
def test_a_request_can_have_itself_computed(http: httpx.Client, switch: str) -> None:
    body = asking(f"Who sails? {switch}")
    post(http, body)
    computed = post(http, body | {"slipstream": {switch: False}})
    assert use(computed) == "off"
    assert computed["slipstream"]["forward_passes"] > 0
    assert use(post(http, body)) == "hit"


def test_what_was_computed_on_request_is_not_kept(http: httpx.Client) -> None:
    body = asking("Who rows?")
    post(http, body | {"slipstream": {"response_cache": False}})
    assert use(post(http, body)) == "miss"


def test_an_answer_that_was_broken_off_is_not_kept(server: Server, http: httpx.Client) -> None:
    body = asking("Who swims?", max_tokens=400, ignore_eos=True)
    with http.stream("POST", CHAT, json=body | {"stream": True}) as response:
        events = response.iter_lines()
        next(events)
    server.wait_until_idle()
    assert use(post(http, body | {"max_tokens": 400, "stop": ["\n"]})) == "miss"
    assert use(post(http, body)) == "miss"


def test_hits_are_counted(server: Server, http: httpx.Client) -> None:
    before = server.metrics()
    body = asking("How salty is it?")
    for _ in range(3):
        post(http, body)
    after = server.metrics()

    def grown(name: str) -> float:
        return after[f"slipstream_{name}"] - before[f"slipstream_{name}"]

    assert grown("response_cache_misses_total") == 1
    assert grown("response_cache_hits_total") == 2
    assert grown("response_cache_bytes") > 500
    assert grown("choices_total length") + grown("choices_total stop") == 3


@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_a_conversation_goes_on_after_a_hit(http: httpx.Client, params: dict[str, Any]) -> None:
    body = asking(f"How deep is it? {params['temperature']}", **params)
    post(http, body)
    hit = post(http, body)
    assert use(hit) == "hit"
    messages = [*body["messages"], hit["choices"][0]["message"], {"role": "user", "content": "And how cold?"}]
    second = post(http, body | {"messages": messages})
    assert second["slipstream"]["session_id"] == hit["slipstream"]["session_id"]
    assert second["slipstream"]["reused_tokens"] >= hit["usage"]["total_tokens"]
    fresh = post(http, body | {"messages": messages, "slipstream": {"reuse": False}})
    assert second["choices"] == fresh["choices"]


def test_a_session_goes_on_after_a_hit(http: httpx.Client) -> None:
    post(http, asking("What is a reef?"))
    hit = post(http, asking("What is a reef?", slipstream={"session_id": "reef"}))
    assert use(hit) == "hit"
    answer = {"role": "assistant", "content": hit["choices"][0]["message"]["content"]}
    asked = [{"role": "user", "content": "Who lives there?"}]
    second = post(http, {"messages": asked, **GREEDY, "slipstream": {"session_id": "reef"}})
    whole = [*asking("What is a reef?")["messages"], answer, *asked]
    assert http.get("/v1/sessions/reef").json()["messages"][:-1] == whole
    fresh = post(http, {"messages": whole, **GREEDY, "slipstream": {"reuse": False}})
    assert second["choices"] == fresh["choices"]


def test_a_server_can_do_without() -> None:
    with running_server("--no-response-cache") as server, server.http() as http:
        answers = [post(http, asking("Who sails?")) for _ in range(2)]
        assert [use(answer) for answer in answers] == ["off", "off"]
        assert answers[1]["slipstream"]["forward_passes"] > 0


# The cache itself


def request(*prompt: int, tenant: str = "", **params: Any) -> EngineRequest:
    params = {"temperature": 0.0} | params
    return EngineRequest(prompt=np.array(prompt, np.int32), params=SamplingParams(**params), tenant=tenant)


def put(cache: ResponseCache, asked: EngineRequest, *texts: str, reason: Any = "stop") -> list[Output]:
    """Let a request be answered in pieces; returns what its client got."""
    key, seen = cache.key(asked), list[Output]()
    assert key is not None
    sink = cache.recording(key, seen.append)
    for text in texts[:-1]:
        sink(Output(text=text, token_ids=(1,)))
    sink(Output(text=texts[-1], token_ids=(2,), finish_reason=reason))
    return seen


def found(cache: ResponseCache, asked: EngineRequest) -> str | None:
    key = cache.key(asked)
    assert key is not None
    output = cache.get(key, len(asked.prompt))
    return None if output is None else output.text


@pytest.fixture
def cache() -> Iterator[ResponseCache]:
    """With room for three short answers."""
    return ResponseCache(1800, "model")


def test_pieces_are_passed_on_and_kept_as_one(cache: ResponseCache) -> None:
    seen = put(cache, request(1, 2), "a", "b", "c")
    assert [output.text for output in seen] == ["a", "b", "c"]
    key = cache.key(request(1, 2))
    assert key is not None
    whole = cache.get(key, 2)
    assert whole is not None
    assert (whole.text, whole.token_ids, whole.finish_reason) == ("abc", (1, 1, 2), "stop")
    assert whole.counters is not None
    assert (whole.counters.prompt_tokens, whole.counters.delta_tokens) == (2, 0)
    assert whole.counters.completion_tokens == 3


def test_the_least_recently_used_goes_first(cache: ResponseCache) -> None:
    for prompt in (1, 2, 3):
        put(cache, request(prompt), "x")
    assert found(cache, request(1)) == "x"
    put(cache, request(4), "x")
    assert [found(cache, request(prompt)) for prompt in (1, 2, 3, 4)] == ["x", None, "x", "x"]
    assert len(cache) == 3
    assert (cache.hits, cache.misses) == (4, 1)


def test_memory_stays_bounded(cache: ResponseCache) -> None:
    for prompt in range(100):
        put(cache, request(prompt), "x" * (prompt * 7 % 90))
        assert cache.total_bytes <= 1800
    assert len(cache) >= 2
    kept = len(cache)
    put(cache, request(1000), "x" * 5000)
    assert found(cache, request(1000)) is None
    assert len(cache) == kept


@pytest.mark.parametrize("reason", ["cancelled", "error"])
def test_only_finished_answers_are_kept(cache: ResponseCache, reason: str) -> None:
    put(cache, request(1), "x", reason=reason)
    assert found(cache, request(1)) is None
    assert cache.total_bytes == 0


def test_tenants_never_share(cache: ResponseCache) -> None:
    put(cache, request(1, tenant="a"), "x")
    assert found(cache, request(1, tenant="b")) is None
    assert found(cache, request(1)) is None
    assert found(cache, request(1, tenant="a")) == "x"


def test_models_never_share() -> None:
    assert ResponseCache(1800, "a").key(request(1)) != ResponseCache(1800, "b").key(request(1))


def test_neither_do_prompts_that_look_alike(cache: ResponseCache) -> None:
    prompts = [request(1, 2), request(12), request(1, 2, 0), request(0, 1, 2), request(2, 1), request(258)]
    assert len({cache.key(prompt) for prompt in prompts}) == len(prompts)


def test_the_order_of_biases_does_not_matter(cache: ResponseCache) -> None:
    one, other = request(1, logit_bias={1: 1.0, 2: 2.0}), request(1, logit_bias={2: 2.0, 1: 1.0})
    assert cache.key(one) == cache.key(other) != cache.key(request(1, logit_bias={1: 2.0, 2: 1.0}))


@pytest.mark.parametrize("max_bytes", [0, 1800])
def test_what_has_no_key(max_bytes: int) -> None:
    cache = ResponseCache(max_bytes, "model")
    assert cache.key(request(1, temperature=1.0)) is None
    assert (cache.key(request(1, temperature=1.0, seed=1)) is None) == (max_bytes == 0)
