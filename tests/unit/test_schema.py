"""Schemas made ready for the compiler: what fits then fits the original too, and what can be said is not refused."""

import json
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest

from slipstream.engine.grammar import GrammarCompiler
from slipstream.tokenizer import Tokenizer
from tests.grammars import loosened_grammar_of

Accepts = Callable[[dict[str, Any], object], bool]

NUMBER = {"type": "integer"}
BASE = {"type": "object", "properties": {"x": NUMBER}, "required": ["x"]}
EXTRA = {"properties": {"y": NUMBER}, "required": ["y"]}
REF = {"$ref": "#/$defs/Base"}
COLORS = {"enum": ["red", "green", "blue"]}
SET = {"type": "array", "uniqueItems": True}


@pytest.fixture
def accepts(compiler: GrammarCompiler, tokenizer: Tokenizer) -> Accepts:
    """Whether a value can be generated along a schema."""

    def check(schema: dict[str, Any], value: object) -> bool:
        constraint = compiler.compile(loosened_grammar_of(schema)[0], param="tools").constraint()
        tokens = tokenizer.encode(json.dumps(value, ensure_ascii=False))
        if constraint.valid_prefix(tokens) < len(tokens):
            return False
        constraint.accept(tokens)
        return constraint.closing(0) == []

    return check


@pytest.mark.parametrize(
    ("schema", "fitting", "others"),
    [
        pytest.param(
            {**REF, "description": "d", "default": {"x": 1}}, [{"x": 1}], [{"x": 1, "y": 2}, {}], id="described"
        ),
        pytest.param({**REF, **EXTRA}, [{"x": 1, "y": 2}], [{"x": 1}, {"y": 2}], id="beside properties"),
        pytest.param({**REF, "required": ["x", "z"]}, [{"x": 1, "z": 0}], [{"x": 1}], id="beside required"),
        pytest.param({"allOf": [REF]}, [{"x": 1}], [{"x": 1, "y": 2}], id="alone in allOf"),
        pytest.param({"allOf": [REF, EXTRA]}, [{"x": 1, "y": 2}], [{"x": 1}, {"y": 2}], id="in allOf"),
        pytest.param(
            {"anyOf": [REF, {"$ref": "#/$defs/Alias"}], **EXTRA}, [{"x": 1, "y": 2}], [{"x": 1}], id="in anyOf"
        ),
        pytest.param({"$ref": "#/$defs/Alias", **EXTRA}, [{"x": 1, "y": 2}], [{"x": 1}], id="by way of another"),
        pytest.param(
            {"allOf": [{"anyOf": [REF, {"type": "null"}]}, EXTRA]}, [{"x": 1, "y": 2}], [{"x": 1}], id="in both"
        ),
        pytest.param(
            {"type": "object", "properties": {"a": REF, "b": {"$ref": "#/$defs/Other", **EXTRA}}, "required": ["a"]},
            [{"a": {"x": 1}}, {"a": {"x": 1}, "b": {"z": 1, "y": 2}}],
            [{"a": {"x": 1, "y": 2}}],
            id="of which another is extended",
        ),
    ],
)
def test_references_are_open_where_others_describe_the_same_object(
    accepts: Accepts, schema: dict[str, Any], fitting: list[object], others: list[object]
) -> None:
    other = {"type": "object", "properties": {"z": NUMBER}}
    schema = {**schema, "$defs": {"Base": BASE, "Alias": REF, "Other": other}}
    for value in fitting:
        jsonschema.validate(value, schema)
        assert accepts(schema, value)
    assert not any(accepts(schema, value) for value in others)


def test_a_set_of_few_values_holds_none_twice(accepts: Accepts) -> None:
    for items in (COLORS, REF):
        schema = {**SET, "items": items, "minItems": 1, "maxItems": 2, "$defs": {"Base": COLORS}}
        assert accepts(schema, ["blue", "red"])
        assert not any(accepts(schema, value) for value in (["red", "red"], [], ["red", "blue", "green"], ["pink"]))
    assert not accepts({**SET, "items": {"type": "boolean"}}, [True, True])


def test_a_set_of_many_values_is_an_array(accepts: Accepts) -> None:
    for items in ({"type": "string"}, {"enum": [f"value {index}" for index in range(7)]}):
        assert accepts({**SET, "items": items}, ["value 1", "value 3", "value 1"])
    assert accepts({**SET, "uniqueItems": False, "items": COLORS}, ["red", "red"])


def test_sets_without_end_are_not_listed_without_end() -> None:
    tool = {"type": "object", "properties": {f"p{index}": {**SET, "items": REF} for index in range(2000)}}
    source, _ = loosened_grammar_of({**tool, "$defs": {"Base": {"enum": ["a", "b", "c", "d", "e"]}}})
    assert len(source) < 2**19


@pytest.mark.parametrize(
    ("names", "fitting", "others"),
    [
        pytest.param({"type": "string"}, ["a", "", "ü\n"], [], id="any"),
        pytest.param({"enum": ["a.b", "c d"]}, ["a.b", "c d"], ["axb", "a.bc"], id="listed"),
        pytest.param(REF, ["red"], ["pink"], id="listed elsewhere"),
        pytest.param({"pattern": "^x[0-9]$"}, ["x1"], ["x", "x12"], id="pattern"),
        pytest.param({"minLength": 1, "maxLength": 2}, ["a", "\n\n"], ["", "abc"], id="length"),
    ],
)
def test_names_of_a_map(accepts: Accepts, names: dict[str, Any], fitting: list[str], others: list[str]) -> None:
    schema = {"type": "object", "propertyNames": names, "additionalProperties": NUMBER, "$defs": {"Base": COLORS}}
    assert all(accepts(schema, {name: 1}) for name in fitting)
    assert not any(accepts(schema, {name: 1}) for name in others)
    assert not accepts(schema, {fitting[0]: "1"})


def test_look_around(accepts: Accepts) -> None:
    look_around = {"type": "string", "pattern": "^(?!x)[a-z]+@a.de$"}
    for schema in (look_around, {"anyOf": [NUMBER, look_around]}, {**look_around, "format": "email"}):
        assert accepts(schema, "a@a.de")
        assert not any(accepts(schema, value) for value in ("x@a.de", "a", "a@b.de"))


def test_uncommon_formats_demand_nothing(accepts: Accepts) -> None:
    for name in ("iri", "regex", "uri-template", "int32", "path"):
        assert accepts({"type": "string", "format": name}, "any")
    assert not accepts({"type": "string", "format": "date"}, "any")


def test_a_map_by_patterns_has_no_other_keys(accepts: Accepts) -> None:
    schema = {"type": "object", "patternProperties": {"^x": NUMBER}}
    assert accepts(schema, {"x1": 1})
    assert not accepts(schema, {"y": 1})
