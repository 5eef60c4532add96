"""What a JSON Schema means: a union of sets of values, each of one type (`shapes.py`).

A keyword that can't be put that way, or that isn't well formed, is left out and listed in `Meaning.losses`. Everything
else is exact, or narrower than the schema: whatever fits the result fits what isn't lost.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any
from urllib.parse import unquote

from slipstream.chat.schema.complements import complements
from slipstream.chat.schema.losses import UnsupportedError
from slipstream.chat.schema.numbers import INTEGERS, Numbers, exact
from slipstream.chat.schema.regex import End, Regex, Sequence, Start, parse
from slipstream.chat.schema.regex_writing import for_python, texts_with
from slipstream.chat.schema.shapes import (
    ANY_SHAPES,
    ANYTHING,
    MOST_SHAPES,
    NOTHING,
    Arrays,
    Contains,
    Members,
    Node,
    Not,
    Objects,
    Part,
    Shape,
    Strings,
    Words,
    besides,
    intersection,
    joined,
    only,
)
from slipstream.chat.schema.string_formats import of_format
from slipstream.chat.setting import Schema

_DEPTH_OF_PROOF = 4
_DEEPEST = 100
"""References that lead to one another."""


def resolved(reference: str, whole: Schema) -> Any:
    """What a reference within a schema leads to; None if nowhere."""
    if not reference.startswith("#"):
        return None
    at: Any = whole
    for step in reference[1:].split("/")[1:]:
        key = unquote(step).replace("~1", "/").replace("~0", "~")
        if isinstance(at, list):
            at = at[int(key)] if key.isdecimal() and int(key) < len(at) else None
        else:
            at = at.get(key) if isinstance(at, Mapping) else None
    return at if reference == "#" or reference.startswith("#/") else None


class Meaning:
    """Reads one schema, with all that it refers to within itself."""

    def __init__(self, root: object) -> None:
        self.losses: dict[str, None] = {}
        """Keywords that are left out, in the order in which they were met."""
        self._root = root if isinstance(root, Mapping) else {}
        self._parts: list[object] = []
        self._indices: dict[int, int] = {}
        self._known: dict[int, list[Shape]] = {}
        self._nodes: dict[Node, list[Shape]] = {}
        self._reading: list[int] = []
        self._narrowed: set[Node] = set()
        self.root = self.node(root)
        arguments: Schema = {"type": "object"}
        self.arguments = (*self.root, *self.node(arguments))
        """The same as the arguments of a function: always an object, and an empty one if nothing is said of it."""
        self._known[self._indices[id(arguments)]] = [Objects(is_root=True)]

    def node(self, schema: object) -> Node:
        """The node of a schema in the document, or of one like it."""
        if schema is True or schema == {}:
            return ANYTHING
        if schema is False:
            return NOTHING
        if id(schema) not in self._indices:
            self._indices[id(schema)] = len(self._parts)
            self._parts.append(schema)  # which keeps its id
        return (Part(self._indices[id(schema)]),)

    def lose(self, keyword: str) -> None:
        """Leave a keyword out."""
        self.losses[keyword] = None

    def shapes(self, node: Node) -> list[Shape]:
        """The values of a node. Raises `UnsupportedError` if they have too many alternatives."""
        if node in self._nodes:
            return self._nodes[node]
        result = ANY_SHAPES
        for term in node:
            result = intersection(result, self._of_part(term) if isinstance(term, Part) else self._others(term.node))
        self._nodes[node] = result
        return result

    def is_nothing(self, node: Node, depth: int = _DEPTH_OF_PROOF) -> bool:
        """Whether it's easy to see that no value fits."""
        if NOTHING[0] in node:
            return True
        if depth == 0 or any(isinstance(term, Part) and term.index in self._reading for term in node):
            return False
        return all(self._is_nothing(shape, depth - 1) for shape in self.shapes(node))

    def overlap(self, first: list[Shape], second: list[Shape]) -> bool:
        """Whether two unions may have values in common."""
        return not all(self._is_nothing(shape, _DEPTH_OF_PROOF) for shape in intersection(first, second))

    def _is_nothing(self, shape: Shape, depth: int) -> bool:
        match shape:
            case Objects():
                return any(self.is_nothing(shape.node(key), depth) for key in shape.required)
            case Arrays():
                return any(self.is_nothing(shape.node(index), depth) for index in range(min(shape.least, 20)))
            case Strings():
                return shape.terminal() is None
        return False

    def _others(self, node: Node) -> list[Shape]:
        """All values that don't fit a node; fewer where that can't be said."""
        if node == ANYTHING:
            return []
        shapes, narrow = complements(self.shapes(node))
        if narrow:
            self._narrowed.update((node, *((Part(index),) for index in self._reading)))
        if any((term.node if isinstance(term, Not) else (term,)) in self._narrowed for term in node):
            self.lose("not")  # what is too narrow for one negation is too wide for two
        return shapes

    def _of_part(self, part: Part) -> list[Shape]:
        if part.index in self._known:
            return self._known[part.index]
        if part.index in self._reading or len(self._reading) > _DEEPEST:
            raise UnsupportedError("$ref")
        self._reading.append(part.index)
        try:
            shapes = self._read(self._parts[part.index])
        finally:
            self._reading.pop()
        self._known[part.index] = shapes
        return shapes

    def _read(self, schema: object) -> list[Shape]:
        if not isinstance(schema, Mapping):
            raise UnsupportedError("schema")
        result, done = ANY_SHAPES, set()
        for keyword in schema:
            read = _READERS.get(keyword)
            if read is None or read in done:
                continue
            done.add(read)
            try:
                result = intersection(result, read(self, schema))
            except (UnsupportedError, TypeError, ValueError, AttributeError):
                self.lose(keyword)
        for keyword, read_rest in _LAST.items():
            if keyword in schema:
                try:
                    result = read_rest(self, schema, result)
                except (UnsupportedError, TypeError, ValueError, AttributeError):
                    self.lose(keyword)
        return [*result, _TYPES["null"]] if schema.get("nullable") is True and result is not ANY_SHAPES else result

    # Any type

    def _types(self, schema: Schema) -> list[Shape]:
        wanted = schema["type"]
        shapes = [_TYPES[name] for name in ([wanted] if isinstance(wanted, str) else wanted) if name in _TYPES]
        if not shapes or not isinstance(wanted, str | list):
            raise UnsupportedError("type")
        if _TYPES["number"] in shapes and _TYPES["integer"] in shapes:
            shapes.remove(_TYPES["integer"])
        return list(shapes)

    def _listed(self, schema: Schema) -> list[Shape]:
        return self._of_values(schema["enum"])

    def _given(self, schema: Schema) -> list[Shape]:
        return self._of_values([schema["const"]])

    def _of_values(self, values: list[Any]) -> list[Shape]:
        if not isinstance(values, list):
            raise UnsupportedError("enum")
        texts = tuple(dict.fromkeys(value for value in values if isinstance(value, str)))
        numbers = tuple(value for value in values if not isinstance(value, bool | str | list | Mapping | None))
        words = frozenset(value for value in values if isinstance(value, bool | None))
        result: list[Shape] = [Strings(values=texts)] if texts else []
        if numbers:
            result.append(Numbers(values=tuple({exact(value): value for value in numbers}.values())))
        result += [Words(words)] if words else []
        for value in values:
            if isinstance(value, Mapping):
                properties = {key: self.node({"const": each}) for key, each in value.items()}
                others = (Members(besides(value, ()), NOTHING),)
                result.append(Objects(properties, others, tuple(value), listed=tuple(value), says=True))
            elif isinstance(value, list):
                prefix = tuple(self.node({"const": each}) for each in value)
                result.append(Arrays(prefix, NOTHING, True, len(value), len(value)))
        return result

    def _referred(self, schema: Schema) -> list[Shape]:
        target = resolved(schema["$ref"], self._root)
        if target is None:
            raise UnsupportedError("$ref")
        return self.shapes(self.node(target))

    def _elsewhere(self, schema: Schema) -> list[Shape]:  # noqa: ARG002
        raise UnsupportedError("reference")

    # Several schemas at once

    def _all(self, schema: Schema) -> list[Shape]:
        result = ANY_SHAPES
        for part in _list(schema["allOf"]):
            result = intersection(result, self.shapes(self.node(part)))
        return result

    def _any(self, schema: Schema) -> list[Shape]:
        return _union(self.shapes(self.node(part)) for part in _list(schema["anyOf"]))

    def _one(self, schema: Schema) -> list[Shape]:
        nodes = [self.node(part) for part in _list(schema["oneOf"])]
        each = [self.shapes(node) for node in nodes]
        result = []
        for index, shapes in enumerate(each):
            alone = shapes
            for other, node in enumerate(nodes):
                if other != index and self.overlap(alone, each[other]):
                    alone = intersection(alone, self._others(node))
                    if not alone and node in self._narrowed:
                        self.lose("oneOf")
                        alone = shapes
            result.append(alone)
        return _union(result)

    def _not(self, schema: Schema) -> list[Shape]:
        node = self.node(schema["not"])
        shapes = self._others(node)
        if not shapes and node in self._narrowed:
            raise UnsupportedError("not")
        return shapes

    def _if(self, schema: Schema) -> list[Shape]:
        condition = self.node(schema["if"])
        then, otherwise = (self.node(schema.get(key, True)) for key in ("then", "else"))
        if then == otherwise == ANYTHING:
            return ANY_SHAPES
        return _union((self.shapes(joined((condition, then))), self.shapes((Not(condition), *otherwise))))

    def _dependencies(self, schema: Schema) -> list[Shape]:
        result = ANY_SHAPES
        for keyword in ("dependentRequired", "dependentSchemas", "dependencies"):
            for key, needed in schema.get(keyword, {}).items():
                absent = Objects({key: NOTHING})
                if isinstance(needed, list):
                    present: list[Shape] = [Objects(required=tuple(dict.fromkeys((key, *needed))))]
                else:
                    present = intersection([Objects(required=(key,))], self.shapes(self.node(needed)))
                result = intersection(result, [*only(absent), *present])
        return result

    # Objects

    def _properties(self, schema: Schema) -> list[Shape]:
        properties = {key: self.node(part) for key, part in schema.get("properties", {}).items()}
        patterns = [(key, self.node(part)) for key, part in schema.get("patternProperties", {}).items()]
        others = self.node(schema.get("additionalProperties", True))
        try:
            known = {_supported(parse(key)): part for key, part in patterns}
        except UnsupportedError:
            self.lose("patternProperties")
            known, others = {}, ANYTHING
        members = [Members(Strings(patterns=((regex, True),)), node) for regex, node in known.items()]
        members.append(Members(besides(properties, known), others))
        spoken_of = tuple(each for each in members if each.node != ANYTHING)
        says = "additionalProperties" in schema
        return only(Objects(properties, spoken_of, listed=tuple(properties), patterns=tuple(known), says=says))

    def _required(self, schema: Schema) -> list[Shape]:
        required = schema["required"]
        if isinstance(required, bool):  # as in draft 3
            raise UnsupportedError("required")
        return only(Objects(required=tuple(dict.fromkeys(_texts(required)))))

    def _names(self, schema: Schema) -> list[Shape]:
        names = [shape for shape in self.shapes(self.node(schema["propertyNames"])) if isinstance(shape, Strings)]
        others = (keys for keys in complements(names)[0] if isinstance(keys, Strings))
        return only(Objects(members=tuple(Members(keys, NOTHING) for keys in others)))

    def _rest_of_object(self, schema: Schema, shapes: list[Shape]) -> list[Shape]:
        others = self.node(schema["unevaluatedProperties"])

        def closed(objects: Objects) -> Objects:
            rest = Members(besides(objects.listed, objects.patterns), others)
            return replace(objects, members=(*objects.members, rest), says=True)

        return [closed(shape) if isinstance(shape, Objects) and not shape.says else shape for shape in shapes]

    # Arrays

    def _items(self, schema: Schema) -> list[Shape]:
        items, rest = schema.get("items", True), schema.get("additionalItems", True)
        first = schema.get("prefixItems", [])
        if isinstance(items, list):
            first, items = items, rest
        says = "items" in schema
        return only(Arrays(tuple(map(self.node, _list(first))), self.node(items), says))

    def _unique(self, schema: Schema) -> list[Shape]:
        return only(Arrays(unique=True)) if schema["uniqueItems"] is True else ANY_SHAPES

    def _contains(self, schema: Schema) -> list[Shape]:
        least = _count(schema.get("minContains", 1))
        most = _count(schema["maxContains"]) if "maxContains" in schema else None
        if least == 0 and most is None:
            return ANY_SHAPES
        return only(Arrays(contains=(Contains(self.node(schema["contains"]), least, most),)))

    def _rest_of_array(self, schema: Schema, shapes: list[Shape]) -> list[Shape]:
        others = self.node(schema["unevaluatedItems"])

        def closed(arrays: Arrays) -> Arrays:
            if arrays.contains:
                raise UnsupportedError("unevaluatedItems")
            return replace(arrays, items=joined((arrays.items, others)), says=True)

        return [closed(shape) if isinstance(shape, Arrays) and not shape.says else shape for shape in shapes]

    # Texts and numbers

    def _pattern(self, schema: Schema) -> list[Shape]:
        return only(Strings(patterns=((_supported(parse(schema["pattern"])), True),)))

    def _format(self, schema: Schema) -> list[Shape]:
        regex = of_format(schema["format"])
        return ANY_SHAPES if regex is None else only(Strings(patterns=((Sequence((Start(), regex, End())), True),)))

    def _multiple(self, schema: Schema) -> list[Shape]:
        step = exact(_number(schema["multipleOf"]))
        if step <= 0:
            raise UnsupportedError("multipleOf")
        return only(Numbers(step=step))


