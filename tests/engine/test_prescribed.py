"""Answers that are prescribed: by a script that chooses tokens under the real engine, and to other servers."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jsonschema
import pytest

from slipstream import Engine, EngineConfig, Message, SamplingParams, TurnRequest, runtime
from slipstream.models import Model
from slipstream.turns import Completion
from slipstream_bench.conversation import Answer, Conversation
from slipstream_bench.peers.llama_server import LlamaServer
from slipstream_bench.prescribed import prescribed_answer, scripted
from slipstream_bench.workloads import WORKLOADS, Workload
from tests.short_model import room_for

PRESCRIBED = [workload for workload in WORKLOADS.values() if workload.name != "bfcl-multi-turn"]
GREEDY = SamplingParams(temperature=0, max_tokens=256)


@pytest.fixture(scope="module")
def engine(model: Model) -> Iterator[Engine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(runtime.BACKENDS, "openvino", scripted(runtime.BACKENDS["openvino"], prescribed_answer))
        with Engine(model, EngineConfig.model_validate({"kv_memory": room_for(8000)})) as engine:
            yield engine


def conversation(turns: int) -> Iterator[tuple[dict[str, Any], str]]:
    """Requests of an agent and what each must be answered with."""
    script = WORKLOADS["agent-6"].scripts(0, 0)[0]
    talk = Conversation(script, "prescribed")
    for turn in range(turns):
        yield talk.request(turn), talk.prescribed(turn)
        talk.answered(Answer(talk.prescribed(turn)))


def as_turn(body: dict[str, Any]) -> TurnRequest:
    messages = tuple(Message(message["role"], message["content"]) for message in body["messages"])
    schema = body["response_format"]["json_schema"]["schema"]
    return TurnRequest(prompt=messages, params=GREEDY, response_schema=schema, response_cache=False)


def test_the_engine_says_what_is_prescribed_however_it_computes(engine: Engine) -> None:
    drafted = reused = forced = 0
    for body, answer in conversation(6):
        turn = as_turn(body)
        ways = [turn, replace(turn, speculation=False), replace(turn, jump_forward=False), replace(turn, reuse=False)]
        answers: list[Completion] = [engine.answer(way)[0] for way in ways]
        assert [each.text for each in answers] == [answer] * len(ways)
        assert len({each.token_ids for each in answers}) == 1
        counters = answers[0].counters
        drafted, reused = drafted + counters.accepted_tokens, reused + counters.reused_tokens
        forced += counters.forced_tokens
    assert min(drafted, reused, forced) > 0  # or the ways would not have been different


def test_where_the_script_says_nothing_the_model_chooses(engine: Engine) -> None:
    completion = engine.answer(TurnRequest(prompt=(Message("user", "Hello."),), params=replace(GREEDY, max_tokens=5)))[
        0
    ]
    assert len(completion.token_ids) == 5


@pytest.mark.parametrize("workload", PRESCRIBED, ids=lambda workload: workload.name)
def test_what_is_prescribed_fits_the_schema_of_the_call(workload: Workload) -> None:
    for script in workload.scripts(0, 0):
        talk = Conversation(script, "prescribed")
        for turn in range(len(script.turns)):
            schema = talk.request(turn)["response_format"]["json_schema"]["schema"]
            answer = talk.prescribed(turn)
            jsonschema.validate(json.loads(answer), schema)
            assert talk.is_valid(turn, Answer(answer))
            assert not talk.is_valid(turn, Answer(answer[:-1]))
            talk.answered(Answer(answer))


def test_a_workload_without_a_known_answer_is_refused() -> None:
    assert prescribed_answer("Any questions?") is None


def test_llama_server_gets_a_grammar_of_the_tokens(model: Model, engine: Engine) -> None:
    body, answer = next(conversation(1))
    asked = LlamaServer(model).prescribe(body, answer)
    assert "response_format" not in asked
    tokens = [int(token) for token in re.findall(r"<\[(\d+)\]>", asked["grammar"])]
    assert engine.tokenizer.decode(tokens) == answer
