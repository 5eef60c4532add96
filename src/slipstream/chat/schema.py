"""JSON Schemas as pieces of a Lark grammar, written the way that `json.dumps` writes JSON."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from slipstream.chat.tools import Schema

# No free whitespace: a third fewer tokens than what a model left to itself likes to write.
_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

_COMPOSED = ("allOf", "anyOf", "oneOf", "$ref", "if", "not")

# Any other `format` is a hint for people and generators, as OpenAPI's int32 or pydantic's path, and demands nothing.
_FORMATS = re.compile(
    "date-time|date|time|duration|(idn-)?(email|hostname)|ipv4|ipv6|[ui]ri(-reference)?|uri-template|uuid|"
    "(relative-)?json-pointer|regex"
)


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
    return _rewrite(schema, extended="allOf" in json.dumps(schema))


def closed_parameters(schema: Schema) -> dict[str, Any]:
    """The same for the parameters of a function: always an object, and an empty one if nothing is said of it."""
    rewritten = closed(schema)
    if not rewritten.keys() - {"title", "description", "$schema", "type", "required"}:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    if "type" not in rewritten and not any(key in rewritten for key in (*_COMPOSED, "const", "enum")):
        rewritten["type"] = "object"
    return rewritten


def _rewrite(schema: Schema, *, extended: bool, composed: bool = False) -> dict[str, Any]:
    """`composed` schemas apply together with others to one value, and so must stay open.

    So must definitions where some may be `extended` by an `allOf`.
    """
    result: dict[str, Any] = {}
    for key, value in schema.items():
        if key in ("properties", "patternProperties"):
            result[key] = _each(value, extended=extended, composed=False)
        elif key in ("$defs", "definitions", "dependentSchemas"):
            result[key] = _each(value, extended=extended, composed=extended or key == "dependentSchemas")
        elif isinstance(value, Mapping) and key in ("items", "additionalProperties"):
            result[key] = _rewrite(value, extended=extended)
        elif isinstance(value, Sequence) and key in ("anyOf", "oneOf", "allOf", "prefixItems"):
            together = key == "allOf" or (key != "prefixItems" and "properties" in schema)
            result[key] = [
                _rewrite(item, extended=extended, composed=together) if isinstance(item, Mapping) else item
                for item in value
            ]
        elif key != "nullable" and not (key == "format" and not _FORMATS.fullmatch(str(value))):
            result[key] = value
    if not composed and _lists_all_properties(result):
        result["additionalProperties"] = False
    if schema.get("nullable") is True:
        return {"anyOf": [result, {"type": "null"}]}
    return result


def _lists_all_properties(schema: Schema) -> bool:
    open_ended = ("additionalProperties", "patternProperties", "unevaluatedProperties", *_COMPOSED)
    if "properties" not in schema or any(key in schema for key in open_ended):
        return False
    required = schema.get("required", ())
    return not isinstance(required, Sequence) or all(name in schema["properties"] for name in required)


def _each(schemas: object, *, extended: bool, composed: bool) -> object:
    if not isinstance(schemas, Mapping):
        return schemas
    return {
        name: _rewrite(schema, extended=extended, composed=composed) if isinstance(schema, Mapping) else schema
        for name, schema in schemas.items()
    }
