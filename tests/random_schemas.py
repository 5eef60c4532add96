"""Random JSON Schemas of all keywords, biased to those that interact."""

import random
from typing import Any

KEYS = ["a", "b", "kind", 'q"', "ü"]
TEXTS = ["a", "b", "", 'q"', "back\\slash", "<|im_end|>", "line\nend", "ü", "1"]
NUMBERS = [0, 1, -1, 3, 7, 10, 100, -20, 0.5, -0.25, 2.75, 2**53 + 1, 12345678901234567890, -(2**63), 1e20]
PATTERNS = [
    "^a+$", "b", '^[^"]{1,4}$', "^[^\\\\]*$", r"^\d{2,3}$", "^(?!a)[a-z]{1,3}$", "^[[a]{1,3}$", "^[a&&b]+$", "^.$",
    r"^\S+$", "^(a|b|ab)$", "^$", "a$", "^x-", r"^[\w.-]{1,5}$", "[^a-z]", "(^|-)a(-|$)", r"^[ -~]{0,3}$",
    "^(?=.*[0-9])[a-z0-9]{2,4}$", r"^\u0041?$", "^[^\\x00-\\x1f]{2}$",
]  # fmt: skip
FORMATS = ["date", "uuid", "ipv4", "email", "date-time", "no-format"]
TYPES = ["string", "integer", "number", "boolean", "null", "array", "object"]


def random_schema(rng: random.Random) -> Any:
    """A schema, most of the time of an object, with definitions that it may refer to."""
    schema = _schema(rng, 3)
    if rng.random() < 0.7 and isinstance(schema, dict):
        schema = _object(rng, 3)
    if isinstance(schema, dict) and "$ref" in str(schema):
        schema["$defs"] = {"A": _typed(rng, 1), "B": _object(rng, 1)}
    return schema


def _schema(rng: random.Random, depth: int) -> Any:
    kind = rng.random()
    if depth == 0 or kind < 0.5:
        schema = _typed(rng, depth)
    elif kind < 0.53:
        return rng.choice((True, {}, {"not": {}}, False))
    elif kind < 0.58:
        return {"$ref": f"#/$defs/{rng.choice('AB')}"}
    elif kind < 0.63:
        return {"type": rng.sample(TYPES[:5], 2)}
    elif kind < 0.7:
        return {"enum": [_value(rng, 1) for _ in range(rng.randint(1, 4))]}
    elif kind < 0.74:
        return {"const": _value(rng, 2)}
    else:
        schema = _combined(rng, depth)
    if rng.random() < 0.1:
        schema["nullable" if rng.random() < 0.0 else "description"] = "d"
    return schema


def _combined(rng: random.Random, depth: int) -> dict[str, Any]:
    keyword = rng.choice(("anyOf", "oneOf", "allOf", "not", "if", "tagged", "beside"))
    if keyword == "not":
        return {**_typed(rng, depth), "not": _schema(rng, depth - 1)}
    if keyword == "if":
        schema = _object(rng, depth - 1)
        condition = {"properties": {"kind": {"const": rng.choice(TEXTS[:3])}}}
        if rng.random() < 0.7:
            condition["required"] = ["kind"]
        more = {key: _part(rng) for key in ("then", "else") if rng.random() < 0.8}
        return {**schema, "if": condition if rng.random() < 0.8 else _schema(rng, 1), **more}
    if keyword == "tagged":
        options = [_tagged(rng, depth - 1, tag) for tag in TEXTS[: rng.randint(2, 3)]]
        return {rng.choice(("anyOf", "oneOf")): options}
    if keyword == "beside":
        return {**_object(rng, depth - 1), "anyOf": [_part(rng), _part(rng)]}
    return {keyword: [_schema(rng, depth - 1) for _ in range(rng.randint(1, 3))]}


def _part(rng: random.Random) -> dict[str, Any]:
    """What is said of an object beside its properties."""
    key = rng.choice(KEYS)
    return rng.choice(
        (
            {"required": [key]},
            {"properties": {key: _typed(rng, 0)}},
            {"properties": {key: False}},
            {"required": [key], "properties": {key: _typed(rng, 0)}},
            {"minProperties": 1},
            {"not": {"required": [key]}},
        )
    )


def _tagged(rng: random.Random, depth: int, tag: str) -> dict[str, Any]:
    schema = _object(rng, depth)
    schema["properties"] = {"kind": {"const": tag}, **schema.get("properties", {})}
    schema["properties"]["kind"] = {"const": tag}
    schema["required"] = ["kind"]
    return schema


