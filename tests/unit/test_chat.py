"""Chat: templates in their sandbox, when messages are the same, the ledger, and prompts exact to the token."""

import json
import threading
from collections import Counter
from dataclasses import replace
from datetime import datetime
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from slipstream.chat import (
    NO_TOOLS,
    ChatTemplate,
    Conversations,
    Message,
    Prompt,
    Setting,
    Tool,
    ToolCall,
    ToolUse,
)
from slipstream.chat.answers import Dialect
from slipstream.chat.formats import FORMATS
from slipstream.chat.ledger import Ledger, LedgerEntry
from slipstream.chat.messages import History, digest
from slipstream.chat.tags import Tags
from slipstream.errors import InvalidRequestError, ModelError
from slipstream.models import Model
from slipstream.tokenizer import Tokenizer
from slipstream.tokenizer.provenance import ORIGINS

VARIABLES = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}

CHATML = """
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""

# With a beginning of text, headers, and content that is stripped of white space.
LLAMA = """{{ bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""

# Insists on turns that alternate, and knows no system message.
MISTRAL = """{{ bos_token }}
{%- for message in messages %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant') }}
    {%- elif message.role == 'user' %}
        {{- '[INST] ' + message.content + ' [/INST]' }}
    {%- else %}
        {{- message.content + eos_token }}
    {%- endif %}
{%- endfor %}"""

# Writes an empty thought before an answer as long as nothing was asked after it.
QWEN = """
{%- set last = namespace(question=0) %}
{%- for message in messages if message.role == 'user' %}
    {%- set last.question = messages.index(message) %}
{%- endfor %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' and loop.last and loop.index0 > last.question %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
    {{- message.content + '<|im_end|>\\n' }}
{%- endfor %}
{{- '<|im_start|>assistant\\n' }}"""

# Lists the tools before the last question, wherever that is.
MISTRAL_WITH_TOOLS = """{{ bos_token }}
{%- for message in messages %}
    {%- if message.role == 'user' and messages[loop.index0 + 1:] | selectattr('role', 'equalto', 'user') | list == [] %}
        {{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}
    {%- endif %}
    {{- '[INST] ' + message.content + ' [/INST]' if message.role == 'user' else message.content + eos_token }}
{%- endfor %}"""

# Takes calls and results as they are.
TOOLS = """
{%- if tools %}
    {{- 'Tools: ' + tools | tojson + '\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content }}
    {%- for call in message.tool_calls or [] %}
        {{- '[' + call.function.name }}
        {%- for name, value in call.function.arguments | items %}
            {{- ' ' + name + '=' + value | tojson }}
        {%- endfor %}
        {{- ']' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{{- '<|im_start|>assistant\\n' }}"""


def rendered(source: str, *messages: dict[str, Any], **variables: Any) -> str:
    return ChatTemplate(source, VARIABLES).render(list(messages), **variables)


def user(text: str) -> Message:
    return Message("user", text)


def assistant(text: str, *calls: ToolCall) -> Message:
    return Message("assistant", text, calls)


HELLO = {"role": "user", "content": "Hello"}


class TestTemplate:
    def test_begins_the_assistant_s_next_message(self) -> None:
        assert rendered(CHATML, HELLO) == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"

    def test_knows_the_model_s_own_tokens(self) -> None:
        assert rendered("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}{{ unk_token }}", HELLO) == (
            "<|endoftext|>Hello<|im_end|>"
        )

    def test_lines_that_hold_a_block_alone_leave_no_trace(self) -> None:
        source = (
            "{% for message in messages %}\n    {% if true %}\n{{ message.content }}\n    {% endif %}\n{% endfor %}\n"
        )
        assert rendered(source, HELLO) == "Hello\n"

    def test_messages_are_text_and_never_templates(self) -> None:
        assert "{{ 7 * 7 }}" in rendered(CHATML, {"role": "user", "content": "{{ 7 * 7 }}"})

    def test_what_the_template_raises_is_told(self) -> None:
        with pytest.raises(InvalidRequestError, match="must alternate") as caught:
            rendered(MISTRAL, {"role": "assistant", "content": "Hello"})
        assert caught.value.param == "messages"

    @pytest.mark.parametrize(
        "source",
        [
            "{{ messages[1].content }}",
            "{{ messages[0].content + 1 }}",
            "{{ 1 // (messages | length - 1) }}",
            "{{ messages | length | dictsort }}",
            "{{ messages[0].nothing.at_all }}",
            "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
            "{{ 'x'.encode('no such thing') }}",
        ],
    )
    def test_what_goes_wrong_in_a_template_is_a_refusal(self, source: str) -> None:
        with pytest.raises(InvalidRequestError, match="refuses these messages"):
            rendered(source, HELLO)

    @pytest.mark.parametrize("source", ["{% if %}", "{{ messages", "{% endfor %}", "{{ messages | no_such_filter }}"])
    def test_what_does_not_compile_is_the_model_s_fault(self, source: str) -> None:
        with pytest.raises(ModelError, match="does not compile"):
            ChatTemplate(source, {})

    @pytest.mark.parametrize(
        "source",
        [
            "{{ ''.__class__.__mro__ }}",
            "{{ messages.__class__ }}",
            "{{ cycler.__init__.__globals__ }}",
            "{{ raise_exception.__globals__ }}",
            "{{ strftime_now.__globals__ }}",
            "{{ '{0.__class__}'.format(messages) }}",
            "{{ '%s' | attr('__class__') }}",
            "{{ self.__init__.__globals__ }}",
            "{{ range(100000000) | list }}",
            "{{ messages[0].content.encode() }}",
        ],
    )
    def test_there_is_no_way_out_of_the_sandbox(self, source: str) -> None:
        try:
            assert rendered(source, HELLO) == ""
        except InvalidRequestError as refusal:
            assert any(word in str(refusal) for word in ("unsafe", "not safe", "too big"))  # noqa: PT017

    def test_a_template_can_collect_what_it_likes_and_leaves_the_messages_alone(self) -> None:
        said = [{"role": "user", "content": "Hi", "more": ["a"]}]
        source = "{% set found = [] %}{% set _ = found.append(messages[0].content) %}{{ found | join }}"
        assert rendered(source + "{% set _ = messages[0].more.append('b') %}", *said) == "Hi"
        assert said == [{"role": "user", "content": "Hi", "more": ["a"]}]

    def test_the_time_can_be_asked_for(self) -> None:
        before = datetime.now().astimezone().replace(microsecond=0)
        told = datetime.strptime(rendered("{{ strftime_now('%Y-%m-%d %H:%M:%S %z') }}", HELLO), "%Y-%m-%d %H:%M:%S %z")
        assert before <= told <= datetime.now().astimezone()

    def test_json_is_not_escaped_for_html(self) -> None:
        value = {"b": "<a href='x'>&é</a>", "a": 1}
        assert rendered("{{ messages[0].content | tojson }}", {"content": value}) == (
            """{"b": "<a href='x'>&é</a>", "a": 1}"""
        )

    def test_json_can_be_indented_sorted_and_ascii(self) -> None:
        source = "{{ messages[0].content | tojson(ensure_ascii=true, indent=1, sort_keys=true) }}"
        assert rendered(source, {"content": {"b": "é", "a": 1}}) == '{\n "a": 1,\n "b": "\\u00e9"\n}'

    def test_loops_can_be_left_and_continued(self) -> None:
        source = (
            "{% for message in messages %}{% if loop.index == 2 %}{% continue %}{% endif %}"
            "{% if loop.index == 4 %}{% break %}{% endif %}{{ message.content }}{% endfor %}"
        )
        assert rendered(source, *({"content": digit} for digit in "12345")) == "13"

    def test_what_is_marked_as_generated_stands_as_it_is(self) -> None:
        source = "{% for message in messages %}{% generation %}{{ message.content }}!{% endgeneration %}{% endfor %}"
        assert rendered(source, HELLO, HELLO) == "Hello!Hello!"

    def test_without_tools_they_are_none(self) -> None:
        source = "{{ 'none' if tools is none else tools[0].function.name }}"
        assert rendered(source, HELLO) == "none"
        assert rendered(source, HELLO, tools=[Tool("look").as_dict()]) == "look"


class TestSameMessage:
    CALL = ToolCall("call_1", "weather", '{"city": "Oslo", "days": [1, 2], "units": {"t": "C", "w": "m/s"}}')

    @pytest.mark.parametrize(
        "arguments",
        [
            '{"city":"Oslo","days":[1,2],"units":{"t":"C","w":"m/s"}}',
            '{"units": {"w": "m/s", "t": "C"}, "days": [1, 2], "city": "Oslo"}',
            ' {\n  "city": "\\u004fslo",\n  "days": [1,\t2],\n  "units": {"t": "C", "w": "m\\/s"}\n}\n',
        ],
    )
    def test_how_arguments_are_written_does_not_matter(self, arguments: str) -> None:
        other = replace(self.CALL, arguments=arguments)
        assert assistant("", other).canonical() == assistant("", self.CALL).canonical()

    @pytest.mark.parametrize(
        "other",
        [
            replace(CALL, id="call_2"),
            replace(CALL, name="whether"),
            replace(CALL, arguments='{"city": "Oslo", "days": [2, 1], "units": {"t": "C", "w": "m/s"}}'),
            replace(CALL, arguments='{"city": "Oslo", "days": [1, 2]}'),
            replace(CALL, arguments=CALL.arguments[:-1]),
        ],
    )
    def test_what_a_call_says_does(self, other: ToolCall) -> None:
        assert assistant("", other).canonical() != assistant("", self.CALL).canonical()

    def test_every_field_counts(self) -> None:
        messages = [
            Message("tool", "text"),
            Message("user", "text"),
            Message("tool", "text "),
            Message("tool", "text", tool_call_id="call_1"),
            Message("tool", "text", tool_call_id="call_2"),
            Message("tool", "text", name="call_1"),
            Message("tool", "text", (self.CALL,)),
            Message("tool", "text", (self.CALL, self.CALL)),
        ]
        assert len({message.canonical() for message in messages}) == len(messages)

    def test_the_order_of_calls_counts(self) -> None:
        other = replace(self.CALL, id="call_2")
        assert assistant("", self.CALL, other).canonical() != assistant("", other, self.CALL).canonical()

    @pytest.mark.parametrize("arguments", ["", "{", "not JSON", "[" * 100_000, '{"a":' * 300 + "1" + "}" * 300])
    def test_any_arguments_can_be_compared(self, arguments: str) -> None:
        message = assistant("", replace(self.CALL, arguments=arguments))
        assert message.canonical() == replace(message).canonical()
        assert message.canonical() != assistant("", self.CALL).canonical()

    def test_lone_surrogates_can_be_digested(self) -> None:
        assert user("\ud800").digest != user("\ud801").digest

    @given(st.lists(st.text(max_size=3), max_size=6), st.lists(st.text(max_size=3), max_size=6))
    def test_digests_are_equal_as_far_as_messages_are(self, first: list[str], second: list[str]) -> None:
        one, other = (History(digest(""), [user(text) for text in texts]).keys() for texts in (first, second))
        for count, (left, right) in enumerate(zip(one, other, strict=False), start=1):
            assert (left == right) == (first[:count] == second[:count])


class LedgerMachine(RuleBasedStateMachine):
    """A ledger in random use, beside a dictionary that forgets nothing."""

    BOUND = 30

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(self.BOUND)
        self.everything: dict[bytes, tuple[bytes | None, list[int]]] = {}
        self.kept: list[bytes] = []
        """What a ledger keeps, least recently used first; to use one is to use those that it goes on from."""

    def note_use(self, key: bytes) -> None:
        at: bytes | None = key
        while at is not None:
            self.kept.remove(at)
            self.kept.append(at)
            at = self.everything[at][0]

    def whole(self, key: bytes | None) -> list[int]:
        if key is None:
            return []
        parent, tokens = self.everything[key]
        return self.whole(parent) + tokens

    @rule(data=st.data(), tokens=st.lists(st.integers(0, 9), min_size=1, max_size=12))
    def add(self, data: st.DataObject, tokens: list[int]) -> None:
        parent = data.draw(st.sampled_from([None, *self.everything]))
        key = data.draw(st.sampled_from([str(len(self.everything)).encode(), *self.everything]))
        was_known = self.ledger.get(key)
        if key not in self.everything:
            self.everything[key] = parent, tokens
        parent, _ = self.everything[key]
        tokens = tokens if was_known else self.everything[key][1]
        self.ledger.add(key, LedgerEntry(parent, np.array(tokens, np.int32), "conversation"))
        if was_known is not None:
            assert self.ledger.get(key) is was_known
        if key not in self.kept and (parent is None or parent in self.kept):
            self.kept.append(key)
            self.note_use(key)
        while sum(len(self.everything[each][1]) for each in self.kept) > self.BOUND and len(self.kept) > 1:
            del self.kept[0]

    @rule(data=st.data())
    def use(self, data: st.DataObject) -> None:
        known = [key for key in self.everything if self.ledger.get(key) is not None]
        if known:
            key = data.draw(st.sampled_from(known))
            assert self.ledger.tokens(key).ids.tolist() == self.whole(key)
            self.note_use(key)

    @invariant()
    def what_was_used_last_is_kept(self) -> None:
        assert {key for key in self.everything if self.ledger.get(key) is not None} == {*self.kept}

    @invariant()
    def nobody_is_an_orphan(self) -> None:
        for key in self.everything:
            if (entry := self.ledger.get(key)) is not None and entry.parent is not None:
                assert self.ledger.get(entry.parent) is not None

    @invariant()
    def bounded_and_counted(self) -> None:
        entries = [entry for key in self.everything if (entry := self.ledger.get(key)) is not None]
        assert self.ledger.total_tokens == sum(len(entry.tokens) for entry in entries)
        assert len(self.ledger) == len(entries)
        assert self.ledger.total_tokens <= self.BOUND or len(entries) == 1


LedgerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30)
TestLedgerInRandomUse = LedgerMachine.TestCase


class TestLedger:
    @staticmethod
    def filled(max_tokens: int, *entries: tuple[bytes, bytes | None, int]) -> Ledger:
        ledger = Ledger(max_tokens)
        for key, parent, count in entries:
            ledger.add(key, LedgerEntry(parent, np.full(count, key[0], np.int32), "conversation"))
        return ledger

    def test_the_least_recently_used_conversation_goes_first(self) -> None:
        ledger = self.filled(30, (b"a", None, 10), (b"b", None, 10), (b"c", None, 10))
        ledger.tokens(b"a")
        ledger.add(b"d", LedgerEntry(None, np.zeros(10, np.int32), "conversation"))
        assert [key for key in (b"a", b"b", b"c", b"d") if ledger.get(key)] == [b"a", b"c", b"d"]

    def test_looking_is_not_using(self) -> None:
        ledger = self.filled(20, (b"a", None, 10), (b"b", None, 10))
        assert ledger.get(b"a") is not None
        ledger.add(b"c", LedgerEntry(None, np.zeros(10, np.int32), "conversation"))
        assert ledger.get(b"a") is None

    def test_a_branch_goes_before_its_trunk(self) -> None:
        ledger = self.filled(30, (b"a", None, 10), (b"b", b"a", 10), (b"c", b"a", 10), (b"d", b"c", 10))
        assert [key for key in (b"a", b"b", b"c", b"d") if ledger.get(key)] == [b"a", b"c", b"d"]
        assert ledger.tokens(b"d").ids.tolist() == [*b"a" * 10, *b"c" * 10, *b"d" * 10]

    def test_the_first_of_two_equal_conversations_stays(self) -> None:
        ledger = self.filled(30, (b"a", None, 10), (b"a", None, 5))
        assert len(ledger.tokens(b"a")) == ledger.total_tokens == 10

    def test_what_goes_on_from_something_forgotten_is_not_kept(self) -> None:
        ledger = self.filled(10, (b"a", None, 10), (b"b", None, 10), (b"c", b"a", 1))
        assert len(ledger) == 1
        assert ledger.total_tokens == 10


class Chat:
    """Conversations, and a model that answers as it is told."""

    def __init__(self, source: str, tokenizer: Tokenizer, *, tool_format: str = "generic", **options: int) -> None:
        self.template = ChatTemplate(source, VARIABLES)
        self.tokenizer = tokenizer
        self.dialect = Dialect(source, tokenizer, tool_format)
        self.format = self.dialect.tool_format
        self.conversations = Conversations(self.template, tokenizer, self.dialect, **options)

    def ask(self, *messages: Message, use: ToolUse = NO_TOOLS, tenant: str = "") -> Prompt:
        return self.conversations.prompt(messages, Setting(use), tenant=tenant)

    def answered(
        self, *messages: Message, answer: str | Message, ids: list[int], text: str | None = None, **options: Any
    ) -> list[int]:
        """All tokens that the model has seen and said once it has answered with these ids."""
        prompt = self.ask(*messages, **options)
        answer = assistant(answer) if isinstance(answer, str) else answer
        self.conversations.record(prompt, answer, ids, answer.text if text is None else text)
        return [*prompt.tokens.ids.tolist(), *ids]

    def full(self, *messages: Message, use: ToolUse = NO_TOOLS) -> str:
        return self.template.render(self.format.messages(messages, use), self.format.template_tools(use))

    def text_of(self, prompt: Prompt) -> str:
        return self.tokenizer.decode(prompt.tokens.ids.tolist(), skip_special=False)


def oddly(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokens of a text other than the tokenizer would choose."""
    ids = [token for character in text for token in tokenizer.encode(character)]
    assert ids != tokenizer.encode(text)
    return ids


class TestConversations:
    @pytest.mark.parametrize("source", [CHATML, LLAMA, MISTRAL], ids=["ChatML", "Llama", "Mistral"])
    def test_the_next_prompt_begins_with_exactly_what_the_model_has_seen_and_said(
        self, source: str, tokenizer: Tokenizer
    ) -> None:
        chat = Chat(source, tokenizer)
        messages = [user("What is the capital of Norway?")]
        for reply, question in (("It is Oslo.", "And Sweden?"), ("Stockholm, I think.", "Thanks!")):
            seen = chat.answered(*messages, answer=reply, ids=oddly(tokenizer, reply))
            messages += [assistant(reply), user(question)]
            prompt = chat.ask(*messages)
            assert prompt.tokens.ids[: len(seen)].tolist() == seen
            assert prompt.tokens.ids.dtype == np.int32
            assert prompt.parent_length == len(seen)
            assert chat.text_of(prompt) == chat.full(*messages)
        assert chat.conversations.renders == {"first": 1, "spliced": 2, "repeated": 1}

    def test_the_default_model_s_template_can_be_spliced(self, model: Model, tokenizer: Tokenizer) -> None:
        assert model.chat_template is not None
        chat = Chat(model.chat_template, tokenizer)
        seen = chat.answered(user("Hi"), answer="Hello there!", ids=oddly(tokenizer, "Hello there!"))
        prompt = chat.ask(user("Hi"), assistant("Hello there!"), user("How are you?"))
        assert prompt.tokens.ids[: len(seen)].tolist() == seen
        assert chat.text_of(prompt) == chat.full(user("Hi"), assistant("Hello there!"), user("How are you?"))

    def test_special_tokens_of_the_template_are_single_tokens_and_stand_once(self, tokenizer: Tokenizer) -> None:
        ids = Chat(LLAMA, tokenizer).ask(user("Hi")).tokens.ids.tolist()
        assert ids[0] == tokenizer.token_id("<|endoftext|>")
        assert ids.count(ids[0]) == 1

    def test_white_space_that_the_template_would_strip_is_kept_as_generated(self, tokenizer: Tokenizer) -> None:
        chat = Chat(LLAMA, tokenizer)
        reply = "\n  Hello  \n"
        seen = chat.answered(user("Hi"), answer=reply, ids=oddly(tokenizer, reply))
        prompt = chat.ask(user("Hi"), assistant(reply), user("Bye"))
        assert prompt.tokens.ids[: len(seen)].tolist() == seen
        assert chat.text_of(prompt) == chat.full(user("Hi"), assistant("Hello"), user("Bye")).replace("Hello", reply)

    @pytest.mark.parametrize(
        "source",
        [
            CHATML.replace("message.content", "(message.content if message.role == 'user' else '')"),
            CHATML.replace("message.content", "message.content[:3]"),
            CHATML.replace("message.content", "message.content | upper"),
            CHATML.replace("message.content", "(message.content + ' ' + message.content)"),
            "{{ messages | selectattr('role', 'equalto', 'assistant') | map(attribute='content') | join }}"
            "{% for message in messages if message.role != 'assistant' %}[{{ message.content }}]{% endfor %}",
        ],
        ids=["drops", "shortens", "changes", "repeats", "moves"],
    )
    def test_a_template_that_cannot_be_spliced_renders_in_full(self, source: str, tokenizer: Tokenizer) -> None:
        chat = Chat(source, tokenizer)
        first = chat.ask(user("Hi"))
        chat.conversations.record(first, assistant("Hello"), oddly(tokenizer, "Hello"), "Hello")
        messages = (user("Hi"), assistant("Hello"), user("Bye"))
        prompt = chat.ask(*messages)
        assert chat.text_of(prompt) == chat.full(*messages)
        assert (prompt.parent, prompt.parent_length) == (None, 0)
        assert prompt.conversation_id == first.conversation_id
        assert chat.conversations.renders == {"first": 1, "full": 1}

    def test_a_conversation_goes_on_after_it_was_rendered_in_full(self, tokenizer: Tokenizer) -> None:
        limited = (
            "{% if messages | length == 3 %}{{ '!' + messages[1].content[:3] }}{% else %}" + CHATML + "{% endif %}"
        )
        chat = Chat(limited, tokenizer)
        messages = [user("Hi")]
        for kind in ("first", "full", "spliced"):
            before = chat.conversations.renders[kind]
            seen = chat.answered(*messages, answer="Hello", ids=oddly(tokenizer, "Hello"))
            assert chat.conversations.renders[kind] == before + 1
            messages += [assistant("Hello"), user("Go on")]
        assert chat.ask(*messages).tokens.ids[: len(seen)].tolist() == seen

    def test_a_template_that_puts_system_messages_first_renders_in_full(self, tokenizer: Tokenizer) -> None:
        source = (
            "{{ bos_token }}"
            "{% for message in messages if message.role == 'system' %}<{{ message.content }}>{% endfor %}"
            "{% for message in messages if message.role != 'system' %}[{{ message.content }}]{% endfor %}"
        )
        chat = Chat(source, tokenizer)
        chat.answered(user("Hi"), answer="Hello", ids=oddly(tokenizer, "Hello"))
        messages = (user("Hi"), assistant("Hello"), Message("system", "Be brief."), user("Why?"))
        assert chat.text_of(chat.ask(*messages)) == chat.full(*messages)

    @pytest.mark.parametrize(
        ("source", "way"), [(QWEN, "spliced"), (MISTRAL_WITH_TOOLS, "full")], ids=["Qwen", "Mistral"]
    )
    def test_a_template_that_renders_the_end_of_a_conversation_differently(
        self, source: str, way: str, tokenizer: Tokenizer
    ) -> None:
        """It can be spliced, unless it's because the tools move to the last question."""
        chat = Chat(source, tokenizer, tool_format="hermes")
        messages = [user("Hi")]
        for reply in ("Hello", "Good day"):
            seen = chat.answered(*messages, answer=reply, ids=oddly(tokenizer, reply), use=TestToolCalls.USE)
            messages += [assistant(reply), user("Go on")]
            prompt = chat.ask(*messages, use=TestToolCalls.USE)
            assert way == "full" or prompt.tokens.ids[: len(seen)].tolist() == seen
            assert chat.text_of(prompt) == chat.full(*messages, use=TestToolCalls.USE)
        assert chat.conversations.renders == {"first": 1, way: 2, "repeated": 1}

    def test_branches_share_what_they_have_in_common(self, tokenizer: Tokenizer) -> None:
        chat = Chat(CHATML, tokenizer)
        seen = chat.answered(user("Hi"), answer="Hello", ids=oddly(tokenizer, "Hello"))
        branches = [chat.ask(user("Hi"), assistant("Hello"), user(text)) for text in ("One", "Two")]
        for branch in branches:
            assert branch.tokens.ids[: len(seen)].tolist() == seen
        assert len({branch.history.key for branch in branches}) == 2
        assert len({branch.conversation_id for branch in branches}) == 1

    def test_of_two_answers_to_the_same_prompt_each_has_its_own_tokens(self, tokenizer: Tokenizer) -> None:
        chat = Chat(CHATML, tokenizer)
        for reply in ("Hello", "Good day"):
            seen = chat.answered(user("Hi"), answer=reply, ids=oddly(tokenizer, reply))
            prompt = chat.ask(user("Hi"), assistant(reply), user("Bye"))
            assert prompt.tokens.ids[: len(seen)].tolist() == seen

    def test_of_one_answer_in_two_spellings_the_first_stays(self, tokenizer: Tokenizer) -> None:
        chat = Chat(CHATML, tokenizer)
        seen = chat.answered(user("Hi"), answer="Hello", ids=oddly(tokenizer, "Hello"))
        chat.answered(user("Hi"), answer="Hello", ids=tokenizer.encode("Hello"))
        assert chat.ask(user("Hi"), assistant("Hello")).tokens.ids[: len(seen)].tolist() == seen

    def test_an_edited_message_makes_another_conversation(self, tokenizer: Tokenizer) -> None:
        chat = Chat(CHATML, tokenizer)
        first = chat.ask(user("Hi"))
        chat.conversations.record(first, assistant("Hello"), oddly(tokenizer, "Hello"), "Hello")
        edited = chat.ask(user("Hi!"), assistant("Hello"), user("Bye"))
        assert edited.tokens.ids.tolist() == tokenizer.encode(chat.full(user("Hi!"), assistant("Hello"), user("Bye")))
        assert edited.conversation_id != first.conversation_id
        assert chat.conversations.renders == {"first": 2}

    def test_answers_from_elsewhere_are_rendered(self, tokenizer: Tokenizer) -> None:
        chat = Chat(CHATML, tokenizer)
        start = (user("Hi"), assistant("A stranger's answer"), user("Go on"))
        seen = chat.answered(*start, answer="Hello", ids=oddly(tokenizer, "Hello"))
        messages = (*start, assistant("Hello"), user("And?"), assistant("Another stranger's"), user("Bye"))
        prompt = chat.ask(*messages)
        assert prompt.tokens.ids[: len(seen)].tolist() == seen
        assert chat.text_of(prompt) == chat.full(*messages)

    def test_tenants_do_not_share_conversations(self, tokenizer: Tokenizer) -> None:
        chat = Chat(CHATML, tokenizer)
        chat.answered(user("Hi"), answer="Hello", ids=oddly(tokenizer, "Hello"), tenant="one")
        messages = (user("Hi"), assistant("Hello"), user("Bye"))
        one, two = (chat.ask(*messages, tenant=tenant) for tenant in ("one", "two"))
        assert chat.conversations.renders == {"first": 2, "spliced": 1}
        assert two.tokens.ids.tolist() == tokenizer.encode(chat.full(*messages)) != one.tokens.ids.tolist()
        assert one.conversation_id != two.conversation_id

    def test_a_model_without_a_template_cannot_chat(self, tokenizer: Tokenizer) -> None:
        with pytest.raises(InvalidRequestError, match="no chat template"):
            Conversations(None, tokenizer, Dialect("")).prompt([user("Hi")])

    def test_no_messages_at_all_are_refused(self, tokenizer: Tokenizer) -> None:
        with pytest.raises(InvalidRequestError, match="empty") as caught:
            Chat(CHATML, tokenizer).ask()
        assert caught.value.param == "messages"

    def test_what_the_template_refuses_is_refused(self, tokenizer: Tokenizer) -> None:
        chat = Chat(MISTRAL, tokenizer)
        chat.answered(user("Hi"), answer="Hello", ids=oddly(tokenizer, "Hello"))
        with pytest.raises(InvalidRequestError, match="alternate"):
            chat.ask(user("Hi"), assistant("Hello"), assistant("Hello"))

    def test_a_forgotten_conversation_is_rendered_anew(self, tokenizer: Tokenizer) -> None:
        chat = Chat(CHATML, tokenizer, ledger_tokens=60)
        for name in ("Ada", "Bob", "Cid", "Dan"):
            chat.answered(user(f"I am {name}"), answer=f"Hello {name}", ids=oddly(tokenizer, f"Hello {name}"))
        prompts = [chat.ask(user(f"I am {name}"), assistant(f"Hello {name}"), user("Bye")) for name in ("Ada", "Dan")]
        assert chat.conversations.renders == {"first": 5, "spliced": 1}
        assert chat.text_of(prompts[0]).replace("Ada", "Dan") == chat.text_of(prompts[1])

    def test_a_conversation_forgotten_while_it_was_answered_is_not_kept_in_part(self, tokenizer: Tokenizer) -> None:
        chat = Chat(CHATML, tokenizer, ledger_tokens=60)
        chat.answered(user("Hi"), answer="Hello", ids=oddly(tokenizer, "Hello"))
        messages = (user("Hi"), assistant("Hello"), user("Bye"))
        prompt = chat.ask(*messages)
        chat.answered(user("x" * 200), answer="y" * 200, ids=oddly(tokenizer, "y" * 200))
        chat.conversations.record(prompt, assistant("See you"), tokenizer.encode("See you"), "See you")
        again = chat.ask(*messages, assistant("See you"), user("!"))
        assert chat.text_of(again) == chat.full(*messages, assistant("See you"), user("!"))


class TestEndsOfAnswers:
    """An answer may be cut by a stop string; its tokens are told only if they spell it."""

    def test_between_two_tokens(self, tokenizer: Tokenizer) -> None:
        chat = Chat(CHATML, tokenizer)
        ids = tokenizer.encode("One two three")
        assert len(ids) == 3
        seen = chat.answered(user("Hi"), answer="One two", ids=ids)
        prompt = chat.ask(user("Hi"), assistant("One two"), user("Bye"))
        assert prompt.tokens.ids[: len(seen) - 1].tolist() == seen[:-1]
        assert chat.text_of(prompt) == chat.full(user("Hi"), assistant("One two"), user("Bye"))

    def test_in_the_middle_of_a_token(self, tokenizer: Tokenizer) -> None:
        chat = Chat(CHATML, tokenizer)
        chat.answered(user("Hi"), answer="One tw", ids=tokenizer.encode("One two three"))
        messages = (user("Hi"), assistant("One tw"), user("Bye"))
        assert chat.ask(*messages).tokens.ids.tolist() == tokenizer.encode(chat.full(*messages))
        assert chat.conversations.renders == {"first": 2}

    def test_at_the_very_beginning(self, tokenizer: Tokenizer) -> None:
        chat = Chat(CHATML, tokenizer)
        seen = chat.answered(user("Hi"), answer="", ids=tokenizer.encode("Stop"))
        prompt = chat.ask(user("Hi"), assistant(""), user("Bye"))
        assert prompt.tokens.ids[: len(seen) - 1].tolist() == seen[:-1]
        assert chat.text_of(prompt) == chat.full(user("Hi"), assistant(""), user("Bye"))

    def test_with_half_a_character(self, tokenizer: Tokenizer) -> None:
        chat = Chat(CHATML, tokenizer)
        ids = tokenizer.encode("a🦜")[:-1]
        text = tokenizer.decode(ids)
        assert text.endswith("\ufffd")
        seen = chat.answered(user("Hi"), answer=text, ids=ids)
        assert chat.ask(user("Hi"), assistant(text), user("Bye")).tokens.ids[: len(seen)].tolist() == seen

    def test_with_special_tokens_in_it(self, tokenizer: Tokenizer) -> None:
        chat = Chat(CHATML, tokenizer)
        ids = [*oddly(tokenizer, "Hello"), *tokenizer.encode("<|im_end|>\nHello")]
        text = tokenizer.decode(ids)
        seen = chat.answered(user("Hi"), answer=text, ids=ids)
        assert chat.ask(user("Hi"), assistant(text), user("Bye")).tokens.ids[: len(seen)].tolist() == seen


class TestSystemMessages:
    GEMMA = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for message in messages %}<{{ message.role }}>{{ message.content }}</{{ message.role }}>{% endfor %}"
    )

    def test_a_template_without_a_place_for_it_gets_it_before_the_first_user_message(self) -> None:
        template = ChatTemplate(self.GEMMA, {})
        system = {"role": "system", "content": "Be brief."}
        question = {"role": "user", "content": "Why?"}
        assert template.render([system, question]) == "<user>Be brief.\n\nWhy?</user>"
        assert template.render([question]) == "<user>Why?</user>"
        assert template.render([system]) == "<user>Be brief.</user>"
        answer = {"role": "assistant", "content": "Yes."}
        assert template.render([system, answer, question]).startswith("<user>Be brief.</user><assistant>Yes.")

    def test_tools_come_under_the_name_that_a_template_has_for_them(self) -> None:
        template = ChatTemplate("{% for tool in xml_tools or [] %}{{ tool.name }}{% endfor %}", {})
        assert template.render([{"role": "user", "content": "?"}], [{"name": "ping"}]) == "ping"
        assert template.render([{"role": "user", "content": "?"}]) == ""


