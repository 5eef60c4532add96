"""Prompts over the vocabularies of real models have the ids that `transformers` gives them."""

import json
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.chat import ChatTemplate, Conversations, Message, Setting, Tool, ToolCall, ToolUse
from slipstream.chat.answers import Dialect
from slipstream.tokenizer import Tokenizer
from tests.models.families import FAMILIES, Family
from tests.real_vocabularies import NpmMissingError, vocabulary

pytestmark = pytest.mark.models

USE = ToolUse((Tool("look_up", "Find something", {"type": "object", "properties": {"what": {"type": "string"}}}),))
CALL = ToolCall("abcdefghi", "look_up", '{"what": "a & b \\"c\\""}')
texts = st.lists(
    st.sampled_from(
        [
            "hello",
            " world",
            "\n",
            "\n\n",
            " ",
            "   ",
            "\t",
            "é",
            "日本",
            "🙂",
            "<",
            "|",
            ">",
            "12345",
            "a_b",
            "'s",
            "[x]",
        ]
    ),
    max_size=8,
).map("".join)


@cache
def judge(family: Family) -> Any:
    """The library's tokenizer with the family's vocabulary and template."""
    from transformers import PreTrainedTokenizerFast  # takes seconds

    try:
        path = vocabulary(family.vocabulary)
    except NpmMissingError as error:
        pytest.skip(str(error))
    tokens = {"eos_token": family.eos} | ({"bos_token": family.bos} if family.bos else {})
    return PreTrainedTokenizerFast(tokenizer_file=str(path), chat_template=family.template, **tokens)


@cache
def ours(family: Family) -> tuple[ChatTemplate, Tokenizer, Dialect]:
    tokenizer = Tokenizer.from_file(vocabulary(family.vocabulary))
    template = ChatTemplate(family.template, {"eos_token": family.eos, "bos_token": family.bos or ""})
    return template, tokenizer, Dialect(template.shown, tokenizer)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@settings(max_examples=40)
@given(first=texts, said=texts, result=texts, last=texts)
def test_ids_are_the_library_s(family: Family, first: str, said: str, result: str, last: str) -> None:
    library = judge(family)
    template, tokenizer, dialect = ours(family)
    messages = [
        Message("system", f"Be brief.{first}"),
        Message("user", f"?{first}"),
        Message("assistant", "", (CALL,)),
        Message("tool", result, tool_call_id=CALL.id, name=CALL.name),
        Message("assistant", f"Well{said}"),
        Message("user", f"{last}!"),
    ]
    form = dialect.tool_format
    plain = json.loads(json.dumps(form.messages(messages, USE)))
    expected = library.apply_chat_template(
        plain, tools=form.template_tools(USE), add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert Conversations(template, tokenizer, dialect).prompt(messages, Setting(USE)).tokens.ids.tolist() == expected
