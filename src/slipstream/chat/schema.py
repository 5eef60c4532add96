"""JSON Schemas as pieces of a Lark grammar, written the way that `json.dumps` writes JSON."""

import json
import math
import re
from collections.abc import Mapping
from itertools import permutations
from typing import Any

from slipstream.chat.setting import Schema
from slipstream.errors import InvalidRequestError
from slipstream.fields import TOOLS

# No free whitespace: a third fewer tokens than what a model left to itself likes to write.
_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

_COMPOSED = ("allOf", "anyOf", "oneOf", "$ref", "if", "not")

# Any other `format` is a hint: OpenAPI's int32 and pydantic's path demand nothing, few validators know the others.
_FORMATS = ("date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid")

_LOOK_AROUND = re.compile(r"\(\?<?[=!]")

# Arrays without repetitions are listed one by one, if they are not too many: of up to five values there are 326.
_MOST_ARRAYS = 400
_LONGEST_ARRAY = 6
_MOST_LISTED = 10_000
"""Arrays and keys that one schema may be made to list: definitions let a short one ask for many."""


def json_rule(schema: Schema) -> str:
    """The Lark expression of JSON that fits the schema."""
    return "%json " + json.dumps({**schema, "x-guidance": _STYLE}, ensure_ascii=False)


def with_definitions(schema: Schema, whole: Schema) -> dict[str, Any]:
    """A part of a schema, with the whole that it may refer to."""
    if '"$ref"' not in json.dumps(schema):
        return dict(schema)
    moved: dict[str, Any] = _moved(schema)
    return {**moved, "$defs": {"whole": _moved(whole)}}


def _moved(schema: Any) -> Any:
    """A schema whose references lead to where `with_definitions` puts the whole."""
    if isinstance(schema, Mapping):
        moved = {key: _moved(value) for key, value in schema.items()}
        if isinstance(reference := moved.get("$ref"), str) and reference.startswith("#"):
            moved["$ref"] = f"#/$defs/whole{reference[1:]}"
        return moved
    return [_moved(each) for each in schema] if isinstance(schema, list) else schema


def as_object(schema: Schema, whole: Schema, tool: str | None = None) -> dict[str, Any]:
    """A schema as one object with properties: its reference followed, the parts of `allOf` put together.

    For formats that write one argument after the other, not JSON. What several parts say of a property, the last one
    decides. Raises `InvalidRequestError` for a `tool`'s parameters if they are alternatives.
    """
    if tool is not None and any(key in schema for key in ("anyOf", "oneOf")):
        complaint = f"the parameters of {tool!r} are alternatives, which this model's way to call has no place for: "
        raise InvalidRequestError(complaint, "describe them as one object", param=TOOLS, code="unsupported_schema")
    parts = [schema.get("allOf", [])] if "allOf" in schema else []
    if isinstance(reference := schema.get("$ref"), str):
        parts.append([resolved(reference, whole)])
    result = {key: value for key, value in schema.items() if key not in ("allOf", "$ref")}
    for part in (as_object(each, whole, tool) for group in parts for each in group if isinstance(each, Mapping)):
        properties = {**part.get("properties", {}), **result.get("properties", {})}
        required = [*result.get("required", []), *part.get("required", [])]
        result = {**part, **result}
        if properties:
            result["properties"] = properties
        if required:
            result["required"] = list(dict.fromkeys(required))
    if missing := [name for name in result.get("required", []) if name not in result.get("properties", {})]:
        result["properties"] = {**result.get("properties", {}), **dict.fromkeys(missing, True)}
    return result


def resolved(reference: str, whole: Schema) -> Any:
    """What a reference within a schema leads to; None if nowhere."""
    at: Any = whole
    for key in reference.removeprefix("#").split("/")[1:]:
        at = at.get(key.replace("~1", "/").replace("~0", "~")) if isinstance(at, Mapping) else None
    return at


def literal(text: str) -> str:
    """The Lark expression of just this text."""
    return json.dumps(text, ensure_ascii=False)


def closed(schema: Schema) -> dict[str, Any]:
    """The schema with its silences filled in, so that what it leaves open is not filled with rubbish.

    Objects that list their properties and do not say whether others may come, get none. What the compiler does not
    know is put into words that it does. Whatever fits the result fits the original, except for what is let go:
    repetitions in an array where they would be too much to list, uncommon formats, and the look-around of a pattern
    that stands beside a format.
    """
    finding = _Closing(schema, set())
    finding.rewrite(schema)
    return _Closing(schema, finding.extended).rewrite(schema, is_open="#" in finding.extended)


def closed_parameters(schema: Schema) -> dict[str, Any]:
    """The same for the parameters of a function: always an object, and an empty one if nothing is said of it."""
    rewritten = closed(schema)
    if not rewritten.keys() - {"title", "description", "$schema", "type", "required"}:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    if "type" not in rewritten and not any(key in rewritten for key in (*_COMPOSED, "const", "enum")):
        rewritten["type"] = "object"
    return rewritten