class TestToolCalls:
    CALL = ToolCall("call_1", "weather", '{"city": "Oslo", "days": 2}')
    USE = ToolUse((Tool("weather", "Forecast", {"type": "object", "properties": {"city": {"type": "string"}}}),))
    RESULT = Message("tool", "Rain <b>&</b> wind", tool_call_id="call_1")

    def test_templates_that_know_calls_get_arguments_as_values(self, tokenizer: Tokenizer) -> None:
        chat = Chat(TOOLS, tokenizer, tool_format="hermes")
        text = chat.text_of(chat.ask(user("Weather?"), assistant("", self.CALL), self.RESULT, use=self.USE))
        assert '[weather city="Oslo" days=2]' in text
        assert "Rain <b>&</b> wind" in text
        assert text.startswith('Tools: [{"type": "function", "function": {"name": "weather"')

    def test_templates_that_do_not_get_them_as_text(self, tokenizer: Tokenizer) -> None:
        chat = Chat(CHATML, tokenizer, tool_format="generic")
        text = chat.text_of(chat.ask(user("Weather?"), assistant("Let's see.", self.CALL), self.RESULT, use=self.USE))
        assert (
            'Let\'s see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}\n</tool_call>'
            in text
        )
        assert "<|im_start|>user\n<tool_response>\nRain <b>&</b> wind\n</tool_response>" in text
        assert '"description": "Forecast"' in text.partition("<|im_end|>")[0]

    @pytest.mark.parametrize(("source", "tool_format"), [(TOOLS, "hermes"), (CHATML, "generic")])
    def test_a_call_that_comes_back_in_another_form_keeps_its_tokens(
        self, source: str, tool_format: str, tokenizer: Tokenizer
    ) -> None:
        chat = Chat(source, tokenizer, tool_format=tool_format)
        generated = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo",   "days": 2}}\n</tool_call>'
        ids = oddly(tokenizer, generated)
        seen = chat.answered(user("Weather?"), answer=assistant("", self.CALL), ids=ids, text=generated, use=self.USE)
        returned = replace(self.CALL, arguments=json.dumps({"days": 2, "city": "Oslo"}, indent=2))
        prompt = chat.ask(user("Weather?"), assistant("", returned), self.RESULT, use=self.USE)
        assert prompt.tokens.ids[: len(seen)].tolist() == seen
        assert chat.conversations.renders == {"first": 1, "spliced": 1}
        tail = chat.text_of(prompt).rpartition(generated)[2]
        assert tail.startswith("<|im_end|>\n")
        assert "Rain <b>&</b> wind" in tail
        assert tail.endswith("<|im_start|>assistant\n")

    @pytest.mark.parametrize(
        "other", [replace(CALL, id="call_2"), replace(CALL, arguments='{"city": "Bergen", "days": 2}')]
    )
    def test_another_call_is_rendered(self, other: ToolCall, tokenizer: Tokenizer) -> None:
        chat = Chat(CHATML, tokenizer)
        generated = "<tool_call>…</tool_call>"
        chat.answered(user("?"), answer=assistant("", self.CALL), ids=tokenizer.encode(generated), text=generated)
        messages = (user("?"), assistant("", other), replace(self.RESULT, tool_call_id=other.id))
        assert chat.text_of(chat.ask(*messages)) == chat.full(*messages)
        assert chat.conversations.renders == {"first": 2}

    def test_other_tools_make_another_conversation(self, tokenizer: Tokenizer) -> None:
        chat = Chat(CHATML, tokenizer)
        chat.answered(user("Hi"), answer="Hello", ids=oddly(tokenizer, "Hello"), use=self.USE)
        messages = (user("Hi"), assistant("Hello"), user("Bye"))
        chat.ask(*messages, use=NO_TOOLS)
        chat.ask(*messages, use=replace(self.USE, mode="none"))
        assert chat.conversations.renders == {"first": 2, "spliced": 1}


