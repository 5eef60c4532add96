"""Each family's format in each kind of vocabulary: what its models may write, and how that is read.

The answers come out of the engine itself, over logits that are random: whatever the grammar lets through must be read
as what was asked for, in every mode.
"""

import json
from collections.abc import Iterator, Sequence
from functools import cache

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.chat.answers import AnswerReader, Dialect
from slipstream.chat.formats import FORMATS
from slipstream.chat.messages import Message
from slipstream.chat.setting import Tool, ToolUse
from slipstream.engine.grammar import GrammarCompiler
from slipstream.models import DEFAULT_MODEL, ModelStore
from slipstream.tokenizer import IncrementalDecoder, Tokenizer
from slipstream.tokenizer.provenance import content, own
from tests.rambling import Rambler, said
from tests.unit.families import ONE_CALL, REASONING, TEMPLATES, all_tags, text_of, written
from tests.vocabularies import FLAGS, Flag, with_tags

WEATHER = Tool(
    "get_weather",
    "Weather of a city",
    {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 12},
            "unit": {"type": "string", "enum": ["C", "F"]},
            "days": {"type": "integer", "minimum": 1, "maximum": 14},
            "exact": {"type": "boolean"},
        },
        "required": ["city", "unit"],
    },
)
TAG = Tool("tag", "", {"type": "object", "properties": {"text": {"enum": ["<tool_call>", "</think>", "<|call|>"]}}})
TOOLS = (WEATHER, Tool("ping"))
SCHEMAS = {"get_weather": WEATHER.parameters, "ping": {"maxProperties": 0}, "tag": TAG.parameters}
END = "<|im_end|>"


@cache
def tokenizer(flag: Flag) -> Tokenizer:
    return Tokenizer(with_tags(ModelStore().ensure(DEFAULT_MODEL).tokenizer_path, all_tags(), flag))


@cache
def dialect(name: str, flag: Flag, reasoning: str = "") -> Dialect:
    return Dialect(TEMPLATES[name] + reasoning, tokenizer(flag))


class Model(Rambler):
    """A model of one family."""

    def __init__(self, name: str, flag: Flag, reasoning: str = "") -> None:
        self.tokenizer = tokenizer(flag)
        self.dialect = dialect(name, flag, reasoning)
        stop = self.tokenizer.control_token(END)
        assert stop is not None
        super().__init__(self.tokenizer, self.dialect, compiler(flag), [stop])

    def __enter__(self) -> "Model":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, tokens: Sequence[int]) -> AnswerReader:
        """What tokens read as, one by one."""
        reader = AnswerReader(self.dialect, ToolUse(TOOLS), opens_reasoning=False)
        decoder = IncrementalDecoder(self.tokenizer, shown=self.dialect.token_ids)
        for token in tokens:
            reader.feed(decoder.feed((token,)))
        reader.feed(decoder.flush(), last=True)
        return reader


@cache
def compiler(flag: Flag) -> GrammarCompiler:
    """One for all formats, since loading a vocabulary takes a second; what ends one format's texts ends no other's."""
    vocabulary = tokenizer(flag)
    stop = vocabulary.control_token(END)
    assert stop is not None
    dialects = [dialect(name, flag, reasoning) for name in FORMATS for reasoning in ("", *REASONING)]
    ends = {str.__str__(end): end for known in dialects for end in known.ends}.values()
    return GrammarCompiler(vocabulary, vocab_size=vocabulary.vocab_size, stop_token_ids=(stop,), ends=ends)


def assert_fits(message: Message) -> None:
    for call in message.tool_calls:
        jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])


MATRIX = pytest.mark.parametrize(("name", "flag"), [(name, flag) for name in FORMATS for flag in FLAGS])


@pytest.fixture
def model(name: str, flag: Flag) -> Iterator[Model]:
    with Model(name, flag) as model:
        yield model


@MATRIX
def test_calls_in_every_mode(model: Model, name: str, flag: Flag) -> None:
    for seed in range(1):
        required = model.answer(ToolUse(TOOLS, "required"), seed=seed)
        assert required.complete, required.text
        assert required.message.text == ""
        assert_fits(required.message)
        one = model.answer(ToolUse(TOOLS, "required", parallel=False), seed=seed)
        assert len(one.message.tool_calls) == 1
        named = model.answer(ToolUse(TOOLS, "required", frozenset({"get_weather"})), seed=seed)
        assert {call.name for call in named.message.tool_calls} == {"get_weather"}
        assert_fits(named.message)
        free = model.answer(ToolUse(TOOLS, "none"), seed=seed, max_tokens=20)
        assert free.message.tool_calls == ()
        auto = model.answer(ToolUse(TOOLS, "auto"), seed=seed, max_tokens=120)
        assert auto.complete == bool(auto.message.tool_calls)
        assert_fits(auto.message)


