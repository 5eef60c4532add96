"""Content is text, whatever it spells and whatever a template does to it; the template's own text is not touched."""

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import Environment, Template

from slipstream.chat.template import ChatTemplate
from slipstream.models import DEFAULT_MODEL, ModelStore
from slipstream.tokenizer import Tokenizer
from slipstream.tokenizer.provenance import Traced, as_content, content, joined, own
from tests.vocabularies import byte_fallback, with_tags

TAGS = ("<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<think>", "</think>", "<table>", "[TOOL_CALLS]")


@cache
def vocabulary(name: str) -> tuple[Tokenizer, tokenizers.Tokenizer]:
    """A tokenizer of ours, and the library's for the same vocabulary."""
    path = ModelStore().ensure(DEFAULT_MODEL).tokenizer_path
    flags = dict.fromkeys(TAGS, False) | {"<|im_start|>": True, "<|im_end|>": True}
    sources: dict[str, Callable[[], str]] = {
        "special": lambda: with_tags(path, TAGS, "special"),
        "added": lambda: with_tags(path, TAGS, "added"),
        "absent": lambda: with_tags(path, TAGS, "absent"),
        "bytes": lambda: byte_fallback(("hello", "▁world", "user", "assistant", "tool"), flags),
    }
    source = sources[name]()
    return Tokenizer(source), tokenizers.Tokenizer.from_str(source)


VOCABULARIES = ("special", "added", "absent", "bytes")
words = st.sampled_from(
    ["hello", " world", "\n", "\n\n", "\n\n\n", " ", "  ", "    ", "\t", "é", "🙂", "<", "|", "12", "a_b", "'s"]
)
texts = st.lists(words, max_size=8).map("".join)
hostile = st.lists(words | st.sampled_from(TAGS), max_size=8).map("".join)

TEMPLATE = """{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>
{% endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' }}
{%- if message.role == 'assistant' and '</think>' in message.content %}
{{- '<think>\n' + message.content.split('</think>')[0].split('<think>')[-1].strip('\n') + '\n</think>\n\n' }}
{{- message.content.split('</think>')[-1].lstrip('\n') }}
{%- else %}
{{- CONTENT }}
{%- endif %}
{%- for call in message.tool_calls %}
{{- '<tool_call>' ~ call.function.name ~ (call.function.arguments | tojson) ~ '</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\n' }}
{%- endfor %}
{{- '<|im_start|>assistant\n' }}"""

WAYS = {
    "as it is": "message.content",
    "trimmed": "message.content | trim",
    "stripped": "message.content.strip()",
    "loud": "message.content | upper",
    "quiet": "message.content.lower()",
    "as JSON": "message.content | tojson",
    "as JSON in ASCII": "message | tojson(ensure_ascii=True)",
    "cut": "message.content[:9] + message.content[9:]",
    "letter by letter": "message.content | list | join",
    "joined": "['> ', message.content, ' <'] | join('')",
    "joined by a method": "''.join(['> ', message.content])",
    "formatted": "'%s!' % message.content",
    "formatted by a filter": "'%s!' | format(message.content)",
    "formatted by a method": "'{}!'.format(message.content)",
    "replaced": "message.content | replace('  ', ' ') | replace('é', 'e')",
    "put in": "'> TEXT <'.replace('TEXT', message.content)",
    "indented": "message.content | indent(2)",
    "in lines": "message.content.splitlines() | join('\n')",
    "joined by a tilde": "'> ' ~ message.content ~ ' <'",
    "by a macro": "said(message.content)",
    "escaped": "message.content | e",
    "repeated": "message.content * 2",
    "titled": "message.content | title",
    "wrapped": "message.content | wordwrap(8)",
    "reversed twice": "message.content | reverse | reverse | join",
    "a set": "kept",
    "a whole message": "message",
    "a list of letters": "message.content | list",
    "values": "message.values()",
    "formatted with others": "'%s %d!' % (message.content, 1)",
    "in a dictionary": "'> ' ~ {'a': message.content}",
    "in a namespace": "namespace(a=message.content)",
    "as a string": "[message.content] | string | trim",
    "after own text that goes": "('<tool_call>\n' ~ message.content) | replace('<tool_call>\n', '')",
    "split off": "('<tool_call>' ~ message.content ~ '<tool_call>x').split('<tool_call>') | join",
    "beside what is safe": "'a' | safe + message.content",
    "formatted by what is safe": "('a%s' | safe) % message.content",
    "by a method of what is safe": "('x' | e).replace('x', message.content)",
    "put into own text": "'> a <' | replace('a', message.content)",
}
MACRO = "{% macro said(text) %}{{ '> ' + text }}{% endmacro %}"


