"""Tool-call formats: grammars that accept what parsers read, and parsers that do not care how text was cut."""

import json
import time
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer

from slipstream.chat.answers import AnswerReader, Dialect
from slipstream.chat.formats import FORMATS, choose_format
from slipstream.chat.messages import Message
from slipstream.chat.reading import AnswerDelta
from slipstream.chat.setting import Tool, ToolUse
from slipstream.chat.tags import Tags
from slipstream.errors import InvalidRequestError, ModelError
from slipstream.models import Model
from tests.unit.families import ONE_CALL, TEMPLATES, text_of, written

WEATHER = Tool(
    "get_weather",
    "Weather of a city",
    {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "unit": {"type": "string", "enum": ["°C", "°F"]},
            "days": {"type": "integer", "minimum": 1, "maximum": 14},
            "where": {"$ref": "#/$defs/Where"},
        },
        "required": ["city"],
        "$defs": {"Where": {"type": "object", "properties": {"lat": {"type": "number"}}, "required": ["lat"]}},
    },
)
PING = Tool("ping")
USE = ToolUse((WEATHER, PING))
CALL = '{"name": "get_weather", "arguments": {"city": "Zürich \\"Nord\\" {x}", "where": {"lat": 47.3}}}'

# Per format: an answer with text and calls, one with a call alone, what the calls must read as.
RECORDED: dict[str, list[tuple[str, str, list[tuple[str, dict[str, object]]]]]] = {
    "hermes": [
        (f"Let me look.\n<tool_call>\n{CALL}\n</tool_call>", "Let me look.", [("get_weather", {})]),
        (
            f'<tool_call>\n{CALL}\n</tool_call>\n<tool_call>\n{{"name": "ping", "arguments": {{}}}}\n</tool_call>',
            "",
            [("get_weather", {}), ("ping", {})],
        ),
        ("A < B, <tool, <tool_cal and no call\n ", "A < B, <tool, <tool_cal and no call\n ", []),
        ('<tool_call>{ "arguments" : {"a":[1, {"b":"}"}]} , "name":"ping" }</tool_call>', "", [("ping", {})]),
    ],
    "llama3": [
        ('{"name": "get_weather", "parameters": {"city": "Bern", "days": 3}}', "", [("get_weather", {})]),
        ("Just text {with braces}.", "Just text {with braces}.", []),
        ('\n{"name": "ping", "parameters": {}}', '\n{"name": "ping", "parameters": {}}', []),
        ('{"name": "Bern", "days": 3}', '{"name": "Bern", "days": 3}', []),
    ],
    "mistral": [
        (
            f'Sure.[TOOL_CALLS][{CALL}, {{"name": "ping", "arguments": {{}}}}]',
            "Sure.",
            [("get_weather", {}), ("ping", {})],
        ),
        ("[TOOL is not it", "[TOOL is not it", []),
    ],
    "qwen3-coder": [
        (
            "Now:\n<tool_call>\n<function=get_weather>\n<parameter=city>\nNew\n York <b>\n</parameter>\n"
            "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>\n"
            "<tool_call>\n<function=ping>\n</function>\n</tool_call>",
            "Now:",
            [("get_weather", {"city": "New\n York <b>", "days": 3}), ("ping", {})],
        ),
    ],
}
RECORDED["generic"] = RECORDED["hermes"]
CASES = [(name, *case) for name, cases in RECORDED.items() for case in cases]


def dialect(name: str, reasoning: str = "<think></think>") -> Dialect:
    """Of a vocabulary without any of its tags."""
    return Dialect(reasoning, tool_format=name)


def read(name: str, pieces: Iterable[str], *, opens_reasoning: bool = False) -> AnswerReader:
    """The reader after all pieces, having checked that its deltas add up to its message."""
    reader = AnswerReader(dialect(name), USE, opens_reasoning=opens_reasoning)
    deltas: list[AnswerDelta] = []
    for piece in pieces:
        deltas += reader.feed(piece)
    deltas += reader.feed("", last=True)
    message = reader.message
    assert "".join(delta.text for delta in deltas) == message.text
    assert "".join(delta.reasoning for delta in deltas) == reader.reasoning
    begun = [(delta.index, delta.id, delta.name) for delta in deltas if delta.id is not None]
    assert begun == [(index, call.id, call.name) for index, call in enumerate(message.tool_calls)]
    for index, call in enumerate(message.tool_calls):
        assert "".join(delta.arguments for delta in deltas if delta.index == index) == call.arguments
    return reader