EVERYTHING = {
    "type": "object",
    "$defs": {
        "tree": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "maxLength": 4},
                "more": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2},
            },
            "required": ["name"],
            "additionalProperties": False,
        }
    },
    "properties": {
        "Tree": {"$ref": "#/$defs/tree"},
        "mixed": {"enum": ["a", 1, None, True, [1, "b"], {"k": "v"}]},
        "maybe": {"anyOf": [{"type": "null"}, {"type": "string", "maxLength": 3}]},
        "either": {"type": ["integer", "boolean"]},
        "pairs": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 3},
        "open": {"type": "object", "additionalProperties": {"type": "integer"}},
        "odd key: {x}": {"const": "</tool_call>"},
        "nothing": {"type": "object", "properties": {}},
    },
    "required": ["Tree", "mixed", "pairs", "odd key: {x}"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize(
    "name", [name for name in FORMATS if name not in ("lfm2", "minimax-m2", "qwen3-coder", "seed-oss")]
)
def test_arguments_of_every_kind(name: str, flag: Flag) -> None:
    """Formats that write names into tags have no way to write every name; see below."""
    schema = EVERYTHING
    if name in ("glm-4", "glm-4.7"):
        schema = schema | {
            "properties": {key: value for key, value in EVERYTHING["properties"].items() if key != "mixed"}
        }
        schema["required"] = ["Tree", "pairs"]
    with Model(name, flag) as model:
        for seed in range(2):
            use = ToolUse((Tool("all", "", schema),), "required", parallel=False)
            answer = model.answer(use, seed=seed, max_tokens=600)
            assert answer.complete, answer.text
            jsonschema.validate(json.loads(answer.message.tool_calls[0].arguments), schema)


SCHEMAS_OF_ALL_KINDS = {
    "one item": {"properties": {"a": {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 1}}},
    "a reference to a property": {
        "properties": {
            "a": {"type": "object", "properties": {"x": {"type": "integer"}}},
            "b": {"$ref": "#/properties/a"},
        }
    },
    "a literal": {"properties": {"a": {"const": "add", "type": "string"}, "b": {"const": False, "type": "boolean"}}},
    "a reference at the top": {
        "$defs": {"T": {"type": "object", "properties": {"v": {"type": "boolean"}}, "required": ["v"]}},
        "$ref": "#/$defs/T",
    },
    "parts put together": {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]},
            {"type": "object", "properties": {"b": {"type": "null"}}},
        ]
    },
    "a part of one": {"$defs": {"X": {"enum": ["x", "y"]}}, "properties": {"a": {"allOf": [{"$ref": "#/$defs/X"}]}}},
    "names that are none": {
        "properties": {"user-id": {"type": "boolean"}, "class": {"type": "null"}, "a:b": {"enum": [1]}}
    },
}


@pytest.mark.parametrize("name", FORMATS)
def test_schemas_of_all_kinds(name: str) -> None:
    with Model(name, "added") as model:
        for kind, part in SCHEMAS_OF_ALL_KINDS.items():
            schema = {"type": "object", **part}
            if "properties" in part:
                schema["required"] = list(part["properties"])
            use = ToolUse((Tool("f", "", schema),), "required", parallel=False)
            answer = model.answer(use, max_tokens=200)
            assert answer.complete, (kind, answer.text)
            jsonschema.validate(json.loads(answer.message.tool_calls[0].arguments), schema)


@pytest.mark.parametrize("name", ["glm-4", "qwen3-coder", "lfm2", "gemma-4"])
def test_alternatives_of_parameters(name: str) -> None:
    parts = [{"type": "object", "properties": {key: {"type": "null"}}, "required": [key]} for key in "ab"]
    use = ToolUse((Tool("f", "", {"anyOf": parts}),), "required")
    with Model(name, "added") as model:
        answers = [model.answer(use, seed=seed) for seed in range(3)]
    for answer in answers:
        assert json.loads(answer.message.tool_calls[0].arguments) in ({"a": None}, {"b": None})


@MATRIX
def test_a_call_is_closed_in_time(model: Model, name: str, flag: Flag) -> None:
    long = Tool("note", "", {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]})
    use = ToolUse((long,), "required", parallel=False)
    shortest = min(len(model.answer(use, seed=seed, max_tokens=120).tokens) for seed in range(3))
    for limit in range(shortest, shortest + 20, 9):
        answer = model.answer(use, max_tokens=limit, logit_bias={tokenizer(flag).encode('"')[0]: -20})
        assert len(answer.tokens) <= limit
        if answer.complete:
            assert isinstance(json.loads(answer.message.tool_calls[0].arguments)["text"], str)
    assert answer.complete, answer.text


