"""Whether a finished value fits its schema, for what no grammar can hold."""

import json
from functools import lru_cache
from typing import Any

from slipstream.chat.schema.losses import UnsupportedError
from slipstream.chat.schema.regex import parse
from slipstream.chat.schema.regex_writing import for_python
from slipstream.chat.setting import Schema


def misfit(text: str, schema: Schema) -> str | None:
    """Why JSON text doesn't fit a schema; None if it does, or if the schema is none."""
    try:
        value = json.loads(text)
    except ValueError:
        return "it is no JSON"
    try:
        error = next(_validator(json.dumps(schema)).iter_errors(value), None)
    except Exception as error:
        return f"it can't be checked: {error!r}"
    if error is None:
        return None
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.path)
    return f"{where.lstrip('.') or 'it'}: {error.message}"


def repeated_key(text: str) -> str | None:
    """A key that an object of some JSON text has twice, of which readers see the last; None if there is none."""
    repeated: list[str] = []

    def noted(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for key, value in pairs:
            if key in made:
                repeated.append(key)
            made[key] = value
        return made

    try:
        json.loads(text, object_pairs_hook=noted)
    except (ValueError, RecursionError):
        return None
    return repeated[0] if repeated else None


@lru_cache(maxsize=64)
def _validator(schema: str) -> Any:
    """The validator of a schema by its own draft, with patterns as ECMA-262 reads them."""
    # Loaded when it's first needed: it takes a tenth of a second, and few schemas need it.
    from jsonschema import validators

    parsed = for_validators(json.loads(schema))
    draft = validators.validator_for(parsed, default=validators.Draft202012Validator)
    return draft(parsed)


def for_validators(schema: Any) -> Any:
    """A schema whose patterns are Python's, which reads some as ECMA-262 doesn't: `$` before a last line end, `\\d`."""
    if isinstance(schema, list):
        return [for_validators(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    result: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _OF_VALUES:
            result[key] = value
        elif key == "pattern" and isinstance(value, str):
            result[key] = _for_python(value)
        elif key in _OF_NAMES and isinstance(value, dict):
            result[key] = {
                _for_python(name) if key == "patternProperties" else name: for_validators(each)
                for name, each in value.items()
            }
        else:
            result[key] = for_validators(value)
    return result


_OF_VALUES = ("enum", "const", "default", "examples", "required")
_OF_NAMES = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies")


def _for_python(pattern: str) -> str:
    """The pattern, or what fits any text if it is none."""
    try:
        return for_python(parse(pattern)).pattern
    except UnsupportedError:
        return ""