class _Closing:
    """Rewrites a schema part by part, and finds the `extended` references: to what describes an object in part."""

    def __init__(self, root: Schema, extended: set[str]) -> None:
        self.extended = extended
        self._root = root
        self._listed = 0

    def rewrite(self, schema: Schema, *, is_open: bool = False) -> dict[str, Any]:
        """The schema closed, unless it `is_open` as others describe the same object."""
        schema = self._in_known_words(schema)
        parts_open = is_open or _is_composed(schema)
        if parts_open and isinstance(reference := schema.get("$ref"), str) and reference not in self.extended:
            self.extended.add(reference)
            self.rewrite(self._resolved(schema), is_open=True)  # which may refer to others
        result = {key: self._rewrite_value(key, value, is_open=parts_open) for key, value in schema.items()}
        if not is_open and _lists_all_properties(result):
            result["additionalProperties"] = False
        return result

    def _rewrite_value(self, key: str, value: object, *, is_open: bool) -> object:
        """`is_open` is said of the schemas that apply to the same value as the one with this key."""
        if key in ("items", "additionalProperties") and isinstance(value, Mapping):
            return self.rewrite(value)
        if key in ("properties", "patternProperties", "$defs", "definitions") and isinstance(value, Mapping):
            return {
                name: self._rewrite_part(part, is_open=f"#/{key}/{name}" in self.extended)
                for name, part in value.items()
            }
        if key in ("anyOf", "oneOf", "allOf", "items", "prefixItems") and isinstance(value, list):
            is_open = is_open and key not in ("items", "prefixItems")
            known = [part for part in value if key != "anyOf" or not _looks_around(part)]
            return [self._rewrite_part(part, is_open=is_open) for part in known or value]
        return value

    def _rewrite_part(self, part: object, *, is_open: bool = False) -> object:
        if part is True:
            return {}
        return self.rewrite(part, is_open=is_open) if isinstance(part, Mapping) else part

    def _in_known_words(self, schema: Schema) -> Schema:
        """The same in words that the compiler knows; a word that can't be put otherwise stays, to be refused."""
        result = dict(schema)
        if result.get("format") not in _FORMATS:
            result.pop("format", None)
        elif _LOOK_AROUND.search(str(result.get("pattern"))):
            del result["pattern"]
        if result.pop("uniqueItems", None) is True and (arrays := self._arrays_without_repetitions(result)) is not None:
            result.setdefault("enum", arrays)
        if (pattern := self._pattern_of_names(result)) is not None:
            del result["propertyNames"]
            result["patternProperties"] = {pattern: result.get("additionalProperties", True)}
            result["additionalProperties"] = False
        if result.pop("nullable", None) is True:
            return {"anyOf": [result, {"type": "null"}]}
        return result

    def _arrays_without_repetitions(self, schema: Schema) -> list[tuple[object, ...]] | None:
        """All of them, in any order; None if they are too many, or not to be listed."""
        values = self._values(schema.get("items"))
        least, most = schema.get("minItems", 0), schema.get("maxItems", _LONGEST_ARRAY + 1)
        if values is None or schema.get("type") != "array" or not isinstance(least, int) or not isinstance(most, int):
            return None
        lengths = range(max(least, 0), min(most, len(values)) + 1)
        if lengths.stop - 1 > _LONGEST_ARRAY:
            return None
        count = sum(math.perm(len(values), length) for length in lengths)
        if count > _MOST_ARRAYS or not self._may_list(count):
            return None
        distinct = list({json.dumps(value): value for value in values}.values())
        return [array for length in lengths for array in permutations(distinct, length)]

    def _pattern_of_names(self, schema: Schema) -> str | None:
        """What `propertyNames` demands of the keys of a map as a pattern; None if it's not that simple."""
        names = schema.get("propertyNames")
        if not isinstance(names, Mapping) or "properties" in schema or "patternProperties" in schema:
            return None
        if (values := self._values(names)) is not None:
            if not self._may_list(len(values)):
                return None
            return f"^({'|'.join(re.escape(value) for value in values if isinstance(value, str))})$"
        names = self._resolved(names)
        demands = names.keys() - {"type", "title", "description"}
        if demands == {"pattern"}:
            return str(names["pattern"])
        if demands <= {"minLength", "maxLength"}:
            return f"^(.|\n){{{names.get('minLength', 0)},{names.get('maxLength', '')}}}$"
        return None

    def _may_list(self, count: int) -> bool:
        self._listed += count
        return self._listed <= _MOST_LISTED

    def _values(self, schema: object) -> list[Any] | None:
        """The values that the schema, or what it refers to, lists."""
        if not isinstance(schema, Mapping):
            return None
        match self._resolved(schema):
            case {"enum": [*values]}:
                return values
            case {"const": value}:
                return [value]
            case {"type": "boolean"}:
                return [True, False]
        return None

    def _resolved(self, schema: Schema) -> Schema:
        """What the schema refers to, or itself if it refers to nothing that there is."""
        target = resolved(str(schema["$ref"]), self._root) if "$ref" in schema else None
        return target if isinstance(target, Mapping) else schema


def _is_composed(schema: Schema) -> bool:
    """Whether several parts of a schema may describe the members of one object."""
    own = any(key in schema for key in ("properties", "patternProperties", "additionalProperties", "required"))
    all_of = schema.get("allOf")
    parts = [own, *(key in schema for key in ("$ref", "anyOf", "oneOf"))]
    return sum(parts) + (len(all_of) if isinstance(all_of, list) else 0) > 1


def _lists_all_properties(schema: Schema) -> bool:
    listed = schema.get("properties", {} if "patternProperties" in schema else None)
    open_ended = ("additionalProperties", "unevaluatedProperties", *_COMPOSED)
    if not isinstance(listed, Mapping) or any(key in schema for key in open_ended):
        return False
    required = schema.get("required")
    return not isinstance(required, list) or all(str(name) in listed for name in required)


def _looks_around(schema: object) -> bool:
    """Whether it is the pattern that keeps the schema from being enforced."""
    if not isinstance(schema, Mapping) or schema.get("format") in _FORMATS:
        return False
    return _LOOK_AROUND.search(str(schema.get("pattern"))) is not None
