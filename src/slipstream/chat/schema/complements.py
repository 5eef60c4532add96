"""What doesn't fit: the complement of a union of sets of values, as such a union again."""

from collections.abc import Sequence

from slipstream.chat.schema.numbers import Numbers
from slipstream.chat.schema.shapes import (
    ANY_SHAPES,
    ANYTHING,
    NOTHING,
    Arrays,
    Contains,
    Members,
    Node,
    Not,
    Objects,
    Shape,
    Strings,
    Words,
    intersection,
)


def complements(shapes: Sequence[Shape]) -> tuple[list[Shape], bool]:
    """All values that fit none of the shapes, and whether some of them are missing as there's no way to say them."""
    result, narrow = ANY_SHAPES, False
    for shape in shapes:
        others: list[Shape] = [each for each in ANY_SHAPES if type(each) is not type(shape)]
        within, missing = _within(shape)
        narrow = narrow or missing
        result = intersection(result, [*others, *within])
    return result, narrow


def _within(shape: Shape) -> tuple[list[Shape], bool]:
    """The values of the shape's type that don't fit it, and whether some are missing."""
    match shape:
        case Words(values):
            others = Words().values - values
            return ([Words(others)] if others else []), False
        case Numbers():
            return [*shape.complements()], False
        case Strings():
            return [*shape.complements()], False
        case Arrays():
            return _other_arrays(shape)
    return _other_objects(shape), False


def _complement(node: Node) -> Node:
    """A node of what doesn't fit another."""
    if len(node) == 1 and isinstance(node[0], Not):
        return node[0].node
    return (Not(node),)


def _other_arrays(arrays: Arrays) -> tuple[list[Shape], bool]:
    result: list[Shape] = []
    missing = arrays.unique
    if arrays.least:
        result.append(Arrays(most=arrays.least - 1))
    if arrays.most is not None:
        result.append(Arrays(least=arrays.most + 1))
    for index, node in enumerate(arrays.prefix):
        if node != ANYTHING:
            result.append(Arrays((*(ANYTHING,) * index, _complement(node)), least=index + 1))
    if arrays.items == NOTHING:
        result.append(Arrays(least=len(arrays.prefix) + 1))
    elif arrays.items != ANYTHING and not arrays.prefix:
        result.append(Arrays(contains=(Contains(_complement(arrays.items), 1, None),)))
    else:
        missing = missing or arrays.items != ANYTHING
    for contains in arrays.contains:
        if contains.least == 1:
            result.append(Arrays(items=_complement(contains.node)))
        elif contains.least:
            result.append(Arrays(contains=(Contains(contains.node, 0, contains.least - 1),)))
        if contains.most is not None:
            result.append(Arrays(contains=(Contains(contains.node, contains.most + 1, None),)))
    return result, missing


def _other_objects(objects: Objects) -> list[Shape]:
    result: list[Shape] = [Objects({key: NOTHING}) for key in objects.required]
    if objects.least:
        result.append(Objects(most=objects.least - 1))
    if objects.most is not None:
        result.append(Objects(least=objects.most + 1))
    for key, node in objects.properties.items():
        if node != ANYTHING:
            result.append(Objects({key: _complement(node)}, required=(key,), denied=frozenset({key})))
    for each in objects.members:
        result.append(Objects(exists=(Members(each.keys, _complement(each.node)),)))
    for each in objects.exists:
        result.append(Objects(members=(Members(each.keys, _complement(each.node)),)))
    return result