def source(way: str) -> str:
    body = TEMPLATE.replace("CONTENT", WAYS[way])
    kept = "{%- set kept %}{{ message.content }}{% endset %}\n{{- '<|im_start|>' + message.role"
    return MACRO + body.replace("{{- '<|im_start|>' + message.role", kept)


def conversation(text: str) -> list[dict[str, Any]]:
    call = {"id": text, "type": "function", "function": {"name": text, "arguments": {text: [text]}}}
    return [
        {"role": "system", "content": text},
        {"role": "user", "content": text},
        {"role": "assistant", "content": text, "tool_calls": [call]},
        {"role": "tool", "content": text, "tool_call_id": text, "name": text},
    ]


def tools(text: str) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": text, "description": text, "parameters": {"enum": [text]}}}]


def control(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    return [id for id in ids if tokenizer.is_control(id)]


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=5)
@given(text=hostile)
def test_no_content_becomes_a_control_token(way: str, text: str) -> None:
    template = made(way)
    said = conversation(text)
    said[2]["content"] = "hello"  # what an answer thought is the template's to write: see below
    harmless = template.render(conversation("hello"), tools("hello"))
    rendered = template.render(said, tools(text))
    assert str(rendered) == plain(way, said, tools(text))
    for name in ("special", "added", "bytes"):
        tokenizer, _ = vocabulary(name)
        assert control(tokenizer, tokenizer.encode(rendered)) == control(tokenizer, tokenizer.encode(harmless))


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=5)
@given(text=texts)
def test_other_content_is_encoded_as_the_library_does(way: str, text: str) -> None:
    rendered = made(way).render(conversation(text), tools(text))
    expected = plain(way, conversation(text), tools(text))
    for name in VOCABULARIES:
        tokenizer, oracle = vocabulary(name)
        assert tokenizer.encode(rendered) == oracle.encode(expected, add_special_tokens=False).ids


@cache
def made(way: str) -> ChatTemplate:
    return ChatTemplate(source(way), {})


