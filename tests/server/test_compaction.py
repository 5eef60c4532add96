"""Anthropic's compaction: a conversation that has grown long is summarised by the server, and goes on from that."""

import asyncio
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from anthropic import Anthropic, BadRequestError, beta_tool

from slipstream.chat import Message
from slipstream.engine import SamplingParams
from slipstream.server.anthropic_compaction import _started, is_due
from slipstream.server.anthropic_context import Compact, InputTokens
from slipstream.turns import TurnRequest
from tests.server.process import MODEL, Server
from tests.waiting import HANG

EDITS = ["compact-2026-01-12"]
NOW = ["compact-2026-09-04"]
SYSTEM = "A reader of long texts."
GREEDY = {"temperature": 0}
STORY: list[Any] = [
    {"role": "user", "content": "Remember: there is a tree, a house, a river and a road. " * 12},
    {"role": "assistant", "content": "I remember all of it."},
    {"role": "user", "content": "Where is the river?"},
]
OTHER: list[Any] = [{"role": "user", "content": "Say something."}]


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Anthropic]:
    with Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=HANG) as client:
        yield client


def edit(trigger: int = 100, **more: Any) -> Any:
    compact = {"type": "compact_20260112", "trigger": {"type": "input_tokens", "value": trigger}, **more}
    return {"edits": [compact]}


def ask(client: Anthropic, messages: list[Any], management: Any = None, **more: Any) -> Any:
    given: dict[str, Any] = {"model": MODEL, "system": SYSTEM, "max_tokens": 12, "betas": EDITS, "extra_body": GREEDY}
    if management is not None:
        given["context_management"] = management
    return client.beta.messages.create(messages=messages, **given | more)


def counted(client: Anthropic, messages: list[Any], **more: Any) -> Any:
    return client.beta.messages.count_tokens(model=MODEL, system=SYSTEM, messages=messages, betas=EDITS, **more)


def answered(messages: list[Any], answer: Any) -> list[Any]:
    return [*messages, {"role": "assistant", "content": answer.to_dict()["content"]}]


def total(usage: Any) -> int:
    return int(usage.input_tokens + usage.cache_read_input_tokens + usage.cache_creation_input_tokens)


def test_below_the_trigger_nothing_happens(client: Anthropic) -> None:
    answer = ask(client, STORY, edit(trigger=5000))
    assert [block.type for block in answer.content] == ["text"]
    assert answer.usage.iterations is None
    assert answer.slipstream["warnings"] == []
    assert ask(client, STORY, edit(trigger=5000)).content == ask(client, STORY).content


def test_a_long_conversation_goes_on_from_its_summary(client: Anthropic) -> None:
    plain = ask(client, STORY)
    answer = ask(client, STORY, edit())
    summary, text = answer.content
    assert (summary.type, text.type, bool(summary.content)) == ("compaction", "text", True)
    assert answer.stop_reason in ("end_turn", "max_tokens")
    made, said = answer.usage.iterations
    assert (made.type, said.type) == ("compaction", "message")
    assert made.cache_read_input_tokens >= total(plain.usage) - 8, "all of it was there but the request for a summary"
    assert (total(said), said.output_tokens) == (total(answer.usage), answer.usage.output_tokens)
    assert total(answer.usage) < total(plain.usage)
    # What was dropped is gone for good: the same answer comes after the summary alone.
    alone = [{"role": "assistant", "content": [summary.to_dict()]}]
    assert counted(client, alone).input_tokens == total(answer.usage)
    assert ask(client, alone).content == [text]
    # The client sends all of it, and nothing before the summary is read again, nor what comes after computed again.
    later = [*answered(STORY, answer), {"role": "user", "content": "And the road?"}]
    second = ask(client, later, edit(trigger=5000))
    assert [block.type for block in second.content] == ["text"]
    assert second.usage.cache_read_input_tokens >= total(answer.usage) + answer.usage.output_tokens - 2
    assert second.slipstream["reuse_break"] is None
    changed = [{"role": "user", "content": "Something else."}, *later[1:]]
    assert counted(client, changed).input_tokens == counted(client, later).input_tokens == total(second.usage)


def test_a_pause_leaves_the_answer_to_a_later_request(client: Anthropic) -> None:
    paused = ask(client, STORY, edit(pause_after_compaction=True))
    (summary,) = paused.content
    assert (paused.stop_reason, summary.type) == ("compaction", "compaction")
    assert [each.type for each in paused.usage.iterations] == ["compaction"]
    assert total(paused.usage) == paused.usage.output_tokens == 0
    whole = ask(client, STORY, edit())
    assert whole.content[0] == summary
    assert ask(client, answered(STORY, paused), edit(trigger=5000)).content == whole.content[1:]
    # A client may keep what was said last.
    kept = [{"role": "assistant", "content": paused.to_dict()["content"]}, *STORY[1:]]
    assert ask(client, kept, edit(trigger=5000)).content[0].type == "text"