def _supported(pattern: Regex) -> Regex:
    """The pattern, if a grammar can hold it; raises `UnsupportedError` otherwise."""
    texts_with(pattern)
    for_python(pattern)
    return pattern


def _union(each: Iterable[list[Shape]]) -> list[Shape]:
    result = [shape for shapes in each for shape in shapes]
    if len(result) > MOST_SHAPES:
        raise UnsupportedError("too many alternatives")
    return result


def _list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise UnsupportedError("list")
    return value


def _texts(value: object) -> list[str]:
    if not all(isinstance(each, str) for each in _list(value)):
        raise UnsupportedError("names")
    return _list(value)


def _number(value: Any) -> Any:
    if isinstance(value, bool | str):
        raise UnsupportedError("number")
    return value


def _count(value: Any) -> int:
    if isinstance(value, bool) or int(value) != value or value < 0:
        raise UnsupportedError("count")
    return int(value)


_TYPES: dict[str, Shape] = {
    "string": Strings(),
    "number": Numbers(),
    "integer": INTEGERS,
    "boolean": Words(frozenset({True, False})),
    "null": Words(frozenset({None})),
    "array": Arrays(),
    "object": Objects(),
}

_Reader = Callable[[Meaning, Schema], list[Shape]]
_COUNTS: dict[str, Callable[[int], Shape]] = {
    "minProperties": lambda count: Objects(least=count),
    "maxProperties": lambda count: Objects(most=count),
    "minItems": lambda count: Arrays(least=count),
    "maxItems": lambda count: Arrays(most=count),
    "minLength": lambda count: Strings(least=count),
    "maxLength": lambda count: Strings(most=count),
}
_BOUNDS: dict[str, Callable[[Fraction], Numbers]] = {
    "minimum": lambda bound: Numbers(low=bound),
    "maximum": lambda bound: Numbers(high=bound),
    "exclusiveMinimum": lambda bound: Numbers(low=bound, without=frozenset({bound})),
    "exclusiveMaximum": lambda bound: Numbers(high=bound, without=frozenset({bound})),
}


