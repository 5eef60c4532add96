"""What is served, and the metrics."""

import asyncio
import threading
from typing import Any

import httpx
import pytest
from anyio.to_thread import current_default_thread_limiter
from fastapi import FastAPI
from openai import OpenAI

from slipstream import Engine
from slipstream.config import EngineConfig, ServerConfig
from slipstream.models import Model
from slipstream.server.app import create_app
from slipstream.server.keys import KeyRing
from slipstream.server.openapi import DescribedApp
from tests.server.process import MODEL, Server
from tests.short_model import TOKEN_BYTES, room_for
from tests.waiting import HANG

PARTS = ("queue", "prefill", "decode")


def test_health(http: httpx.Client) -> None:
    health = http.get("/health").json()
    assert health.pop("memory")["resident"] > 0
    assert health == {"status": "ok", "exact": True, "kv_tokens": http.get("/v1/models").json()["data"][0]["kv_tokens"]}


def test_memory_is_what_the_system_says(server: Server, http: httpx.Client) -> None:
    server.wait_until_idle()
    memory, metrics = http.get("/health").json()["memory"], server.metrics()
    assert memory["model"] + memory["kv"] + memory["other"] == memory["resident"]
    assert memory["resident"] == pytest.approx(metrics["process_resident_memory_bytes"], rel=0.1)
    held = metrics["slipstream_kv_capacity_tokens"] - metrics["slipstream_kv_free_tokens"]
    assert held * TOKEN_BYTES <= memory["kv"] <= metrics["slipstream_kv_capacity_tokens"] * TOKEN_BYTES
    assert memory["kv"] == metrics["slipstream_memory_bytes kv"]


def test_models(client: OpenAI, http: httpx.Client) -> None:
    (model,) = client.models.list()
    assert model.id == MODEL
    assert model == client.models.retrieve(MODEL)
    missing = http.get("/v1/models/a/b")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"


def test_metrics_add_up(server: Server, client: OpenAI) -> None:
    before = server.wait_until_idle()
    answer = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Metrics?"}], max_tokens=5, extra_body={"ignore_eos": True}
    )
    server.wait_for(lambda metrics: metrics["slipstream_idle_tokens_total"] > before["slipstream_idle_tokens_total"])
    after = server.wait_for(lambda metrics: metrics["slipstream_kv_sequences running"] == 0)
    grown = {name: value - before.get(name, 0) for name, value in after.items()}
    report = answer.model_extra["slipstream"] if answer.model_extra else {}
    for name in ("prompt_tokens", "reused_tokens", "delta_tokens", "completion_tokens", "forward_passes"):
        assert grown[f"slipstream_{name}_total"] == report[name]
    assert grown["slipstream_choices_total length"] == 1
    assert grown["slipstream_http_requests_total POST /v1/chat/completions 200"] == 1
    assert grown["slipstream_prompt_renders_total first"] == 1
    assert grown["slipstream_time_to_first_token_seconds_count"] == 1
    assert grown["slipstream_decode_seconds_sum"] > 0
    assert grown["slipstream_engine_steps_total"] >= 1
    assert 0 < grown["slipstream_engine_infer_seconds_total"] <= grown["slipstream_engine_busy_seconds_total"]
    assert 0 <= after["slipstream_kv_free_tokens"] < after["slipstream_kv_capacity_tokens"]
    assert after["slipstream_kv_sequences running"] == 0
    assert after["slipstream_kv_sequences retained"] > 0
    assert after["process_resident_memory_bytes"] > 0


def test_metrics_have_vllm_s_names_too(server: Server, client: OpenAI) -> None:
    """As vLLM's dashboards and routers read them: https://docs.vllm.ai/en/stable/usage/metrics.html."""
    before = server.wait_until_idle()
    message = {"role": "user", "content": "Which names do dashboards read?"}
    answer = client.chat.completions.create(
        model=MODEL, messages=[message], max_tokens=5, extra_body={"ignore_eos": True, "response_cache": False}
    )
    after = server.wait_until_idle()
    labels = f"0 {MODEL}"
    grown = {name: value - before.get(name, 0) for name, value in after.items()}
    report = answer.model_extra["slipstream"] if answer.model_extra else {}
    for name, expected in {
        "prompt_tokens_total": report["prompt_tokens"],
        "prefix_cache_queries_total": report["prompt_tokens"],
        "prefix_cache_hits_total": report["reused_tokens"],
        "generation_tokens_total": report["completion_tokens"],
        "spec_decode_num_draft_tokens_total": report["drafted_tokens"],
        "spec_decode_num_accepted_tokens_total": report["accepted_tokens"],
        "request_prompt_tokens_sum": report["prompt_tokens"],
        "request_generation_tokens_sum": report["completion_tokens"],
    }.items():
        assert grown[f"vllm:{name} {labels}"] == expected, name
    assert grown[f"vllm:request_success_total 0 length {MODEL}"] == 1
    for name in ("time_to_first_token", "e2e_request_latency", *(f"request_{part}_time" for part in PARTS)):
        assert grown[f"vllm:{name}_seconds_count {labels}"] == 1
        assert after[f"vllm:{name}_seconds_bucket 0 +Inf {MODEL}"] >= 1
    assert after[f"vllm:num_requests_running {labels}"] == after[f"vllm:num_requests_waiting {labels}"] == 0
    assert 0 <= after[f"vllm:kv_cache_usage_perc {labels}"] < 1
    assert after[f"vllm:num_preemptions_total {labels}"] == after["slipstream_preemptions_total"]