def test_instructions_replace_the_servers(client: Anthropic) -> None:
    own = ask(client, STORY, edit(instructions="Say 'river'.", pause_after_compaction=True))
    prompt = own.usage.iterations[0]
    spelled_out = [*STORY[:2], {"role": "user", "content": "Where is the river?"}]
    plain = counted(client, spelled_out).input_tokens
    assert 0 < total(prompt) - plain < 16, "a short message more"
    servers = ask(client, STORY, edit(pause_after_compaction=True)).usage.iterations[0]
    blank = ask(client, STORY, edit(instructions=" ", pause_after_compaction=True)).usage.iterations[0]
    assert total(blank) == total(servers) > total(prompt) + 16


def test_tools_are_not_called_for_a_summary_and_neither_stops_nor_schemas_hold_for_it(client: Anthropic) -> None:
    tools: Any = [{"name": "look", "input_schema": {"type": "object", "properties": {"at": {"enum": ["it"]}}}}]
    more: Any = {"tools": tools, "tool_choice": {"type": "any"}, "max_tokens": 60}
    answer = ask(client, STORY, edit(), **more)
    assert [block.type for block in answer.content[:2]] == ["compaction", "tool_use"]
    result = {"type": "tool_result", "tool_use_id": answer.content[1].id, "content": "A bird."}
    calls = answer.to_dict()["content"][:2]
    later = [*STORY, {"role": "assistant", "content": calls}, {"role": "user", "content": [result]}]
    assert ask(client, later, edit(trigger=5000), **more | {"tool_choice": {"type": "none"}}).content
    schema = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"], "additionalProperties": False}
    form: Any = {"output_config": {"format": {"type": "json_schema", "schema": schema}}, "max_tokens": 60}
    summary, text = ask(client, STORY, edit(), stop_sequences=["e"], **form).content
    assert len(summary.content) > 20
    assert text.text.startswith("{")


def test_a_stream_has_the_summary_in_one_piece(client: Anthropic) -> None:
    whole = ask(client, STORY, edit())
    events = list(ask(client, STORY, edit(), stream=True))
    kinds = [event.type for event in events if event.type != "ping"]
    block = ["content_block_start", "content_block_delta", "content_block_stop"]
    assert kinds[:5] == ["message_start", *block, "content_block_start"]
    assert kinds[-2:] == ["message_delta", "message_stop"]
    with client.beta.messages.stream(
        model=MODEL,
        system=SYSTEM,
        messages=STORY,
        max_tokens=12,
        extra_body=GREEDY,
        betas=EDITS,
        context_management=edit(),
    ) as stream:
        seen = [event.content for event in stream if event.type == "compaction"]
        final = stream.get_final_message()
    assert seen == [whole.content[0].content]
    assert final.content[0].content == whole.content[0].content
    assert ask(client, [*answered(STORY, final), *OTHER], edit(trigger=5000)).content
    assert [block.type for block in final.content] == ["compaction", "text"]
    assert final.content[1].text == whole.content[1].text
    assert final.usage.iterations is not None
    assert final.usage.output_tokens == whole.usage.output_tokens
    paused = list(ask(client, STORY, edit(pause_after_compaction=True), stream=True))
    kinds = [event.type for event in paused if event.type != "ping"]
    assert kinds == ["message_start", *block, "message_delta", "message_stop"]
    assert paused[-2].delta.stop_reason == "compaction"


@pytest.mark.parametrize(
    ("tokens", "max_tokens", "messages", "due"),
    [
        (5000, 1, 1, True),
        (4999, 1, 3, False),
        (749, 1, 3, False),
        (750, 1, 3, True),
        (750, 1, 1, False),
        (600, 400, 3, False),
        (600, 401, 3, True),
        (600, 401, 1, False),
    ],
)
def test_when_a_summary_is_due(tokens: int, max_tokens: int, messages: int, due: bool) -> None:
    """Also when a context that is smaller than the trigger fills; but a first message is no long conversation."""
    prompt = tuple(Message(role) for role in ("user", "assistant", "user")[:messages])
    request = TurnRequest(prompt=prompt, params=SamplingParams(max_tokens=max_tokens))
    most = 1000 if tokens < 1000 else 9000
    runtime: Any = SimpleNamespace(
        turns=SimpleNamespace(count=lambda _: tokens), core=SimpleNamespace(limits=SimpleNamespace(max_sequence=most))
    )
    compact = Compact(type="compact_20260112", trigger=InputTokens(type="input_tokens", value=5000))
    assert is_due(compact, request, runtime) == due


def test_a_conversation_that_leaves_no_room_is_summarised_whatever_the_trigger(client: Anthropic) -> None:
    greedy = {"max_tokens": 8192 - 150}
    with pytest.raises(BadRequestError, match="exceed context limit"):
        ask(client, STORY, **greedy)
    default = {"edits": [{"type": "compact_20260112", "pause_after_compaction": True}]}
    assert ask(client, STORY, default, **greedy).content[0].type == "compaction"
    # Nothing could be left out of a first message, so it's refused as ever.
    with pytest.raises(BadRequestError, match="exceed context limit"):
        ask(client, STORY[:1], default, **greedy)


