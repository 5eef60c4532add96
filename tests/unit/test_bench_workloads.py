"""Workloads and conversations: the same every time, new every round, and of bounded length."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from slipstream.tokenizer import Tokenizer
from slipstream_bench import bfcl
from slipstream_bench.coding import TOOLS, coding_script
from slipstream_bench.conversation import Answer, Conversation
from slipstream_bench.records import ConstraintKind
from slipstream_bench.workloads import WORKLOADS, Workload

CONTEXT = 8192
MADE_UP = [workload for workload in WORKLOADS.values() if workload.name != "bfcl-multi-turn"]  # that one is fetched
CALL = {"path": "docs/a.py", "first_line": 1, "last_line": 2}


def schemas(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield schema
    for part in schema.get("properties", {}).values():
        yield from schemas(part)
    if "items" in schema:
        yield from schemas(schema["items"])


def is_bounded(schema: dict[str, Any]) -> bool:
    match schema["type"]:
        case "string":
            return "maxLength" in schema or "enum" in schema
        case "integer":
            return {"minimum", "maximum"} <= schema.keys()
        case "array":
            return "maxItems" in schema
        case "object":
            return schema["additionalProperties"] is False
        case kind:
            return kind == "boolean"


@pytest.mark.parametrize("workload", MADE_UP, ids=lambda workload: workload.name)
def test_a_workload_is_the_same_from_the_same_seed_alone(workload: Workload) -> None:
    assert workload.scripts(1, 0) == workload.scripts(1, 0)
    assert workload.scripts(1, 0) != workload.scripts(2, 0)


@pytest.mark.parametrize("workload", MADE_UP, ids=lambda workload: workload.name)
def test_a_workload_has_the_agents_and_turns_that_it_says(workload: Workload) -> None:
    assert [len(script.turns) for script in workload.scripts(0, 0)] == [workload.turns] * workload.agents


def test_a_cut_workload_is_the_beginning_of_the_whole_one() -> None:
    whole, cut = WORKLOADS["fleet-8"], WORKLOADS["fleet-8"].cut(3)
    assert (cut.turns, WORKLOADS["agent-6"].cut(40).turns) == (3, 6)
    for script, beginning in zip(whole.scripts(0, 1), cut.scripts(0, 1), strict=True):
        assert beginning.turns == script.turns[:3]
        assert (beginning.system, beginning.tools) == (script.system, script.tools)


@pytest.mark.parametrize("workload", MADE_UP, ids=lambda workload: workload.name)
def test_rounds_share_no_prefix_with_each_other(workload: Workload) -> None:
    heads = [{script.system[:8] for script in workload.scripts(0, number)} for number in range(3)]
    assert len(set.union(*heads)) == sum(map(len, heads))


def test_agents_of_a_fleet_share_no_prefix_but_those_with_a_shared_one_do() -> None:
    fleet = [script.system for script in WORKLOADS["fleet-8"].scripts(0, 0)]
    sharing = [script.system for script in WORKLOADS["shared-prefix"].scripts(0, 0)]
    assert len({system[:4] for system in fleet}) == 8
    assert len(set(sharing)) == 1


def test_repeats_are_exact() -> None:
    first, *others = WORKLOADS["repeat"].scripts(0, 0)
    assert all(script == first for script in others)


@pytest.mark.parametrize(("name", "least", "most"), [("coding-35", 5_000, 7_000), ("growth", 6_500, 7_900)])
def test_a_long_conversation_ends_at_the_length_it_is_meant_to(
    name: str, least: int, most: int, tokenizer: Tokenizer
) -> None:
    (script,) = WORKLOADS[name].scripts(0, 0)
    conversation = Conversation(script, "response_format")
    lengths = []
    for turn, scripted in enumerate(script.turns):
        messages = conversation.request(turn)["messages"]
        lengths.append(sum(len(tokenizer.encode(message["content"])) + 5 for message in messages))
        arguments = {
            "path": "src/parser/errors.py",
            "first_line": 100 + turn,
            "last_line": 120,
            "text": "one more line",
        }
        conversation.answered(Answer(json.dumps({"name": scripted.tool, "arguments": arguments})))
    assert least < lengths[-1] < most < CONTEXT
    assert name != "growth" or lengths[0] < 600


def test_every_string_and_integer_has_a_bound() -> None:
    for tool in TOOLS:
        assert all(is_bounded(schema) for schema in schemas(tool["function"]["parameters"]))


def test_the_leaderboards_schemas_get_bounds_where_they_have_none() -> None:
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "size": {"type": "number"},
            "kind": {"type": "string", "enum": ["a very long word that stays as it is, for it is one of few"]},
            "items": {"type": "array", "items": {"type": "object", "properties": {"anything": {}}}},
        },
        "required": ["name"],
    }
    bounded = bfcl._bounded(schema)
    assert all(is_bounded(part) for part in schemas(bounded))
    assert bounded["required"] == ["name"]
    assert bounded["properties"]["kind"] == schema["properties"]["kind"]


def test_the_leaderboards_conversations_fit_and_are_the_same_every_time(tokenizer: Tokenizer) -> None:
    workload = WORKLOADS["bfcl-multi-turn"]
    found = workload.scripts(0, 0)
    assert found == workload.scripts(0, 0) != workload.scripts(0, 1)
    assert len(found) == workload.agents
    for script in found:
        assert len(script.turns) >= workload.turns
        assert script.turns[0].user
        assert all(turn.result for turn in script.turns[1:])
        assert all(is_bounded(schema) for turn in script.turns for schema in schemas(script.parameters(turn.tool)))
        conversation = Conversation(script, "response_format")
        for turn in range(len(script.turns)):
            messages = conversation.request(turn)["messages"]
            conversation.answered(Answer("{}"))
        assert sum(len(tokenizer.encode(message["content"])) for message in messages) < CONTEXT / 2 + 1000


def test_the_leaderboard_may_be_fetched_by_another_process_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLIPSTREAM_HOME", str(tmp_path))

    def fetch(_: Path, unpacked: Path) -> None:
        unpacked.mkdir()
        (unpacked / "ours").touch()
        theirs = tmp_path / "bench" / bfcl.PACKAGE.replace("==", "-") / "theirs"
        theirs.parent.mkdir()
        theirs.touch()

    monkeypatch.setattr(bfcl, "_fetch", fetch)
    folder = bfcl._folder.__wrapped__()
    assert [path.name for path in folder.iterdir()] == ["theirs"]
    assert list(folder.parent.iterdir()) == [folder], "nothing else is left"


def test_later_turns_are_those_after_an_agents_first_or_those_of_agents_after_the_first() -> None:
    fleet, repeat = WORKLOADS["fleet-8"], WORKLOADS["repeat"]
    assert [fleet.is_later(3, 0), fleet.is_later(0, 1)] == [False, True]
    assert [repeat.is_later(0, 5), repeat.is_later(1, 0)] == [False, True]


def conversation_after_a_turn(constraint: ConstraintKind, *, rewrites: bool = False) -> Conversation:
    script = coding_script(random.Random(0), 4)
    conversation = Conversation(script, constraint, rewrites=rewrites)
    conversation.request(0)
    if constraint == "tools":
        conversation.answered(Answer(json.dumps(CALL), "call_7", "read_file"))
    else:
        conversation.answered(Answer(json.dumps({"name": "read_file", "arguments": CALL})))
    return conversation


def test_with_a_response_format_the_tools_are_text_and_results_come_from_the_user() -> None:
    body = conversation_after_a_turn("response_format").request(1)
    system, _, answer, result = body["messages"]
    assert all(tool["function"]["name"] in system["content"] for tool in TOOLS)
    assert json.loads(answer["content"])["arguments"] == CALL
    assert (result["role"], result["content"].startswith("Result:")) == ("user", True)
    assert body["response_format"]["json_schema"]["schema"]["properties"]["name"]["enum"] == ["search_code"]
    assert "tools" not in body


def test_with_tools_the_answer_is_a_call_and_its_result_names_it() -> None:
    body = conversation_after_a_turn("tools").request(1)
    _, _, answer, result = body["messages"]
    assert answer["tool_calls"][0]["function"] == {"name": "read_file", "arguments": json.dumps(CALL)}
    assert (result["role"], result["tool_call_id"]) == ("tool", "call_7")
    assert body["tool_choice"]["function"]["name"] == "search_code"
    assert "response_format" not in body


@pytest.mark.parametrize("constraint", ["response_format", "tools"])
def test_a_client_that_rewrites_says_the_same_in_other_words(constraint: ConstraintKind) -> None:
    plain, rewritten = (
        conversation_after_a_turn(constraint, rewrites=rewrites).request(1)["messages"][2] for rewrites in (False, True)
    )
    texts = [message["content"] or message["tool_calls"][0]["function"]["arguments"] for message in (plain, rewritten)]
    assert texts[0] != texts[1]
    assert json.loads(texts[0]) == json.loads(texts[1])


def test_a_client_that_rewrites_drops_old_results_half_way() -> None:
    script = coding_script(random.Random(0), 8)
    conversation = Conversation(script, "response_format", rewrites=True)
    changed = []
    for turn in range(8):
        messages = conversation.request(turn)["messages"]
        changed.append(conversation.rewritten)
        dropped = [message for message in messages if "dropped" in message["content"]]
        assert len(dropped) == (2 if turn >= 4 else 0)  # of four results, all but the last two
        conversation.answered(Answer("{}"))
    assert changed == ["nothing", *["answer"] * 3, "results", *["answer"] * 3]


@pytest.mark.parametrize(
    ("answer", "valid"),
    [
        (Answer(json.dumps({"name": "read_file", "arguments": CALL})), True),
        (Answer(json.dumps({"name": "commit", "arguments": CALL})), False),
        (Answer(json.dumps({"name": "read_file", "arguments": {**CALL, "first_line": 0}})), False),
        (Answer('{"name": "read_file", "argu'), False),
        (Answer(""), False),
    ],
)
def test_an_answer_is_valid_if_it_is_the_call_that_was_asked_for(answer: Answer, valid: bool) -> None:
    conversation = Conversation(coding_script(random.Random(0), 1), "response_format")
    assert conversation.is_valid(0, answer) is valid


def test_a_call_of_another_tool_is_not_valid() -> None:
    conversation = Conversation(coding_script(random.Random(0), 1), "tools")
    assert conversation.is_valid(0, Answer(json.dumps(CALL), "1", "read_file"))
    assert not conversation.is_valid(0, Answer(json.dumps(CALL), "1", "commit"))
