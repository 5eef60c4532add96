"""JSON Schemas as pieces of a Lark grammar, written the way that `json.dumps` writes JSON."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from slipstream.chat.tools import Schema

# No free whitespace: a third fewer tokens than what a model left to itself likes to write.
_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

_COMPOSED = ("allOf", "anyOf", "oneOf", "$ref", "if", "not")


def json_rule(schema: Schema) -> str:
    """The Lark expression of JSON that fits the schema."""
    return "%json " + json.dumps({**schema, "x-guidance": _STYLE}, ensure_ascii=False)


def literal(text: str) -> str:
    """The Lark expression of just this text."""
    return json.dumps(text, ensure_ascii=False)


def closed(schema: Schema) -> dict[str, Any]:
    """The schema with its silences filled in, so that what it leaves open is not filled with rubbish.

    Objects that list their properties and do not say whether others may come, get none; `nullable` of OpenAPI is spelt
    out. Whatever fits the result fits the original.
    """
    return _rewrite(schema, composed=False)


def closed_parameters(schema: Schema) -> dict[str, Any]:
    """The same for the parameters of a function: always an object, and an empty one if nothing is said of it."""
    rewritten = closed(schema)
    if not rewritten.keys() - {"title", "description", "$schema", "type", "required"}:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    if "type" not in rewritten and not any(key in rewritten for key in (*_COMPOSED, "const", "enum")):
        rewritten["type"] = "object"
    return rewritten


def _rewrite(schema: Schema, *, composed: bool) -> dict[str, Any]:
    """`composed` schemas apply together with others to one value, and so must stay open."""
    result: dict[str, Any] = {}
    for key, value in schema.items():
        if key in ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas"):
            result[key] = _each(value, composed=key == "dependentSchemas")
        elif isinstance(value, Mapping) and key in ("items", "additionalProperties"):
            result[key] = _rewrite(value, composed=False)
        elif isinstance(value, Sequence) and key in ("anyOf", "oneOf", "allOf", "prefixItems"):
            together = key == "allOf" or (key != "prefixItems" and "properties" in schema)
            result[key] = [_rewrite(item, composed=together) if isinstance(item, Mapping) else item for item in value]
        elif key != "nullable":
            result[key] = value
    open_ended = ("additionalProperties", "patternProperties", "unevaluatedProperties", *_COMPOSED)
    if "properties" in result and not composed and not any(key in result for key in open_ended):
        result["additionalProperties"] = False
    if schema.get("nullable") is True:
        return {"anyOf": [result, {"type": "null"}]}
    return result


def _each(schemas: object, *, composed: bool) -> object:
    if not isinstance(schemas, Mapping):
        return schemas
    return {
        name: _rewrite(schema, composed=composed) if isinstance(schema, Mapping) else schema
        for name, schema in schemas.items()
    }
