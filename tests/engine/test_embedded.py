"""The engine in one's own process."""

import json
import threading
from dataclasses import replace

import pytest

from slipstream import (
    ContextLengthError,
    Engine,
    EngineConfig,
    EngineStoppedError,
    InvalidRequestError,
    Message,
    SamplingParams,
    Tool,
    ToolUse,
    TurnRequest,
)
from slipstream.models import Model
from tests.short_model import room_for
from tests.waiting import wait_until

GREEDY = SamplingParams(temperature=0, max_tokens=16)
LIGHT = Tool(
    "switch_light",
    "Switch a light on or off",
    {
        "type": "object",
        "properties": {"room": {"enum": ["kitchen", "cellar"]}, "on": {"type": "boolean"}},
        "required": ["room", "on"],
    },
)


def test_a_stream_adds_up_to_the_whole(engine: Engine) -> None:
    whole = engine.generate("The capital of France is", GREEDY)
    pieces = list(engine.stream("The capital of France is", GREEDY, reuse=False))
    assert "".join(piece.text for piece in pieces) == whole.text == engine.tokenizer.decode(whole.token_ids)
    assert tuple(token for piece in pieces for token in piece.token_ids) == whole.token_ids
    assert pieces[-1].finish_reason == whole.finish_reason


def test_token_ids_are_as_good_as_text(engine: Engine) -> None:
    text = "One, two, three,"
    assert engine.generate(engine.encode(text), GREEDY).token_ids == engine.generate(text, GREEDY).token_ids


def test_a_stream_that_is_closed_ends_the_work(engine: Engine) -> None:
    stream = engine.stream("Once upon a time", SamplingParams(temperature=0, max_tokens=2000, ignore_eos=True))
    next(stream)
    stream.close()
    wait_until(lambda: not engine.core.stats().kv.running_sequences)


def test_forks_share_and_go_their_own_ways(engine: Engine) -> None:
    session = engine.session("You are terse.")
    first = session.send("Name a colour.", params=GREEDY)
    before = first.counters.prompt_tokens + first.counters.completion_tokens
    fork = session.fork()
    one = session.send("Another.", params=GREEDY)
    other = fork.send("An animal.", params=GREEDY)
    assert one.counters.reused_tokens >= before
    assert other.counters.reused_tokens >= before
    assert [message.text for message in fork.messages[:3]] == [message.text for message in session.messages[:3]]
    assert fork.messages[3].text == "An animal."
    prompt = engine.conversations.prompt(fork.messages[:-1])
    assert engine.generate(prompt.tokens.ids.tolist(), GREEDY, reuse=False).token_ids == other.token_ids


def test_a_turn_may_ask_for_all_that_a_client_may(engine: Engine) -> None:
    params = SamplingParams(temperature=0.9, seed=7, max_tokens=8)
    conversation = (Message("user", "Name a colour."),)
    request = TurnRequest(prompt=conversation, params=params, choices=3, session_id="three", response_cache=False)
    answers = engine.answer(request)
    prompt = engine.conversations.prompt(conversation).tokens.ids.tolist()
    alone = [engine.generate(prompt, replace(params, seed=7 + number), reuse=False) for number in range(3)]
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in alone]
    session = engine.session(id="three")
    assert [message.text for message in session.messages] == ["Name a colour.", answers[0].text]
    schema = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]}
    said = session.send("Is it on?", params=SamplingParams(temperature=0, max_tokens=40), response_schema=schema)
    assert isinstance(json.loads(said.text)["on"], bool)


def test_a_session_calls_tools_and_takes_their_results(engine: Engine) -> None:
    session = engine.session("You look after a house.", ToolUse((LIGHT,), "required", parallel=False))
    session.send("It is dark in the cellar.", params=SamplingParams(temperature=0, max_tokens=60))
    (call,) = session.messages[-1].tool_calls
    arguments = json.loads(call.arguments)
    assert call.name == "switch_light"
    assert arguments["room"] in ("kitchen", "cellar")
    assert isinstance(arguments["on"], bool)
    result = Message("tool", "done", tool_call_id=call.id)
    answer = session.send(result, params=GREEDY, tools=ToolUse((LIGHT,), "none"))
    assert not session.messages[-1].tool_calls
    assert answer.counters.delta_tokens < 40