def _typed(rng: random.Random, depth: int) -> dict[str, Any]:
    kind = rng.choice(TYPES[:4] if depth == 0 else TYPES)
    if kind == "object":
        return _object(rng, depth)
    if kind == "array":
        return _array(rng, depth)
    schema: dict[str, Any] = {"type": kind}
    if kind == "string":
        _maybe(rng, schema, 0.4, "pattern", lambda: rng.choice(PATTERNS))
        _maybe(rng, schema, 0.2, "minLength", lambda: rng.randint(0, 3))
        _maybe(rng, schema, 0.3, "maxLength", lambda: rng.randint(2, 6))
        _maybe(rng, schema, 0.1, "format", lambda: rng.choice(FORMATS))
        _maybe(rng, schema, 0.1, "enum", lambda: rng.sample(TEXTS, 3))
    if kind in ("integer", "number"):
        _maybe(rng, schema, 0.35, rng.choice(("minimum", "exclusiveMinimum")), lambda: rng.choice(NUMBERS))
        _maybe(rng, schema, 0.35, rng.choice(("maximum", "exclusiveMaximum")), lambda: rng.choice(NUMBERS))
        _maybe(rng, schema, 0.1, "multipleOf", lambda: rng.choice((1, 2, 5, 7, 0.5)))
    if rng.random() < 0.05:
        schema.pop("type")
    return schema


def _array(rng: random.Random, depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "array"}
    _maybe(rng, schema, 0.8, "items", lambda: _schema(rng, depth - 1))
    _maybe(rng, schema, 0.2, "prefixItems", lambda: [_schema(rng, depth - 1) for _ in range(rng.randint(1, 2))])
    _maybe(rng, schema, 0.3, "minItems", lambda: rng.randint(0, 2))
    _maybe(rng, schema, 0.4, "maxItems", lambda: rng.randint(1, 4))
    _maybe(rng, schema, 0.1, "uniqueItems", lambda: True)
    if rng.random() < 0.15:
        schema["contains"] = _typed(rng, 0)
        _maybe(rng, schema, 0.3, "minContains", lambda: rng.randint(0, 2))
        _maybe(rng, schema, 0.3, "maxContains", lambda: rng.randint(1, 2))
    _maybe(rng, schema, 0.05, "unevaluatedItems", lambda: False)
    return schema


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object"} if rng.random() < 0.9 else {}
    inner = max(depth - 1, 0)
    keys = rng.sample(KEYS, rng.randint(0, 4))
    if keys and rng.random() < 0.9:
        schema["properties"] = {key: _schema(rng, inner) for key in keys}
    _maybe(rng, schema, 0.4, "required", lambda: rng.sample(KEYS, rng.randint(0, 2)))
    _maybe(rng, schema, 0.25, "additionalProperties", lambda: rng.choice((False, True, _typed(rng, 0))))
    _maybe(
        rng, schema, 0.15, "patternProperties",
        lambda: {pattern: _schema(rng, 0) for pattern in rng.sample(PATTERNS, rng.randint(1, 2))},
    )  # fmt: skip
    _maybe(rng, schema, 0.12, "minProperties", lambda: rng.randint(0, 3))
    _maybe(rng, schema, 0.12, "maxProperties", lambda: rng.randint(1, 4))
    _maybe(rng, schema, 0.1, "propertyNames", lambda: rng.choice(({"pattern": rng.choice(PATTERNS)}, {"maxLength": 2})))
    _maybe(rng, schema, 0.1, "dependentRequired", lambda: {rng.choice(KEYS): [rng.choice(KEYS)]})
    _maybe(rng, schema, 0.05, "dependentSchemas", lambda: {rng.choice(KEYS): _part(rng)})
    _maybe(rng, schema, 0.08, "unevaluatedProperties", lambda: rng.choice((False, {"type": "integer"})))
    return schema


def _value(rng: random.Random, depth: int) -> Any:
    kind = rng.randrange(7 if depth else 5)
    if kind == 5:
        return [_value(rng, depth - 1) for _ in range(rng.randint(0, 2))]
    if kind == 6:
        return {key: _value(rng, depth - 1) for key in rng.sample(KEYS, rng.randint(0, 2))}
    return (rng.choice(TEXTS), rng.choice(NUMBERS), rng.choice(NUMBERS), rng.choice((True, False)), None)[kind]


def _maybe(rng: random.Random, schema: dict[str, Any], chance: float, key: str, value: Any) -> None:
    if rng.random() < chance:
        schema[key] = value()