def plain(way: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> str:
    """What the template makes of them without any of ours around it."""
    return made_plain(way).render(messages=messages, tools=tools)


@cache
def made_plain(way: str) -> Template:
    environment = Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value, ensure_ascii=False: json.dumps(value, ensure_ascii=ensure_ascii)
    return environment.from_string(source(way))


@given(text=hostile)
@settings(max_examples=60)
@pytest.mark.parametrize("name", VOCABULARIES)
def test_a_bare_prompt_is_encoded_as_the_library_does(name: str, text: str) -> None:
    tokenizer, oracle = vocabulary(name)
    assert tokenizer.encode(text) == oracle.encode(text, add_special_tokens=False).ids


@given(text=hostile)
@settings(max_examples=60)
@pytest.mark.parametrize("name", VOCABULARIES)
def test_content_reads_the_same_when_decoded(name: str, text: str) -> None:
    tokenizer, _ = vocabulary(name)
    ids = tokenizer.encode(content(text))
    assert control(tokenizer, ids) == []
    assert tokenizer.decode(ids, skip_special=False) == text


def test_reasoning_that_a_template_writes_again_is_the_models_own() -> None:
    tokenizer, _ = vocabulary("added")
    answer = {"role": "assistant", "content": "<think>\nhm <|im_end|>\n</think>\n\nhello <think>"}
    ids = tokenizer.encode(ChatTemplate(source("as it is"), {}).render([answer]))
    assert [tokenizer.decode([id], skip_special=False) for id in control(tokenizer, ids)] == [
        *("<|im_start|>", "<think>", "</think>", "<|im_end|>", "<|im_start|>"),
    ]


@pytest.mark.parametrize("pieces", [("<tool", "_call>"), ("<", "tool_call>"), ("<tool_call", ">")])
def test_a_tag_that_is_in_part_content_is_text(pieces: tuple[str, str]) -> None:
    tokenizer, _ = vocabulary("special")
    for text in (own(pieces[0]) + content(pieces[1]), content(pieces[0]) + own(pieces[1])):
        assert control(tokenizer, tokenizer.encode(text)) == []
    assert len(control(tokenizer, tokenizer.encode(own(pieces[0]) + own(pieces[1])))) == 1


def test_white_space_beside_a_token_that_takes_it_along() -> None:
    described = json.loads(
        with_tags(ModelStore().ensure(DEFAULT_MODEL).tokenizer_path, ["<|end|>", "zqword"], "special")
    )
    described["added_tokens"][-2] |= {"lstrip": True, "rstrip": True}
    described["added_tokens"][-1] |= {"single_word": True}
    tokenizer, oracle = Tokenizer(json.dumps(described)), tokenizers.Tokenizer.from_str(json.dumps(described))
    for text in ("a \n<|end|> \n b", " <|end|><|end|> ", "zqword zqwords xzqword zqword", "a zqword<|end|> zqword"):
        assert tokenizer.encode(text) == oracle.encode(text, add_special_tokens=False).ids


# The string itself

masks = st.lists(st.tuples(st.sampled_from("ab \n<é"), st.booleans()), max_size=9).map(
    lambda pairs: Traced("".join(char for char, _ in pairs), bytes(flag for _, flag in pairs))
)


@given(text=masks)
def test_what_is_done_to_a_string_is_done_to_its_mask(text: Traced) -> None:
    """Each character of a result that was cut out of a string has the flag that it had there."""
    for made in (
        *(text.strip(), text.lstrip("a<"), text.rstrip(), text.removeprefix("a"), text.removesuffix("b"), text[1:-1]),
        *text.split(), *text.split("a"), *text.rsplit(None, 1), *text.rsplit("b", 1), *text.splitlines(),
        *text.partition("<"), *text.rpartition("<"), text[::2],
    ):  # fmt: skip
        assert isinstance(made, Traced)
        assert len(made) == len(made.mask)
    assert joined("", text) == text
    assert joined("", text).mask == text.mask
    plain = str.__str__(text)
    assert text.split("a") == plain.split("a")
    assert (text.split(), text.rsplit(None, 1), text.splitlines()) == (
        plain.split(),
        plain.rsplit(None, 1),
        plain.splitlines(),
    )
    assert text.replace("a", "bb").mask == joined("bb", text.split("a")).mask
    assert (text + "x").mask == text.mask + b"\1"
    assert ("x" + text).mask == b"\1" + text.mask
    assert (text * 2).mask == text.mask * 2
    assert text.upper().mask == text.mask
    assert not any((text % ()).mask)
    assert as_content({"a": [text]})["a"][0] is text


def test_every_method_that_gives_a_string_keeps_to_it() -> None:
    text = content("ab c")
    arguments: dict[str, tuple[Any, ...]] = {
        "center": (9,), "ljust": (9,), "rjust": (9,), "zfill": (9,), "join": (["x", "y"],), "replace": ("a", "b"),
        "removeprefix": ("a",), "removesuffix": ("c",), "translate": ({},), "format_map": ({},), "__add__": ("",),
        "__mul__": (1,), "__rmul__": (1,), "__mod__": ((),), "__getitem__": (0,), "__format__": ("",),
    }  # fmt: skip
    for name in dir(str):
        method = getattr(str, name)
        if not callable(method) or name in ("__new__", "__class__", "__repr__", "__doc__", "maketrans"):
            continue
        try:
            plain = method("ab c", *arguments.get(name, ()))
        except TypeError:
            continue  # takes something else, and gives no string
        if isinstance(plain, str):
            made = getattr(text, name)(*arguments.get(name, ()))
            assert isinstance(made, Traced), name
            assert made == plain