def essence(message: Message) -> object:
    return message.text, [(call.name, call.arguments) for call in message.tool_calls]


@pytest.mark.parametrize(("name", "text", "shown", "calls"), CASES)
def test_recorded_answers_parse_alike_whole_and_cut_anywhere(
    name: str, text: str, shown: str, calls: list[tuple[str, dict[str, object]]]
) -> None:
    whole = read(name, [text]).message
    assert whole.text == shown
    assert [call.name for call in whole.tool_calls] == [called for called, _ in calls]
    for call, (_, arguments) in zip(whole.tool_calls, calls, strict=True):
        parsed = json.loads(call.arguments)
        assert not arguments or parsed == arguments
    for cut in range(len(text) + 1):
        assert essence(read(name, [text[:cut], text[cut:]]).message) == essence(whole)
    assert essence(read(name, list(text)).message) == essence(whole)


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


AWKWARD = st.text('"\\\\{}[]:,<tool_call>/ \nü', max_size=12)
PLAIN = AWKWARD.filter(lambda text: not is_json(text))  # where a schema says nothing, that is what it would be
CITIES = AWKWARD.filter(lambda city: "</" not in city and city == city.strip())
ARGUMENTS = st.fixed_dictionaries(
    {"city": CITIES},
    optional={"days": st.integers(), "where": st.recursive(PLAIN, lambda inner: st.dictionaries(AWKWARD, inner))},
)
CALLS = st.lists(st.tuples(st.just("get_weather"), ARGUMENTS) | st.just(("ping", {})), max_size=3)
CUTS = st.lists(st.floats(0, 1), max_size=8)


def plainly(name: str, text: str, calls: list[tuple[str, dict[str, Any]]]) -> tuple[str, list[int]]:
    """An answer in a vocabulary without tags."""
    answer, ends = written(name, text, calls)
    return str.__str__(answer), ends


@pytest.mark.parametrize("name", FORMATS)
@given(text=st.sampled_from(["", "Well, <tool", "[TOOL it is:"]), calls=CALLS, cuts=CUTS, end=st.floats(0, 1))
def test_any_answer_reads_alike_however_it_is_cut_and_where_it_ends(
    name: str, text: str, calls: list[tuple[str, dict[str, Any]]], cuts: list[float], end: float
) -> None:
    answer, ends = plainly(name, text, calls)
    whole = read(name, [answer])
    made = calls[:1] if name in ONE_CALL else calls
    assert [(call.name, json.loads(call.arguments)) for call in whole.message.tool_calls] == made
    assert whole.calls_to_run == bool(calls)
    if not calls:
        assert whole.message.text == text

    cut_off = answer[: round(end * len(answer))]
    places = [0, *sorted(round(cut * len(cut_off)) for cut in cuts), len(cut_off)]
    reader = read(name, [cut_off[start:stop] for start, stop in pairwise(places)])
    assert essence(reader.message) == essence(read(name, [cut_off]).message)
    begun = len(reader.message.tool_calls)
    if len(ends) == len(made):
        assert not reader.calls_to_run or begun > 0
        assert begun < len(made) or not made or reader.calls_to_run or cut_off != answer
    told = [call.arguments for call in reader.message.tool_calls]
    assert all(call.arguments.startswith(part) for call, part in zip(whole.message.tool_calls, told, strict=False))


