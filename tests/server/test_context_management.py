"""Anthropic's context management: old results are cleared, what precedes them is reused, the rest is computed once."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from anthropic import Anthropic, BadRequestError

from slipstream.server.anthropic_context import CLEARED
from tests.server.process import MODEL, Server
from tests.waiting import HANG

TOOLS: Any = [{"name": name, "input_schema": {"type": "object"}} for name in ("read", "note")]
RESULT = "A tree, a house, a river and a road. " * 8
BETA = "context-management-2025-06-27"


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Anthropic]:
    with Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=HANG) as client:
        yield client


def used(number: int, name: str = "read", result: str = RESULT, **arguments: Any) -> list[Any]:
    """A call and its result."""
    call = {"type": "tool_use", "id": f"call_{number}", "name": name, "input": arguments or {"path": "a" * 200}}
    brought = {"type": "tool_result", "tool_use_id": f"call_{number}", "content": f"{number} {result}"}
    return [{"role": "assistant", "content": [call]}, {"role": "user", "content": [brought]}]


def talk(uses: int, **more: Any) -> list[Any]:
    question = {"role": "user", "content": "Read all of it."}
    return [question, *(message for number in range(uses) for message in used(number, **more))]


def cleared(messages: list[Any], count: int, *, inputs: bool = False) -> list[Any]:
    """The conversation whose first results a client has cleared itself."""
    edited = [messages[0], *(message for number in range(count) for message in used(number))]
    for number in range(count):
        edited[2 * number + 2]["content"][0]["content"] = CLEARED
        if inputs:
            edited[2 * number + 1]["content"][0]["input"] = {}
    return edited + messages[len(edited) :]


def edit(trigger: int = 500, keep: int = 2, **more: Any) -> Any:
    limits = {"trigger": {"type": "input_tokens", "value": trigger}, "keep": {"type": "tool_uses", "value": keep}}
    return {"edits": [{"type": "clear_tool_uses_20250919", **limits, **more}]}


def ask(client: Anthropic, messages: list[Any], management: Any, **more: Any) -> Any:
    return client.beta.messages.create(
        model=MODEL, messages=messages, tools=TOOLS, tool_choice={"type": "none"}, max_tokens=2, betas=[BETA],
        context_management=management, **more,
    )  # fmt: skip


def counted(client: Anthropic, messages: list[Any], management: Any = None) -> Any:
    more = {} if management is None else {"context_management": management}
    return client.beta.messages.count_tokens(model=MODEL, messages=messages, tools=TOOLS, betas=[BETA], **more)


def test_below_the_trigger_nothing_is_cleared(client: Anthropic) -> None:
    messages = talk(3)
    answer = ask(client, messages, edit(trigger=5000))
    assert answer.context_management.applied_edits == []
    assert ask(client, messages, {"edits": []}).context_management.applied_edits == []
    count = counted(client, messages, edit(trigger=5000))
    assert (
        count.input_tokens == count.context_management.original_input_tokens == counted(client, messages).input_tokens
    )


def test_the_prompt_is_that_of_the_cleared_conversation(client: Anthropic) -> None:
    messages = talk(6)
    (first, *_), count = (
        ask(client, messages, edit()).context_management.applied_edits,
        counted(client, messages, edit()),
    )
    assert first.type == "clear_tool_uses_20250919"
    number = first.cleared_tool_uses
    assert 0 < number <= 4
    assert first.cleared_input_tokens > 60 * number
    assert count.input_tokens == counted(client, cleared(messages, number)).input_tokens
    assert count.context_management.original_input_tokens == counted(client, messages).input_tokens
    assert ask(client, cleared(messages, number), {"edits": []}).usage.cache_read_input_tokens == count.input_tokens - 1


def test_what_precedes_is_reused_and_the_rest_is_computed_once(client: Anthropic) -> None:
    """Else each further result would push another one out, and all that follows would be computed again."""
    management = edit(trigger=900, clear_at_least={"type": "input_tokens", "value": 350})
    found: list[tuple[int, int]] = []
    for uses in range(1, 12):
        answer = ask(client, talk(uses), management, system="A reader of many files.")
        edits = answer.context_management.applied_edits
        found.append((edits[0].cleared_tool_uses if edits else 0, answer.usage.cache_read_input_tokens))
    turns = [(after[0] - before[0], before[1], after[1]) for before, after in pairwise(found)]
    assert sum(new > 0 for new, _, _ in turns) == 2
    assert max(new for new, _, _ in turns) >= 4, "several at a time"
    for new, before, after in turns:
        assert (after > before) == (new == 0), "a turn that clears nothing more goes on from all there was"
        assert after > 0


def test_excluded_tools_arguments_and_least(client: Anthropic) -> None:
    messages = talk(6)
    assert ask(client, messages, edit(exclude_tools=["read"])).context_management.applied_edits == []
    least = {"type": "input_tokens", "value": 50_000}
    assert ask(client, messages, edit(clear_at_least=least)).context_management.applied_edits == []
    both = edit(clear_tool_inputs=True)
    (first,) = ask(client, messages, both).context_management.applied_edits
    expected = counted(client, cleared(messages, first.cleared_tool_uses, inputs=True)).input_tokens
    assert counted(client, messages, both).input_tokens == expected
    named = edit(clear_tool_inputs=["note"])
    (other,) = ask(client, messages, named).context_management.applied_edits
    assert other.cleared_input_tokens / other.cleared_tool_uses < first.cleared_input_tokens / first.cleared_tool_uses
    by_uses = edit() | {"edits": [edit()["edits"][0] | {"trigger": {"type": "tool_uses", "value": 4}}]}
    (third,) = ask(client, messages, by_uses).context_management.applied_edits
    assert third.cleared_tool_uses == 3, "as the fifth came"


def test_a_stream_reports_edits_with_its_end(client: Anthropic) -> None:
    events = list(ask(client, talk(6), edit(), stream=True))
    (ending,) = (event for event in events if event.type == "message_delta")
    assert ending.context_management.applied_edits[0].cleared_tool_uses > 0


def test_edits_that_are_not_made_are_reported(client: Anthropic) -> None:
    others = {"edits": [{"type": "clear_all_20300101"}, {"type": "clear_thinking_20251015", "keep": "all"}]}
    report = ask(client, talk(1), others).slipstream
    assert report["warnings"] == ["context_management: an edit of type 'clear_all_20300101' is not made"]


def test_a_wrong_edit_is_named(client: Anthropic) -> None:
    with pytest.raises(BadRequestError, match=r"context_management\.edits"):
        ask(client, talk(1), edit(keep=-1))
