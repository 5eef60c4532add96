"""Schemas that are easy to get wrong: what fits can be written, and what doesn't can't."""

import json
from typing import Any

import jsonschema
import pytest
from llguidance import LLMatcher, LLTokenizer

from slipstream.chat.schema import NOTHING_FITS
from slipstream.chat.schema.judging import for_validators, misfit, repeated_key
from slipstream.models import Model
from tests.grammars import grammar_of, loosened_grammar_of
from tests.walks import verdict, walks

INTEGER = {"type": "integer"}
DOUBLE = 1.7976931348623157e308
BYTES = LLTokenizer("byte")


def thing(*required: str, **properties: Any) -> dict[str, Any]:
    """The schema of an object."""
    return {"type": "object", "properties": properties, "required": list(required)}


def accepts(source: str, text: str) -> bool:
    """Whether a text can be written along a grammar, up to its end."""
    matcher = LLMatcher(BYTES, LLMatcher.grammar_from_lark(source), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    tokens = list(text.encode())
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


A, B = thing("kind", kind={"const": "a"}, x=INTEGER), thing("kind", kind={"const": "b"}, y=INTEGER)
TAGGED = {"oneOf": [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}], "$defs": {"A": A, "B": B}}
NODE = thing(next={"oneOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}]})
KINDS = {"k": {"enum": ["a", "b"]}, "x": INTEGER}
IF_A = {"properties": {"k": {"const": "a"}}, "required": ["k"]}
THREES = {"minimum": 3}


def text(pattern: str, **more: Any) -> dict[str, Any]:
    """The schema of a text."""
    return {"type": "string", "pattern": pattern, **more}


def halves(**bounds: float) -> dict[str, Any]:
    """A schema of multiples of a half."""
    return {"type": "number", "multipleOf": 0.5, **bounds}


CASES: dict[str, tuple[Any, list[str], list[str]]] = {
    "quotes left out": (text('^[^"]{3,9}$'), ['"abc"', r'"a\\c"'], [r'"\"\"\""', '"ab"']),
    "quotes counted": (text('^"{2}$'), [r'"\"\""'], ['""', r'"\""']),
    "backslashes left out": (text(r"^[^\\]+$"), ['"ab"', r'"\""'], [r'"\\"']),
    "control characters left out": (text(r"^[^\x00-\x1f]+$"), ['"ab"', '"é"'], [r'"\n"', r'"\u0001"']),
    "line ends": (text("^.+$"), ['"a"', r'"\t"'], [r'"\n"', '"\u2028"']),
    "a bracket in a class": (text("^[[a]+$"), ['"[a"'], ['"b"']),
    "ampersands in a class": (text("^[a&&b]+$"), ['"a&b"'], ['"c"']),
    "hyphens in a class": (text("^[+--]+$"), ['"+,-"'], ['"."', '"a"']),
    "tildes in a class": (text("^[a~~b]+$"), ['"a~b"'], ['"c"']),
    "an empty class": (text(r"^(a|b[]|[^\s\S])$"), ['"a"'], ['""', '"b"']),
    "digits": (text(r"^\d$"), ['"1"'], ['"\u0661"']),
    "words": (text(r"^\w$"), ['"_"'], ['"é"']),
    "the end is no line end": (text("^a$"), ['"a"'], [r'"a\n"']),
    "anchors in branches": (text("^a|b$"), ['"ax"', '"xb"'], ['"xa"', '"bx"']),
    "what doesn't follow": (text("^(?!admin$|root$)[a-z]+$"), ['"rooted"'], ['"root"', '"admin"']),
    "what follows somewhere": (text(r"^(?=.*\d)(?=.*[a-z]).{3,}$"), ['"a1-"'], ['"abc"', '"a1"']),
    "what doesn't precede": (text(r"^.*(?<!\.)$"), ['"a.b"', '""'], ['"a."']),
    "both": (text(r"^(?!-)[a-z-]{2,3}(?<!-)$"), ['"a-b"'], ['"-ab"', '"ab-"', '"a"']),
    "many anchors": (text(r"(^|a)" * 40 + "b$"), ['"b"', '"aab"'], ['"ba"', '"cab"']),
    "categories": (text(r"^\p{Lu}\p{L}+$"), ['"Éa"'], ['"éa"', '"A1"']),
    "a control token's text": ({"const": "<|im_end|>"}, ['"<|im_end|>"'], ['""', '"<"']),
    "beyond doubles": ({"const": 12345678901234567890}, ["12345678901234567890"], ["12345678901234567000"]),
    "a bound beyond doubles": ({**INTEGER, "minimum": 2**53 + 1}, ["9007199254740993"], ["9007199254740992"]),
    "a long decimal": ({"const": 0.1234567890123456}, ["0.1234567890123456"], ["0.12345678901234561"]),
    "a decimal bound": ({"type": "number", "minimum": 0.05}, ["0.05", "0.1", "3"], ["0.049", "0", "-1"]),
    "int64": ({**INTEGER, "minimum": -(2**63), "maximum": 2**63 - 1}, [str(2**63 - 1), str(-(2**63))], [str(2**63)]),
    "doubles": ({"type": "number", "minimum": -DOUBLE, "maximum": DOUBLE}, ["-1.5", "0"], []),
    "required alone": ({"type": "object", "required": ["a"]}, ['{"a": 1}', '{"a": {}}'], ["{}", '{"a": 1, "b": 2}']),
    "listed by pattern too": (
        thing(a={}) | {"patternProperties": {"^a$": INTEGER}, "additionalProperties": False},
        ["{}", '{"a": 1}'],
        ['{"a": "x"}', '{"a": 1, '],
    ),
    "tagged union": (TAGGED, ['{"kind": "a", "x": 1}', '{"kind": "b"}'], ['{"kind": "a", "y": 1}', '{"kind": "c"}']),
    "nullable reference": (
        {**NODE, "$defs": {"Node": NODE}},
        ["{}", '{"next": null}', '{"next": {"next": {}}}'],
        ['{"next": 1}'],
    ),
    "nothing unevaluated": (thing(a=INTEGER) | {"unevaluatedProperties": False}, ["{}", '{"a": 1}'], ['{"b": 1}']),
    "then without if": ({**INTEGER, "then": {"type": "string"}}, ["1"], ['"a"']),
    "too few values to differ": (
        thing(a={"type": "array", "items": {"type": "null"}, "minItems": 2, "uniqueItems": True}, b=INTEGER),
        ["{}", '{"b": 1}'],
        ['{"a": }', '{"a": [null]}', '{"a": [null, null]}'],
    ),
    "at least one of any": (
        thing("a", a=INTEGER) | {"additionalProperties": INTEGER, "minProperties": 2},
        ['{"a": 1, "b": 1}', '{"a": 1, "b": 1, "c": 1}'],
        ['{"a": 1}', '{"a": 1, "a": 2}'],
    ),
    "at least one": (thing(a=INTEGER, b=INTEGER) | {"minProperties": 1}, ['{"a": 1}', '{"b": 1}'], ["{}"]),
    "at most one": (thing(a=INTEGER, b=INTEGER) | {"maxProperties": 1}, ["{}", '{"b": 1}'], ['{"a": 1, "b": 1}']),
    "few keys come once": (
        thing() | {"patternProperties": {"^x[123]$": INTEGER}, "additionalProperties": False, "minProperties": 2},
        ['{"x1": 1, "x2": 1}', '{"x1": 1, "x2": 1, "x3": 1}'],
        ['{"x1": 1, "x1": 1}', '{"x1": 1}', "{}"],
    ),
    "eight patterns": (
        thing() | {"patternProperties": {f"^{key}": {"const": key} for key in "abcdefgh"}},
        ['{"a1": "a", "h": "h"}'],
        ['{"a1": "h"}', '{"x": "x"}'],
    ),
    "never": (thing(a=INTEGER, b={"not": {}}), ["{}", '{"a": 1}'], ['{"b": 1}']),
    "if and else": (
        thing(**KINDS) | {"if": IF_A, "then": {"required": ["x"]}, "else": {"properties": {"x": False}}},
        ['{"k": "a", "x": 1}', '{"k": "b"}', "{}"],
        ['{"k": "a"}', '{"k": "b", "x": 1}', '{"x": 1}'],
    ),
    "dependent": (
        thing(a=INTEGER, b=INTEGER) | {"dependentRequired": {"a": ["b"]}},
        ["{}", '{"b": 1}', '{"a": 1, "b": 1}'],
        ['{"a": 1}'],
    ),
    "contains": ({"type": "array", "items": INTEGER, "contains": {"const": 3}}, ["[1, 3]", "[3, 1, 3]"], ["[]", "[1]"]),
    "counted": (
        {"type": "array", "items": INTEGER, "contains": THREES, "minContains": 2, "maxContains": 2},
        ["[1, 3, 4]", "[3, 4, 1]"],
        ["[]", "[3]", "[3, 4, 5]"],
    ),
    "not a text": ({"type": "string", "not": {"enum": ["a"]}}, ['"b"', '"aa"'], ['"a"']),
    "one of overlapping": (
        {"oneOf": [thing("a", a=INTEGER), thing("b", b=INTEGER)]},
        ['{"a": 1}', '{"b": 1}'],
        ["{}", '{"a": 1, "b": 1}'],
    ),
    "multiples more than a bound": (halves(exclusiveMinimum=0, maximum=0.5), ["0.5"], ["0", "1"]),
    "multiples more than one of them": (halves(exclusiveMinimum=0.5), ["1", "1.5"], ["0", "0.5"]),
    "multiples around 0": (halves(minimum=-0.7, exclusiveMaximum=0.5), ["-0.5", "0"], ["-1", "0.5"]),
}  # fmt: skip


@pytest.mark.parametrize(("schema", "fitting", "others"), CASES.values(), ids=CASES)
def test_what_fits_can_be_written(schema: Any, fitting: list[str], others: list[str]) -> None:
    source = grammar_of(schema)
    for text in fitting:
        jsonschema.validate(json.loads(text), for_validators(schema))
        assert accepts(source, text), text
    for text in others:
        assert not accepts(source, text), text


@pytest.mark.parametrize(
    "parameters", [{"type": ["object", "null"]}, {"nullable": True}, {}, {"properties": {"a": {}}}]
)
def test_arguments_are_objects(parameters: dict[str, Any]) -> None:
    source = grammar_of(parameters, arguments=True)
    assert accepts(source, "{}")
    assert not any(accepts(source, text) for text in ("null", "1", "[]", '"a"'))


@pytest.mark.parametrize(
    ("schema", "loss"),
    [
        ({"type": "array", "items": {"type": "string"}, "uniqueItems": True}, "uniqueItems"),
        ({"type": "array", "contains": INTEGER, "maxItems": 500}, "contains"),
        (text(r"(a)\1"), "pattern"),
        (text("("), "pattern"),
        (text(r"\bword\b"), "pattern"),
        ({"$ref": "https://example.org/schema"}, "$ref"),
        ({"$dynamicRef": "#node"}, "$dynamicRef"),
        ({"type": "text"}, "type"),
        ({"required": "a"}, "required"),
        ({"minimum": "1"}, "minimum"),
        ({"type": "integer", "multipleOf": 2**60}, "multipleOf"),
        (thing() | {"additionalProperties": INTEGER, "minProperties": 2}, "minProperties"),
        (thing("a", a=INTEGER) | {"additionalProperties": True, "minProperties": 3}, "minProperties"),
        (thing() | {"patternProperties": {"^[a-f]{3}$": INTEGER}, "minProperties": 2}, "minProperties"),
        (False, NOTHING_FITS),
        (text("[]"), NOTHING_FITS),
        (thing("a", a={"allOf": [{"const": 1}, {"const": 2}]}), NOTHING_FITS),
    ],
)
def test_what_is_left_out_is_listed(schema: Any, loss: str) -> None:
    source, losses = loosened_grammar_of(thing("a", a=schema))
    assert losses == (loss,)
    matcher = LLMatcher(BYTES, LLMatcher.grammar_from_lark(source), log_level=0)
    assert not matcher.is_error(), matcher.get_error()


def test_integers_are_integers_if_what_they_are_multiples_of_is_left_out() -> None:
    source, losses = loosened_grammar_of({"type": "integer", "multipleOf": 2**60})
    assert losses == ("multipleOf",)
    assert accepts(source, "1")
    assert not accepts(source, "0.5")


def test_the_judge_reads_patterns_as_ecma_does() -> None:
    schema = {"properties": {"pattern": text("^[[a]$")}, "patternProperties": {r"^\d$": INTEGER}}
    assert misfit('{"pattern": "[", "1": 1}', schema) is None
    assert misfit('{"pattern": "[\\n"}', schema) is not None
    assert misfit('{"1": "a"}', schema) == "1: 'a' is not of type 'integer'"
    assert misfit('{"\u0661": "a"}', schema) is None
    assert "is no JSON" in str(misfit("{", {}))
    assert "can't be checked" in str(misfit("1", {"$ref": "https://example.org/schema"}))


def test_a_key_that_comes_twice_is_found() -> None:
    assert repeated_key('{"a": {"b": 1, "c": [{"d": 1, "d": 2}], "b": 3}}') == "d"
    assert repeated_key('{"a": 1, "a": 1}') == "a"
    assert repeated_key('[{"a": 1}, {"a": {"a": 1}}]') is None
    assert repeated_key('{"a": 1, "a": ') is None
    assert repeated_key("[" * 100_000) is None


def test_random_walks_fit() -> None:
    for schema, fault, loosened in walks(600, 1, BYTES):
        assert fault is None or loosened, (json.dumps(schema), fault)


def test_random_walks_of_a_models_tokens_fit(model: Model) -> None:
    tokenizer = LLTokenizer(str(model.tokenizer_path))
    for schema, fault, loosened in walks(10, 2, tokenizer):
        assert fault is None or loosened, (json.dumps(schema), fault)


def test_the_judge_of_walks_takes_numbers_as_they_are_written() -> None:
    assert verdict(INTEGER, "1e+20") is None
    assert verdict(INTEGER, "1.5") is not None
    assert verdict({"type": "number", "multipleOf": 0.5}, "1e+99") is None
    assert verdict({"type": "number", "multipleOf": 0.5}, "1e-99") is not None


def test_walks_find_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.walks.random_schema", lambda _: {"type": "integer", "minimum": 3})
    monkeypatch.setattr("tests.walks.loosened_grammar_of", lambda _: (grammar_of(INTEGER), ()))
    assert any(fault is not None for _, fault, _ in walks(50, 1, BYTES))


@pytest.mark.long
def test_more_random_walks_of_a_models_tokens_fit(model: Model) -> None:
    tokenizer = LLTokenizer(str(model.tokenizer_path))
    for schema, fault, loosened in walks(60, 3, tokenizer):
        assert fault is None or loosened, (json.dumps(schema), fault)


@pytest.mark.long  # python -m tests.walks --walks 20000
@pytest.mark.parametrize("seed", range(4))
def test_many_random_walks_fit(seed: int) -> None:
    assert [fault for _, fault, loosened in walks(5000, 100 + seed, BYTES) if fault is not None and not loosened] == []