@MATRIX
def test_what_the_family_writes_is_allowed_and_read(model: Model, name: str, flag: Flag) -> None:
    calls = [("get_weather", {"city": "Bern </x>[b]", "unit": "C", "exact": True}), ("ping", {})]
    for text in ("", "Let me see."):
        for made in (calls[:1], calls):
            answer, _ = written(name, text, made)
            expected = made[:1] if name in ONE_CALL else made
            tokens = tokenizer(flag).encode(answer)
            grammar = model.grammar(ToolUse(TOOLS))
            assert grammar is not None
            constraint = grammar.constraint()
            assert constraint.valid_prefix(tokens) == len(tokens), answer
            reader = model.read(tokens)
            assert [(call.name, json.loads(call.arguments)) for call in reader.message.tool_calls] == expected
            assert reader.calls_to_run
            if name != "llama3":
                assert reader.message.text == text


@MATRIX
def test_tags_that_are_spelled_out_are_text_where_they_are_tokens(model: Model, name: str, flag: Flag) -> None:
    """As when a model quotes what it read."""
    answer, _ = written(name, "", [("ping", {})])
    tokens = tokenizer(flag).encode(text_of(name, str.__str__(answer)))
    reader = model.read(tokens)
    if (flag != "absent" and name not in ("llama3",)) or name == "harmony":
        assert reader.message.text == str.__str__(answer)
        assert reader.message.tool_calls == ()
    else:
        assert [call.name for call in reader.message.tool_calls] == ["ping"]


@MATRIX
def test_a_schema_that_names_a_tag_forces_text(model: Model, name: str, flag: Flag) -> None:
    for seed in range(1):
        answer = model.answer(ToolUse((TAG,), "required", parallel=False), seed=seed)
        assert answer.complete, answer.text
        assert_fits(answer.message)


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("reasoning", REASONING)
@pytest.mark.parametrize("name", ["hermes", "mistral-v11", "qwen3-coder"])
def test_reasoning_before_calls(name: str, reasoning: str, flag: Flag) -> None:
    use = ToolUse(TOOLS, "required", parallel=False)
    begin, end = REASONING[reasoning]
    with Model(name, flag, reasoning) as model:
        for opened in (True, False):
            for seed in range(1):
                answer = model.answer(use, opened=opened, seed=seed, max_tokens=300)
                assert answer.complete, answer.text
                assert answer.message.text == ""
                assert len(answer.message.tool_calls) == 1
        assert model.dialect.reasoning.opened_by(own(f"<|im_start|>assistant\n{begin}\n"))
        assert not model.dialect.reasoning.opened_by(own("<|im_start|>user\n") + content(begin))
        call, _ = written(name, "", [("ping", {})])
        tokens = tokenizer(flag).encode(own(f"{begin}Hm.{end}\n\n") + call)
        grammar = model.grammar(use)
        assert grammar is not None
        assert grammar.constraint().valid_prefix(tokens) == len(tokens)


@pytest.mark.parametrize("flag", FLAGS)
def test_harmony_reasons_in_a_channel(flag: Flag) -> None:
    with Model("harmony", flag) as model:
        text = (
            own("<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant")
            + written("harmony", "", [("ping", {})])[0]
        )
        tokens = tokenizer(flag).encode(text)
        grammar = model.grammar(ToolUse(TOOLS, "required"))
        assert grammar is not None
        assert grammar.constraint().valid_prefix(tokens) == len(tokens)
        reader = model.read(tokens)
        assert (reader.reasoning, [call.name for call in reader.message.tool_calls]) == ("Hm.", ["ping"])


@MATRIX
@settings(max_examples=6)
@given(data=st.data())
def test_any_tokens_read_alike_however_they_come(name: str, flag: Flag, data: st.DataObject) -> None:
    """No stream of tokens is lost or breaks a reader, and pieces add up to the whole."""
    vocabulary, known = tokenizer(flag), dialect(name, flag, "<think></think>")
    answer, _ = written(name, "Well", [("ping", {}), ("get_weather", {"city": "B"})])
    likely = vocabulary.encode(answer)
    ids = data.draw(
        st.lists(
            st.sampled_from([*likely, *sorted(known.token_ids)]) | st.integers(0, vocabulary.vocab_size - 1),
            max_size=25,
        )
    )
    cut = data.draw(st.integers(0, len(likely)))
    ids = [*likely[:cut], *ids]
    whole, streamed = (AnswerReader(known, ToolUse(TOOLS), opens_reasoning=False) for _ in range(2))
    decoder = IncrementalDecoder(vocabulary, shown=known.token_ids)
    text = decoder.feed(ids) + decoder.flush()
    whole.feed(text, last=True)
    told = ""
    for token in ids:
        told += "".join(delta.text for delta in streamed.feed(decoder.feed((token,))))
    told += "".join(delta.text for delta in streamed.feed(decoder.flush(), last=True))
    assert said(streamed.message) == said(whole.message)
    assert streamed.reasoning == whole.reasoning
    assert told == streamed.message.text
    if not whole.message.tool_calls and not whole.reasoning and name != "harmony" and "<think>" not in text:
        shown, generated = (
            "".join(each.replace("</think>", "").split()) for each in (whole.message.text, str.__str__(text))
        )
        assert shown == generated, "no more than white space goes"