@pytest.mark.parametrize(
    ("name", "before", "piece"),
    [
        pytest.param("hermes", '<tool_call>\n{"name": "ping", "arguments": {"a": [', "17, ", id="numbers"),
        pytest.param("llama3", '{"name": "ping", "parameters": {"a": "', " word", id="words"),
        pytest.param("qwen3-coder", "<tool_call>\n<function=ping>\n<parameter=a>\n", " word", id="parameter"),
        pytest.param("gemma-4", '<|tool_call>call:ping{a:<|"|>', " word", id="value"),
        pytest.param("lfm2", "<|tool_call_start|>[ping(a='", " word", id="calls"),
        pytest.param("mistral", "", " word", id="text"),
        pytest.param("generic", "<think>", " word", id="reasoning"),
    ],
)
def test_a_piece_costs_the_same_however_much_came_before(name: str, before: str, piece: str) -> None:
    def cost(reader: AnswerReader) -> float:
        started = time.thread_time()
        for _ in range(100):
            reader.feed(piece)
        return time.thread_time() - started

    short, long = (AnswerReader(dialect(name), USE, opens_reasoning=False) for _ in range(2))
    short.feed(before)
    long.feed(before + piece * (2**20 // len(piece)))
    # In turn, and the least of ten: whatever else the machine does, it does to both. A reader that copied or read
    # again what came before would take fifty times as long.
    costs = [(cost(short), cost(long)) for _ in range(10)]
    assert min(each for _, each in costs) < 10 * min(each for each, _ in costs)


@pytest.mark.parametrize("value", ["{1, 2}", 'b"x"', "1j", "...", "{**{}}", 'f"x"', "name", "[" * 3000])
def test_a_list_in_python_with_values_that_json_lacks_is_text(value: str) -> None:
    text = f"<|tool_call_start|>[ping(a={value})]<|tool_call_end|>"
    message = read("lfm2", [text]).message
    assert (message.text, message.tool_calls) == (text, ())


def test_a_list_in_python_may_use_the_words_and_escapes_of_json() -> None:
    value = r'{"\ud83d\ude00": [true, False, null, None, "\ud83d\ude00"], "b": {"c": -1.5}}'
    text = f'<|tool_call_start|>[ping(a={value}, **{{"b c": "x" "y"}})]<|tool_call_end|>'
    (call,) = read("lfm2", [text]).message.tool_calls
    told = {"a": {"😀": [True, False, None, None, "😀"], "b": {"c": -1.5}}, "b c": "xy"}
    assert (call.name, json.loads(call.arguments)) == ("ping", told)


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "harmony"])
def test_reasoning_comes_apart_wherever_it_is_cut(name: str) -> None:
    text = "<think>\nHm, a < b </thin k>\n</think>\n\nDone."
    whole = read(name, [text])
    assert (whole.reasoning, whole.message.text) == ("Hm, a < b </thin k>", "Done.")
    for cut in range(len(text) + 1):
        reader = read(name, [text[:cut], text[cut:]])
        assert (reader.reasoning, reader.message.text) == (whole.reasoning, whole.message.text)
    opened = read(name, list("I see.</think>Done."), opens_reasoning=True)
    assert (opened.reasoning, opened.message.text) == ("I see.", "Done.")


@pytest.fixture(scope="module")
def vocabulary(model: Model) -> LLTokenizer:
    return LLTokenizer(str(model.tokenizer_path), n_vocab=model.manifest.vocab_size, eos_token=[2, 0])


@pytest.fixture
def accepts(vocabulary: LLTokenizer) -> Callable[[str, str], bool]:
    def check(grammar: str, text: str) -> bool:
        matcher = LLMatcher(vocabulary, LLMatcher.grammar_from_lark(grammar))
        assert not matcher.is_error(), matcher.get_error()
        tokens = vocabulary.tokenize_str(text)
        return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()

    return check


def grammar_of(name: str, use: ToolUse, *, reasons: bool = False, opens_reasoning: bool = False) -> str:
    source = "<think></think>" if reasons or opens_reasoning else ""
    grammar = dialect(name, source).grammar(use, None, opens_reasoning=opens_reasoning)
    assert grammar is not None
    return grammar.source


@pytest.mark.parametrize("name", ["mistral-v13", "deepseek-v3", "deepseek-v3.1"])
def test_a_call_without_a_name_is_text(name: str) -> None:
    nameless = str.__str__(plainly(name, "", [("ping", {})])[0]).replace("ping", "")
    message = read(name, [nameless]).message
    assert (message.text, message.tool_calls) == (nameless, ())