class TestPlacing:
    """Where an answer ends in the text of a conversation, whatever the template makes of both."""

    NEMO = (
        "{% set system = messages[0].content %}{% for message in messages[1:] %}"
        "{% if message.role == 'user' %}[INST]{{ system + '\n\n' if loop.last }}{{ message.content }}[/INST]"
        "{% else %}{{ message.content }}</s>{% endif %}{% endfor %}"
    )
    # As gpt-oss has it: a call ends in a token of its own, and its name comes again with the result.
    NAMES = (
        "{% for message in messages %}{% set last = namespace(name='') %}"
        "{% if message.tool_calls %}<|call|>{{ message.content }}"
        "{% for call in message.tool_calls %}<tool_call>\n"
        '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
        "{% endfor %}<|call_end|>{% elif message.role == 'tool' %}"
        "{{ messages[1].tool_calls[loop.index0 - 2].function.name }}: {{ message.content }}<|end|>"
        "{% else %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endif %}{% endfor %}<|assistant|>"
    )

    def test_where_a_template_moves_text_known_answers_keep_their_tokens(self, tokenizer: Tokenizer) -> None:
        chat = Chat(self.NEMO, tokenizer)
        messages: list[Message] = [Message("system", "Be brief."), user("Hi")]
        spelled: list[list[int]] = []
        for reply in ("Hello there", "Good day", "See you"):
            spelled.append(oddly(tokenizer, reply))
            chat.answered(*messages, answer=reply, ids=spelled[-1])
            messages += [assistant(reply), user(f"{reply}?")]
            prompt = chat.ask(*messages)
            assert chat.text_of(prompt) == chat.full(*messages)
            ids = prompt.tokens.ids.tolist()
            assert all(odd in [ids[at : at + len(odd)] for at in range(len(ids))] for odd in spelled)
        assert chat.conversations.renders["full"] == 3

    @pytest.mark.parametrize("count", [1, 2])
    def test_calls_whose_names_come_again_with_the_results(self, count: int, tokenizer: Tokenizer) -> None:
        chat = Chat(self.NAMES, tokenizer, tool_format="hermes")
        calls = [
            ToolCall(f"call_{n}", "weather" if n else "ping", '{"city": "Oslo"}' if n else "{}") for n in range(count)
        ]
        text = "".join(
            f'<tool_call>\n{{"name": "{call.name}", "arguments": {call.arguments}}}\n</tool_call>' for call in calls
        )
        answer = Message("assistant", "", tuple(calls))
        seen = chat.answered(user("?"), answer=answer, ids=oddly(tokenizer, text), text=text)
        results = [Message("tool", f"ping: {call.name}", tool_call_id=call.id) for call in calls]
        messages = (user("?"), answer, *results)
        prompt = chat.ask(*messages)
        assert prompt.tokens.ids[: len(seen)].tolist() == seen
        assert chat.full(*messages).endswith(tokenizer.decode(prompt.tokens.ids[len(seen) :], skip_special=False))
        tail = tokenizer.decode(prompt.tokens.ids[len(seen) :], skip_special=False)
        assert tail.startswith("<|call_end|>ping: ping: ping<|end|>")

    def test_more_messages_than_origins(self, tokenizer: Tokenizer) -> None:
        chat = Chat(CHATML, tokenizer)
        messages = [user("Hi") if n % 2 == 0 else assistant("Hello") for n in range(2 * ORIGINS + 3)]
        seen = chat.answered(*messages, answer="Good day", ids=oddly(tokenizer, "Good day"))
        messages += [assistant("Good day"), user("Bye")]
        prompt = chat.ask(*messages)
        assert prompt.tokens.ids[: len(seen)].tolist() == seen
        assert chat.text_of(prompt) == chat.full(*messages)

    @pytest.mark.parametrize("count", [4, 100, 129, 131, 204, 256, 300])
    def test_text_that_moves_behind_any_number_of_messages(self, count: int, tokenizer: Tokenizer) -> None:
        source = CHATML.replace("{%- for message in messages %}", "{%- for message in messages[1:] %}", 1)
        chat = Chat(source + "{{ messages[0].content }}", tokenizer)
        messages = [Message("system", "Be brief."), *(user("Hi") if n % 2 else assistant("Yes") for n in range(count))]
        chat.answered(*messages, answer="Good day", ids=oddly(tokenizer, "Good day"))
        messages += [assistant("Good day"), user("Bye")]
        assert chat.text_of(chat.ask(*messages)) == chat.full(*messages)
        assert chat.conversations.renders["full"] == 1

    def test_tools_that_move_are_told_once(self, tokenizer: Tokenizer) -> None:
        source = CHATML.replace(
            "{{- '<|im_start|>'",
            "{%- if loop.last and tools %}{{ tools[0].function.description }}{% endif %}\n{{- '<|im_start|>'",
            1,
        )
        chat = Chat(source, tokenizer, tool_format="hermes")
        use = TestToolCalls.USE
        messages = [user("Hi")]
        for _ in range(3):
            chat.answered(*messages, answer="Hello", ids=oddly(tokenizer, "Hello"), use=use)
            messages += [assistant("Hello"), user("And?")]
            text = chat.text_of(chat.ask(*messages, use=use))
            assert text.count("Forecast") == 1
            assert text == chat.full(*messages, use=use)

    def test_a_further_call_that_is_cut_off(self, tokenizer: Tokenizer) -> None:
        chat = Chat(CHATML, tokenizer)
        call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}\n</tool_call>'
        text = call + '\n<tool_call>\n{"name": "weather", "arg'
        answer = assistant(text[len(call) :].strip(), TestToolCalls.CALL)
        seen = chat.answered(user("?"), answer=answer, ids=oddly(tokenizer, text), text=text)
        prompt = chat.ask(user("?"), answer, TestToolCalls.RESULT)
        tail = tokenizer.decode(prompt.tokens.ids[len(seen) :], skip_special=False)
        assert tail.startswith("<|im_end|>")

    def test_an_answer_that_says_nothing_where_the_template_wants_one(self, tokenizer: Tokenizer) -> None:
        strict = "{% for m in messages if not m.content %}{{ raise_exception('empty') }}{% endfor %}" + CHATML
        chat = Chat(strict, tokenizer)
        seen = chat.answered(user("Hi"), answer="", ids=[])
        prompt = chat.ask(user("Hi"), assistant(""), user("Bye"))
        assert prompt.tokens.ids[: len(seen)].tolist() == seen
        assert chat.text_of(prompt) == Chat(CHATML, tokenizer).full(user("Hi"), assistant(""), user("Bye"))


