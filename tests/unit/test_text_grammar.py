"""Grammars of text, as they are enforced in the JSON that holds it; and reading that text as it comes."""

import json
import random

import pytest
from llguidance import LLMatcher, LLTokenizer

from slipstream.chat import Tool, ToolUse
from slipstream.chat.answers import Dialect
from slipstream.chat.schema import Loss
from slipstream.chat.schema.losses import UnsupportedError
from slipstream.chat.setting import TextGrammar
from slipstream.chat.text_grammar import text_rules
from slipstream.server.custom_tools import InputReader, custom_arguments, input_of

BYTES = LLTokenizer("byte")


def fits(grammar: TextGrammar, text: str) -> bool:
    """Whether a text, as JSON spells it, fits a grammar."""
    source = "\n".join(("start: text_start", *text_rules(grammar, "text_")))
    matcher = LLMatcher(BYTES, LLMatcher.grammar_from_lark(source), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    tokens = list(json.dumps(text, ensure_ascii=False)[1:-1].encode())
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("definition", "good", "bad"),
    [
        ('start: "a"?rest\nrest: "b"', ["ab", "b"], ["a", "aab"]),
        ('?start: a\n!a: "x" -> name', ["x"], ["", "xx"]),
        ('  start: "a"\n    | "b"', ["a", "b"], ["ab"]),
        ('start: "a" ~ 2..3', ["aa", "aaa"], ["a", "aaaa"]),
        ('start: "a"{1,2} [ "b" ]', ["a", "aab"], ["", "abb"]),
        (r'start: "\d" "\x41" "\""', ['\\dA"'], ["1A", "dA"]),
        ('start: "a".."c"+', ["abc"], ["d", ""]),
        (r"start: /[a-c\x7e]ß[X-b]/i", ["BßX", "~ßb"], ["DßX", "aSSX", "aßc"]),
        ('start: A.2\nA: /[^"]/ // as it comes', ["a", "\\", "\n"], ['"', "ab"]),
        ('%import common.INT -> COUNT\nstart: "\\n" COUNT', ["\n12"], ["12", "\n"]),
    ],
)
def test_lark(definition: str, good: list[str], bad: list[str]) -> None:
    grammar = TextGrammar("lark", definition)
    assert [text for text in good if not fits(grammar, text)] == []
    assert [text for text in bad if fits(grammar, text)] == []


@pytest.mark.parametrize(
    ("syntax", "definition"),
    [
        ("regex", "("),
        ("regex", "["),
        ("regex", "a{2,1}"),
        ("regex", "a**"),
        ("regex", "a{1,99999999999999999999}"),
        ("lark", "start: /(/"),
        ("lark", 'start: "a'),
        ("lark", "start: <[2]>"),
        ("lark", "start: <|im_end|>"),
        ("lark", "start: %json {}"),
        ("lark", 'start: "a" & "b"'),
        ("lark", r'start: "\ud800"'),
    ],
)
def test_what_is_no_grammar(syntax: str, definition: str) -> None:
    with pytest.raises(ValueError, match="is not understood"):
        text_rules(TextGrammar(syntax, definition), "")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("syntax", "definition", "why"),
    [
        ("regex", "(?=a)b", "assert"),
        ("regex", r"(a)\1", "groupref"),
        ("regex", "(?i:a)b", "subpattern"),
        ("regex", r"\p{L}", "bad escape"),
        ("regex", "(?<name>a)", "unknown extension"),
        ("regex", "(" * 3000 + ")" * 3000, "too deeply"),
        ("lark", 'start: "a"\n%ignore " "', "%ignore"),
        ("lark", "%import common.NOPE\nstart: NOPE", "NOPE"),
        ("lark", "start: /a/g", "flag"),
    ],
)
def test_what_cant_be_expressed(syntax: str, definition: str, why: str) -> None:
    grammar = TextGrammar(syntax, definition)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match=why):
        text_rules(grammar, "")
    written = Dialect("<tool_call>{").grammar(
        ToolUse((Tool.of_text("f", text=grammar),), "required"), None, opens_reasoning=False
    )
    assert written is not None
    (loss,) = written.losses
    assert (loss.tool, loss.of_text) == ("f", True)
    assert why in loss.keyword


@pytest.mark.parametrize("name", ["qwen3-coder", "glm-4", "gemma-4", "lfm2"])
def test_formats_without_json_say_that_a_grammar_is_let_go(name: str) -> None:
    tools = Tool.of_text("f", text=TextGrammar("regex", "a+")), Tool.of_text("g")
    written = Dialect("", tool_format=name).grammar(ToolUse(tools), None, opens_reasoning=False)
    assert written is not None
    assert written.losses == (Loss("the model does not write arguments as JSON", "f", of_text=True),)


@pytest.mark.parametrize("ascii", [False, True])
def test_an_input_reads_alike_however_it_comes(ascii: bool) -> None:
    rng = random.Random(7)
    for _ in range(300):
        text = "".join(rng.choice('"\\\n\x01 {}é\u2028😀a') for _ in range(rng.randrange(9)))
        arguments = json.dumps({"input": text}) if ascii else custom_arguments(text)
        reader, said, at = InputReader(), "", 0
        while at < len(arguments):
            size = rng.randint(1, 4)
            said += reader.feed(arguments[at : at + size])
            at += size
            assert text.startswith(said)
        assert said == text == input_of(arguments)