def _counting(keyword: str) -> _Reader:
    return lambda _, schema: only(_COUNTS[keyword](_count(schema[keyword])))


def _bounding(keyword: str) -> _Reader:
    def read(_: Meaning, schema: Schema) -> list[Shape]:
        bound, exclusive = schema[keyword], f"exclusive{keyword.capitalize()}"
        if isinstance(bound, bool) and keyword.startswith("exclusive"):  # as in draft 4, which says it of the other
            return ANY_SHAPES
        return only(_BOUNDS[exclusive if schema.get(exclusive) is True else keyword](exact(_number(bound))))

    return read


_READERS: dict[str, _Reader] = {
    "type": Meaning._types,
    "enum": Meaning._listed,
    "const": Meaning._given,
    "$ref": Meaning._referred,
    "$dynamicRef": Meaning._elsewhere,
    "$recursiveRef": Meaning._elsewhere,
    "allOf": Meaning._all,
    "anyOf": Meaning._any,
    "oneOf": Meaning._one,
    "not": Meaning._not,
    "if": Meaning._if,
    **dict.fromkeys(("dependentRequired", "dependentSchemas", "dependencies"), Meaning._dependencies),
    **dict.fromkeys(("properties", "patternProperties", "additionalProperties"), Meaning._properties),
    "required": Meaning._required,
    "propertyNames": Meaning._names,
    **dict.fromkeys(("items", "prefixItems"), Meaning._items),
    "uniqueItems": Meaning._unique,
    "contains": Meaning._contains,
    "pattern": Meaning._pattern,
    "format": Meaning._format,
    "multipleOf": Meaning._multiple,
    **{keyword: _counting(keyword) for keyword in _COUNTS},
    **{keyword: _bounding(keyword) for keyword in _BOUNDS},
}
_LAST: dict[str, Callable[[Meaning, Schema, list[Shape]], list[Shape]]] = {
    "unevaluatedProperties": Meaning._rest_of_object,
    "unevaluatedItems": Meaning._rest_of_array,
}