class TestSetting:
    SWITCHED = CHATML + "{% if enable_thinking is defined and not enable_thinking %}<no_think>{% endif %}"

    def ask(self, chat: Chat, *messages: Message, **kwargs: Any) -> Prompt:
        return chat.conversations.prompt(messages, Setting(template_kwargs=kwargs))

    def test_what_a_template_has_no_name_for_makes_no_difference(self, tokenizer: Tokenizer) -> None:
        chat = Chat(self.SWITCHED, tokenizer)
        assert self.ask(chat, user("Hi"), thinking=True) is self.ask(chat, user("Hi"))

    def test_other_variables_make_another_conversation(self, tokenizer: Tokenizer) -> None:
        chat = Chat(self.SWITCHED, tokenizer)
        chat.conversations.record(self.ask(chat, user("Hi")), assistant("Hello"), oddly(tokenizer, "Hello"), "Hello")
        going_on = (user("Hi"), assistant("Hello"), user("Bye"))
        assert self.ask(chat, *going_on, enable_thinking=False).parent is None
        assert self.ask(chat, *going_on).parent is not None
        assert chat.text_of(self.ask(chat, *going_on, enable_thinking=False)).endswith("<no_think>")

    def test_variables_that_the_server_sets_are_refused(self) -> None:
        with pytest.raises(InvalidRequestError, match="leave it out"):
            Setting(template_kwargs={"tools": []})

    @pytest.mark.parametrize(
        "kwargs",
        [{"a": float("nan")}, {"a": "\ud800"}, {"a": json.loads("[" * 80 + "]" * 80)}],
        ids=["nan", "text", "deep"],
    )
    def test_variables_must_be_json(self, kwargs: dict[str, Any]) -> None:
        with pytest.raises(InvalidRequestError, match="valid JSON"):
            Setting(template_kwargs=kwargs)

    def test_earlier_reasoning_makes_another_prompt(self, tokenizer: Tokenizer) -> None:
        source = CHATML.replace("message.content", "(message.reasoning_content or '') + message.content")
        chat = Chat(source + "{{ messages[0].content }}", tokenizer)
        chat.answered(
            user("Hi"), assistant("A"), user("Go on"), answer="B", ids=oddly(tokenizer, "Hello"), text="Hello"
        )
        rest = (user("Go on"), assistant("B"), user("Bye"))
        one, two = (chat.ask(user("Hi"), replace(assistant("A"), reasoning=hm), *rest) for hm in ("Hm.", ""))
        assert "Hm.A" in chat.text_of(one)
        assert "Hm.A" not in chat.text_of(two)

    def test_deeply_nested_arguments_are_told_as_text(self, tokenizer: Tokenizer) -> None:
        deep = '{"a": ' + "[" * 900 + "]" * 900 + "}"
        call = assistant("", ToolCall("call_1", "weather", deep))
        assert "[[[" in Chat(CHATML, tokenizer).text_of(Chat(CHATML, tokenizer).ask(user("?"), call))

    def test_reasoning_is_told_and_is_no_part_of_a_conversation(self, tokenizer: Tokenizer) -> None:
        source = CHATML.replace("message.content", "(message.reasoning_content or '') + message.content")
        chat = Chat(source, tokenizer)
        thoughts = [replace(assistant("Hello"), reasoning=thought) for thought in ("Hm. ", "Well. ")]
        asked = [chat.ask(user("Hi"), thought, user("Bye")) for thought in thoughts]
        assert ["Hm. Hello" in chat.text_of(prompt) for prompt in asked] == [True, False]
        seen = chat.answered(user("Hi"), answer=thoughts[0], ids=oddly(tokenizer, "Hm. Hello"), text="Hm. Hello")
        for returned in (*thoughts, assistant("Hello")):
            prompt = chat.ask(user("Hi"), returned, user("Bye"))
            assert prompt.tokens.ids[: len(seen)].tolist() == seen

    @pytest.mark.parametrize(
        ("source", "told"),
        [
            ("{% for tool in tools %}{{ tool }}{% endfor %}none", "none"),
            ("{{ 'no tools' if tools is none }}", "no tools"),
        ],
    )
    def test_no_tools_as_the_template_takes_them(self, source: str, told: str) -> None:
        assert ChatTemplate(source, {}).render([{"role": "user", "content": "?"}]) == told

    @pytest.mark.parametrize("test", ["is none", "== ''"])
    def test_no_text_beside_calls_as_the_template_takes_it(self, test: str, tokenizer: Tokenizer) -> None:
        source = (
            "{% for m in messages %}{% if m.content " + test + " %}[{{ m.tool_calls[0].function.name }}]"
            "{% else %}{{ m.content }}{% endif %}{% endfor %}"
        )
        chat = Chat(source, tokenizer)
        messages = FORMATS["hermes"](Tags()).messages([assistant("", TestToolCalls.CALL)], NO_TOOLS)
        assert chat.template.render(messages) == "[weather]"
        assert "[a_function]" in chat.template.shown


