"""Rendering the end of a conversation without all that precedes it: the end is the same, whatever the template."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.chat import ChatTemplate, Conversations, Message, Setting, Tool, ToolCall, ToolUse
from slipstream.chat.answers import Dialect
from slipstream.chat.rendering import Renderer
from slipstream.errors import InvalidRequestError
from slipstream.tokenizer import Tokenizer
from slipstream.tokenizer.provenance import Traced
from tests.unit import test_chat as forms

SETTING = Setting(ToolUse((Tool("look", "Look", {"type": "object", "properties": {"at": {"type": "string"}}}),)))
GENERATED = ("", '<tool_call>\n{"name": "look", "arguments": {"at": "é"}}\n</tool_call>', "in another form")

TEMPLATES = {
    "ChatML": forms.CHATML,
    "Llama": forms.LLAMA,
    "turns alternate": forms.MISTRAL,
    "empty thought": forms.QWEN,
    "tools at the last question": forms.MISTRAL_WITH_TOOLS,
    "tools": forms.TOOLS,
    "system text at the last question": forms.TestPlacing.NEMO,
    "names with the results": forms.TestPlacing.NAMES,
    "system text first": (
        "{% for m in messages if m.role == 'system' %}<{{ m.content }}>{% endfor %}"
        "{% for m in messages if m.role != 'system' %}[{{ m.content }}]{% endfor %}"
    ),
    "last system text at the end": forms.CHATML
    + "{{ messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | list | last }}",
    "reasoning of this question alone": forms.QWEN.replace(
        "{{- message.content", "{{- (message.reasoning or '' if loop.index0 > last.question else '') + message.content"
    ),
    "first message at the end": forms.CHATML + "{{ messages[0].content }}",
    "numbered messages": forms.CHATML.replace("message.role + '", "message.role ~ loop.index ~ '"),
    "numbered questions": forms.CHATML.replace(
        "message.content",
        "(messages[:loop.index0] | selectattr('role', 'equalto', 'user') | list | length) ~ message.content",
    ),
    "results opened once": forms.TOOLS.replace(
        "+ message.content }}",
        "+ ('<results>' if message.role == 'tool' and messages[loop.index0 - 2].role != 'tool') + message.content }}",
    ),
    "numbered results": forms.TOOLS.replace(
        "message.role + '",
        "message.role ~ (messages[:loop.index0] | selectattr('role', 'equalto', 'tool') | list | length) ~ '",
    ),
    "backwards": forms.CHATML.replace("in messages %}", "in messages | reverse %}"),
}


def renderer(source: str) -> Renderer:
    template = ChatTemplate(source, forms.VARIABLES)
    return Renderer(template, Dialect(template.shown, tool_format="hermes" if "tool" in source else None))


RENDERERS = {name: renderer(source) for name, source in TEMPLATES.items()}

Texts = st.sampled_from(["Hi", "Go on", "é🦜", " a  b ", "<|im_start|>", "x" * 40])
Thoughts = st.sampled_from(["", "", "Hm."])
Turn = st.tuples(st.sampled_from(["chat", "chat", "call", "calls", "call", "system"]), Texts, Texts, Thoughts)


def conversation(turns: Sequence[tuple[str, str, str, str]], *, system: bool) -> list[Message]:
    messages = [Message("system", "Be brief.")] if system else []
    messages.append(Message("user", "Where am I?"))
    for number, (kind, said, answer, thought) in enumerate(turns):
        if kind in ("call", "calls"):
            ids = [f"call{number:04}{at}" for at in range(len(kind) - 3)]
            calls = tuple(ToolCall(id, "look", '{"at": "é"}') for id in ids)
            messages.append(Message("assistant", "", calls, reasoning=thought))
            messages += [Message("tool", f"{said} {number}", tool_call_id=id) for id in ids]
        else:
            messages.append(Message("assistant", answer, reasoning=thought))
            if kind == "system":
                messages.append(Message("system", f"{said}!"))
            messages.append(Message("user", f"{said} {number}"))
    return messages


def tail(renderer: Renderer, messages: list[Message], number: int, generated: str) -> tuple[str, list[Any]] | None:
    """What follows an answer, and which of it is the template's own."""
    found = renderer.tail(messages, number, generated, SETTING)
    return None if found is None else (str(found), [*found.own_runs()])


@settings(max_examples=150)
@given(
    name=st.sampled_from([*TEMPLATES]),
    turns=st.lists(Turn, min_size=1, max_size=14),
    system=st.booleans(),
    generated=st.sampled_from(GENERATED),
    data=st.data(),
)
def test_the_end_of_a_conversation_is_that_of_the_whole(
    name: str, turns: list[tuple[str, str, str, str]], system: bool, generated: str, data: st.DataObject
) -> None:
    messages = conversation(turns, system=system)
    answers = [number for number, message in enumerate(messages) if message.role == "assistant"]
    number = data.draw(st.sampled_from(answers))
    eliding, whole = RENDERERS[name], renderer(TEMPLATES[name])
    whole.elides = False
    try:
        expected = tail(whole, messages, number, generated)
    except InvalidRequestError:
        return  # the template refused an earlier turn
    assert tail(eliding, messages, number, generated) == expected


def test_templates_that_look_far_back_are_found_and_no_others() -> None:
    assert {name for name, each in RENDERERS.items() if not each.elides} == {
        "last system text at the end",
        "numbered messages",
        "numbered questions",
        "numbered results",
    }


class Counting(ChatTemplate):
    """Notes how many messages it was given."""

    rendered: list[int]

    def render(self, messages: Sequence[Mapping[str, Any]], *args: Any) -> Traced:
        self.rendered.append(len(messages))
        return super().render(messages, *args)


def grown(source: str, tokenizer: Tokenizer, turns: int) -> list[list[int]]:
    """How many messages were rendered, each time, in the turns of a conversation; its prompts end as they should."""
    template = Counting(source, forms.VARIABLES)
    template.rendered = []
    conversations = Conversations(template, tokenizer, Dialect(template.shown, tokenizer, "hermes"))
    messages, counts = [Message("user", "Hi")], []
    for turn in range(turns):
        template.rendered.clear()
        prompt = conversations.prompt(messages)
        counts.append(template.rendered.copy())
        dicts = [{"role": message.role, "content": message.text} for message in messages]
        end = tokenizer.decode(prompt.tokens.ids[prompt.parent_length :], skip_special=False)
        assert forms.rendered(source, *dicts).endswith(end)
        said = f"Yes {turn}"
        conversations.record(prompt, Message("assistant", said), tokenizer.encode(said), said)
        messages += [Message("assistant", said), Message("user", f"And {turn}?")]
    return counts


def test_a_turn_renders_no_more_of_a_long_conversation_than_of_a_short_one(tokenizer: Tokenizer) -> None:
    counts = grown(forms.CHATML, tokenizer, 70)
    whole = [turn for turn, rendered in enumerate(counts) if turn > 1 and max(rendered) > 5]
    assert whole == [4, 8, 16, 32, 64], "whenever it has doubled"
    assert counts[69] == [5]


def test_a_template_that_turns_out_to_look_far_back_gets_whole_conversations(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    counted = forms.CHATML + "{{ messages | length if messages | length > 32 else '' }}"
    with caplog.at_level(logging.WARNING):
        counts = grown(counted, tokenizer, 24)
    assert [5] in counts[:16]
    assert all(max(rendered) > 32 for rendered in counts[16:])
    assert len(caplog.records) == 1