@pytest.mark.parametrize("name", FORMATS)
def test_grammars_accept_what_fits_and_nothing_else(name: str, accepts: Callable[[str, str], bool]) -> None:
    single, _ = plainly(name, "", [("ping", {})])
    words = str.__str__(text_of(name, "Just words."))
    auto, required = grammar_of(name, USE), grammar_of(name, ToolUse(USE.tools, "required"))
    named = grammar_of(name, ToolUse(USE.tools, "required", frozenset({"get_weather"})))
    assert accepts(auto, single)
    assert accepts(required, single)
    assert not accepts(named, single)
    assert accepts(auto, words)
    assert not accepts(required, words)
    assert not accepts(auto, single.replace("ping", "pong"))
    if name != "harmony":  # has its own way to reason
        thinking = grammar_of(name, ToolUse(USE.tools, "required"), reasons=True)
        assert accepts(thinking, f"<think>Hm.</think>\n{single}")
        assert accepts(thinking, single)
        begun = grammar_of(name, ToolUse(USE.tools, "required"), opens_reasoning=True)
        assert accepts(begun, f"Hm.</think>\n{single}")
        assert not accepts(begun, single)


def test_every_recorded_call_in_compact_form_fits_the_grammar(accepts: Callable[[str, str], bool]) -> None:
    for name, text, _, calls in CASES:
        if calls and '{ "' not in text:
            assert accepts(grammar_of(name, USE), text), (name, text)


def test_without_parallel_calls_there_is_one(accepts: Callable[[str, str], bool]) -> None:
    one = '<tool_call>\n{"name": "ping", "arguments": {}}\n</tool_call>'
    grammar = grammar_of("hermes", ToolUse(USE.tools, "required", parallel=False))
    assert accepts(grammar, one)
    assert not accepts(grammar, f"{one}\n{one}")


@pytest.mark.parametrize("name", FORMATS)
def test_any_value_and_none_as_a_parameter(name: str, accepts: Callable[[str, str], bool]) -> None:
    tool = Tool("f", "", {"type": "object", "properties": {"any": True, "none": False}})
    grammar = grammar_of(name, ToolUse((tool,), "required"))
    for arguments, fits in (({"any": [1]}, True), ({}, True), ({"none": 1}, False)):
        answer, _ = plainly(name, "", [("f", arguments)])
        assert accepts(grammar, answer) == fits


def test_a_response_schema_alone_and_beside_tools(accepts: Callable[[str, str], bool]) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    none = ToolUse(USE.tools, "none")
    alone = dialect("hermes", "").grammar(none, schema, opens_reasoning=False)
    beside = dialect("hermes", "").grammar(USE, schema, opens_reasoning=False)
    assert alone is not None
    assert beside is not None
    assert accepts(alone.source, '{"a": 1}')
    assert not accepts(alone.source, '{"a":1}')
    assert not accepts(alone.source, '{"a": 1, "b": 2}')
    assert accepts(beside.source, '{"a": 1}')
    assert accepts(beside.source, '<tool_call>\n{"name": "ping", "arguments": {}}\n</tool_call>')
    assert not accepts(beside.source, "words")


@pytest.mark.parametrize("name", FORMATS)
def test_the_format_is_chosen_from_the_template(name: str) -> None:
    assert choose_format(TEMPLATES[name], Tags()).name == name
    assert choose_format(TEMPLATES[name], Tags(), "mistral").name == "mistral"


def test_an_unknown_format_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match="nonsense"):
        choose_format("", Tags(), "nonsense")


def test_tool_use_names_what_is_wrong() -> None:
    with pytest.raises(InvalidRequestError, match="two tools"):
        ToolUse((PING, PING))
    with pytest.raises(InvalidRequestError, match="pong"):
        ToolUse((PING,), "required", frozenset({"pong"}))
    with pytest.raises(InvalidRequestError, match="no tools"):
        ToolUse((), "required").in_session(())
    assert ToolUse((), "required").in_session((PING,)).callable == (PING,)


def test_mistral_ids_are_what_its_templates_demand() -> None:
    ids = {FORMATS["mistral"](Tags()).new_call_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(len(call_id) == 9 and call_id.isalnum() for call_id in ids)