def test_openmetrics_for_those_who_ask(http: httpx.Client) -> None:
    response = http.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    assert response.text.endswith("# EOF\n")


def test_schema_of_the_api(http: httpx.Client) -> None:
    api = http.get("/openapi.json").json()
    operations = {
        f"{method} {path}": each for path, methods in api["paths"].items() for method, each in methods.items()
    }
    assert len({each["operationId"] for each in operations.values()}) == len(operations)
    for name, operation in operations.items():
        assert "422" not in operation["responses"], f"{name} never has it"
        protocol = "Anthropic" if "/v1/messages" in name else "OpenAI"
        schema = operation["responses"]["4XX"]["content"]["application/json"]["schema"]
        assert schema["$ref"].endswith(f"/{protocol}Error")
        if name.startswith("post"):
            assert operation["requestBody"]["required"], "without a body, clients send no content type"
    assert "text/event-stream" in operations["post /v1/chat/completions"]["responses"]["200"]["content"]
    assert {"bearer": []} in api["security"]


def test_schema_of_the_api_takes_a_named_tool_for_one_thing(http: httpx.Client) -> None:
    schemas = http.get("/openapi.json").json()["components"]["schemas"]
    for name in ("ChatRequest", "ResponseRequest"):
        word, *objects = schemas[name]["properties"]["tool_choice"]["anyOf"][0]["oneOf"]
        assert word == {"type": "string", "enum": ["none", "auto", "required"]}, "which no object is"
        assert len(objects) == 2


def test_metrics_do_not_wait_for_requests_that_wait(model: Model) -> None:
    """Though these have all the threads that there are for them."""
    free = threading.Event()

    async def ask(app: FastAPI) -> str:
        limiter, loop = current_default_thread_limiter(), asyncio.get_running_loop()
        for _ in range(int(limiter.available_tokens)):
            await limiter.acquire_on_behalf_of(object())
        waiting = [loop.run_in_executor(None, free.wait) for _ in range(100)]
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as http:
            try:
                return (await asyncio.wait_for(http.get("/metrics"), timeout=HANG)).text
            finally:
                free.set()
                await asyncio.gather(*waiting)

    with Engine(model, EngineConfig.model_validate({"kv_memory": room_for(1000)})) as engine:
        assert "slipstream_engine_steps_total" in asyncio.run(ask(create_app(engine, ServerConfig(), KeyRing())))


@pytest.mark.parametrize("path", ["/openapi.json", "/docs"])
def test_nobody_waits_while_the_schema_is_made(model: Model, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made_on: list[threading.Thread] = []
    make = DescribedApp.openapi

    def recorded(app: DescribedApp) -> dict[str, Any]:
        made_on.append(threading.current_thread())
        return make(app)

    async def ask(app: FastAPI) -> int:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as http:
            return (await http.get(path)).status_code

    monkeypatch.setattr(DescribedApp, "openapi", recorded)
    with Engine(model, EngineConfig.model_validate({"kv_memory": room_for(1000)})) as engine:
        assert asyncio.run(ask(create_app(engine, ServerConfig(), KeyRing()))) == 200
    assert made_on
    assert threading.main_thread() not in made_on, "which the event loop runs on"


@pytest.mark.parametrize(
    ("path", "methods"), [("/v1/sessions/s", "GET, PATCH, DELETE"), ("/v1/messages", "POST"), ("/", "GET, HEAD")]
)
def test_another_method_is_told_which_there_are(http: httpx.Client, path: str, methods: str) -> None:
    response = http.request("OPTIONS", path)
    assert response.status_code == 405
    assert response.headers["allow"] == methods
    assert f"use {methods}" in response.json()["error"]["message"]