def test_an_answer_says_what_of_a_schema_is_not_enforced(engine: Engine) -> None:
    """No array fits this schema, so what the grammar lets through can't."""
    twice = {"type": "array", "items": {"type": "string", "pattern": "^a$"}, "minItems": 2, "maxItems": 2}
    sets = {"type": "object", "properties": {"set": {**twice, "uniqueItems": True}}, "required": ["set"]}
    session = engine.session(tools=ToolUse((Tool("odd", "Takes a set", sets),), "required", parallel=False))
    called = session.send("Call it.", params=replace(GREEDY, max_tokens=60))
    loosened, misfit = called.warnings
    assert loosened.startswith("the parameters of the tool 'odd': 'uniqueItems' is not enforced")
    (call,) = session.messages[-1].tool_calls
    assert misfit.startswith(f"the call {call.id!r} of 'odd' does not fit its schema: set: ")
    answered = engine.session().send("Say it.", params=replace(GREEDY, max_tokens=60), response_schema=sets)
    assert answered.text == '{"set": ["a", "a"]}'
    assert [warning.partition(":")[0] for warning in answered.warnings] == [
        "the response schema",
        "the answer does not fit its schema",
    ]
    assert engine.generate("One, two,", GREEDY).warnings == ()


def test_a_stream_says_at_its_end_what_is_not_enforced(engine: Engine) -> None:
    twice = {"type": "array", "items": {"type": "string", "pattern": "^a$"}, "minItems": 2, "maxItems": 2}
    sets = {"type": "object", "properties": {"set": {**twice, "uniqueItems": True}}, "required": ["set"]}
    params = replace(GREEDY, max_tokens=60)
    whole = engine.session().send("Say it.", params=params, response_schema=sets)
    assert len(whole.warnings) == 2
    with engine.session().stream("Say it.", params=params, response_schema=sets) as stream:
        with pytest.raises(RuntimeError, match="read the stream to its end"):
            stream.warnings  # noqa: B018 - which raises
        list(stream)
        assert stream.warnings == stream.completion.warnings == whole.warnings
    assert (stream.completion.text, stream.completion.token_ids) == (whole.text, whole.token_ids)
    plain = engine.stream("One, two,", GREEDY)
    list(plain)
    assert plain.warnings == ()


def test_many_threads_may_ask_at_once(engine: Engine) -> None:
    alone = [engine.generate(f"Number {index} is", GREEDY, reuse=False).token_ids for index in range(6)]
    together: dict[int, tuple[int, ...]] = {}

    def ask(index: int) -> None:
        together[index] = engine.generate(f"Number {index} is", GREEDY).token_ids

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[index] for index in range(6)] == alone


def test_what_cannot_be_served_is_refused_by_name(engine: Engine) -> None:
    with pytest.raises(ContextLengthError, match="kv_memory"):
        engine.generate([17] * 4000)
    with pytest.raises(ContextLengthError, match="max_tokens"):
        engine.generate([17] * 2000, SamplingParams(max_tokens=2000))
    with pytest.raises(InvalidRequestError, match="empty"):
        engine.generate([])
    with pytest.raises(InvalidRequestError, match="vocabulary"):
        engine.generate([10**6])
    with pytest.raises(InvalidRequestError, match="logit_bias"):
        engine.generate("x", SamplingParams(logit_bias={10**6: 1.0}))


def test_a_closed_engine_says_so(model: Model) -> None:
    with Engine(model, EngineConfig.model_validate({"kv_memory": room_for(700)})) as engine:
        stream = engine.stream("Once", SamplingParams(max_tokens=300, ignore_eos=True))
        next(stream)
    with pytest.raises(EngineStoppedError, match="shut"):
        list(stream)
    with pytest.raises(EngineStoppedError):
        engine.generate("x")