Turns = st.lists(
    st.tuples(
        st.integers(0, 30),  # which conversation goes on
        st.sampled_from(["Hi", "Go on", " \n", "é🦜", "<|im_start|>"]),
        st.sampled_from(["Hello", "No", "", " a  b ", "é🦜", "ok\n"]),
        st.booleans(),
        st.sampled_from(["", "other"]),
    ),
    max_size=12,
)


@settings(max_examples=60)
@given(turns=Turns, ledger_tokens=st.sampled_from([40, 150, 10_000]))
def test_however_conversations_branch_prompts_read_as_rendered_and_keep_known_tokens(
    tokenizer: Tokenizer, turns: list[tuple[int, str, str, bool, str]], ledger_tokens: int
) -> None:
    chat = Chat(CHATML, tokenizer, ledger_tokens=ledger_tokens)
    conversations: list[tuple[Message, ...]] = [()]
    said: dict[tuple[str, tuple[Message, ...]], list[int]] = {}
    for which, question, reply, odd, tenant in turns:
        messages = (*conversations[which % len(conversations)], user(question))
        prompt = chat.ask(*messages, tenant=tenant)
        assert chat.text_of(prompt) == chat.full(*messages)
        known = [said[tenant, messages[:count]] for count in range(len(messages)) if (tenant, messages[:count]) in said]
        if prompt.parent is not None:
            assert prompt.tokens.ids[: prompt.parent_length].tolist() in known
        if known and ledger_tokens == 10_000:
            assert prompt.tokens.ids[: len(known[-1])].tolist() == known[-1]
        ids = (
            [token for character in reply for token in tokenizer.encode(character)] if odd else tokenizer.encode(reply)
        )
        chat.conversations.record(prompt, assistant(reply), ids, reply)
        answered = (*messages, assistant(reply))
        said.setdefault((tenant, answered), [*prompt.tokens.ids.tolist(), *ids])
        conversations.append(answered)


def test_many_threads_may_talk_at_once(tokenizer: Tokenizer) -> None:
    chat = Chat(CHATML, tokenizer, ledger_tokens=400)
    failures: Counter[str] = Counter()

    def talk(name: str) -> None:
        messages: tuple[Message, ...] = ()
        for turn in range(12):
            messages = (*messages, user(f"{name} {turn}"))
            prompt = chat.ask(*messages)
            failures[name] += chat.text_of(prompt) != chat.full(*messages)
            chat.conversations.record(prompt, assistant("Yes"), oddly(tokenizer, "Yes"), "Yes")
            messages = (*messages, assistant("Yes"))

    threads = [threading.Thread(target=talk, args=(name,)) for name in ("Ada", "Bob", "Cid")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == {"Ada": 0, "Bob": 0, "Cid": 0}
    assert sum(chat.conversations.renders.values()) == 36