def test_a_summary_that_failed_says_nothing(client: Anthropic) -> None:
    failed = {"role": "assistant", "content": [{"type": "compaction", "content": None}]}
    assert counted(client, [*STORY, failed]).input_tokens == counted(client, STORY).input_tokens
    assert ask(client, [*STORY, failed]).content == ask(client, STORY).content
    with pytest.raises(BadRequestError, match=r"messages\[0\]\.content\[0\]\.content"):
        ask(client, [{"role": "assistant", "content": [{"type": "compaction", "content": ""}]}, *OTHER])


def test_tools_that_were_added_are_described_after_the_summary(client: Anthropic) -> None:
    tools: Any = [
        {"name": f"tool_{letter}", "input_schema": {"type": "object"}, "defer_loading": True} for letter in "ab"
    ]
    added, removed = (
        {"type": f"tool_{change}", "tool": {"type": "tool_reference", "name": f"tool_{letter}"}}
        for change, letter in (("addition", "a"), ("removal", "b"))
    )
    talk: list[Any] = [*STORY[:2], {"role": "user", "content": [removed, added, *({"type": "text", "text": "Go."},)]}]
    (summary,) = ask(client, talk, edit(pause_after_compaction=True), tools=tools).content
    assert [each.to_dict() for each in summary.tool_changes] == [removed, added]
    alone = [{"role": "assistant", "content": [summary.to_dict()]}]
    bare = [{"role": "assistant", "content": [{"type": "compaction", "content": summary.content}]}]
    described = (
        '\nThe tool tool_b is no longer available.\nThe tool tool_a is available from now on:\n{"name": "tool_a"'
    )
    more = counted(client, alone, tools=tools).input_tokens - counted(client, bare, tools=tools).input_tokens
    assert more > len(described) // 6
    again = ask(client, [*alone, *OTHER], edit(trigger=1, pause_after_compaction=True), tools=tools).content[0]
    assert again.tool_changes == summary.tool_changes, "they outlive the next summary"


def test_on_demand_nothing_comes_after_the_summary(client: Anthropic) -> None:
    now: Any = {"type": "summarize"}
    for messages in (STORY, STORY[:2]):
        answer = ask(client, messages, compaction=now, max_tokens=40, betas=NOW)
        (summary,) = answer.content
        assert (answer.stop_reason, summary.type, bool(summary.content)) == ("compaction", "compaction", True)
        assert 0 < answer.usage.output_tokens <= 40
        assert total(answer.usage) > counted(client, STORY[:1]).input_tokens
        goes_on = [{"role": "assistant", "content": [summary.to_dict()]}, *OTHER]
        assert ask(client, goes_on).content[0].type == "text"
    with pytest.raises(BadRequestError, match="compaction summarises"):
        ask(client, STORY, edit(), compaction=now)


def test_a_summary_that_was_cut_is_reported(client: Anthropic) -> None:
    answer = ask(client, STORY, compaction={"type": "summarize"}, max_tokens=2, betas=NOW)
    assert answer.slipstream["warnings"] == ["compaction: the summary was cut off at its longest"]


def test_the_official_tool_runner_compacts(client: Anthropic) -> None:
    @beta_tool
    def look(at: str) -> str:
        """Look at something.

        Args:
            at: What.
        """
        return f"{at}: a tree, a house, a river and a road. " * 12

    runner = client.beta.messages.tool_runner(
        model=MODEL, system=SYSTEM, messages=OTHER, tools=[look], max_tokens=40, max_iterations=4, extra_body=GREEDY,
        tool_choice={"type": "tool", "name": "look"}, betas=NOW,
    )  # fmt: skip
    reasons = []
    for message in runner:
        reasons.append(message.stop_reason)
        if len(reasons) == 1:
            runner.compact_before_next_turn()
    assert reasons[1] == "compaction"
    assert len(reasons) > 2, "it went on"


def test_a_session_goes_on_from_the_summary(client: Anthropic, server: Server) -> None:
    session: Any = {"extra_headers": {"X-Session-Id": "compacted"}}
    first = ask(client, STORY, edit(), **session)
    later = [*answered(STORY, first), {"role": "user", "content": "And the road?"}]
    second = ask(client, later, edit(trigger=5000), **session)
    assert second.slipstream["session_id"] == "compacted"
    assert second.usage.cache_read_input_tokens >= total(first.usage)


def test_what_a_client_did_not_wait_for_is_cancelled() -> None:
    """It may leave while the turn after the summary starts, which goes on for a moment, on another thread."""
    cancelled: list[bool] = []

    async def leave() -> None:
        starting: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(_started(starting))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        starting.set_result(SimpleNamespace(cancel=lambda: cancelled.append(True)))
        await asyncio.sleep(0)

    asyncio.run(leave())
    assert cancelled == [True]
