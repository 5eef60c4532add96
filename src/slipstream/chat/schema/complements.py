"""What doesn't fit: the complement of a union of sets of values, as such a union again."""

from slipstream.chat.schema.numbers import Numbers
from slipstream.chat.schema.shapes import (
    ANY_SHAPES,
    ANYTHING,
    NOTHING,
    ArrayLayer,
    Arrays,
    Boolean,
    Contains,
    Exists,
    Layer,
    Node,
    Not,
    Null,
    Objects,
    Shape,
    Strings,
    intersection,
)


def complements(shapes: list[Shape]) -> tuple[list[Shape], bool]:
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
        case Boolean(values):
            return ([Boolean(frozenset({True, False}) - values)] if len(values) == 1 else []), False
        case Null():
            return [], False
        case Numbers():
            return [*shape.complements()], False
        case Strings():
            return [*shape.complements()], False
        case Arrays():
            return _other_arrays(shape)
    return _other_objects(shape)


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
    for layer in arrays.layers:
        for index, node in enumerate(layer.prefix):
            if node != ANYTHING:
                prefix = (*(ANYTHING,) * index, _complement(node))
                result.append(Arrays((ArrayLayer(prefix),), least=index + 1))
        if layer.items == NOTHING:
            result.append(Arrays(least=len(layer.prefix) + 1))
        elif layer.items != ANYTHING and not layer.prefix:
            result.append(Arrays(contains=(Contains(_complement(layer.items), 1, None),)))
        else:
            missing = missing or layer.items != ANYTHING
    for contains in arrays.contains:
        if contains.least == 1:
            result.append(Arrays((ArrayLayer(items=_complement(contains.node)),)))
        elif contains.least:
            result.append(Arrays(contains=(Contains(contains.node, 0, contains.least - 1),)))
        if contains.most is not None:
            result.append(Arrays(contains=(Contains(contains.node, contains.most + 1, None),)))
    return result, missing


def _other_objects(objects: Objects) -> tuple[list[Shape], bool]:
    result: list[Shape] = []
    missing = False
    for key in objects.required:
        result.append(Objects((Layer({key: NOTHING}, lists=False),)))
    if objects.least:
        result.append(Objects(most=objects.least - 1))
    if objects.most is not None:
        result.append(Objects(least=objects.most + 1))
    for layer in objects.layers:
        result += _misfits(layer)
    for fitting in objects.names:
        result.append(Objects(exists=(Exists(ANYTHING, unfit=fitting),)))
    for exists in objects.exists:
        names, patterns = exists.besides
        if exists.unfit is not None or (exists.among is not None and (names or patterns)):
            missing = True
            continue
        node = _complement(exists.node)
        if exists.among is not None:
            layer = Layer(patterns=((exists.among, node),), lists=False)
        else:
            free = tuple((pattern, ANYTHING) for pattern in patterns)
            layer = Layer(dict.fromkeys(names, ANYTHING), free, node, lists=False)
        result.append(Objects((layer,)))
    return result, missing


def _misfits(layer: Layer) -> list[Shape]:
    """Objects of which a member doesn't fit the layer."""
    result: list[Shape] = []
    for key, node in layer.properties.items():
        if node != ANYTHING:
            other = Layer({key: _complement(node)}, lists=False)
            result.append(Objects((other,), (key,), denied=frozenset({key})))
    for pattern, node in layer.patterns:
        if node != ANYTHING:
            result.append(Objects(exists=(Exists(_complement(node), among=pattern),)))
    if layer.others != ANYTHING:
        besides = frozenset(layer.properties), tuple(pattern for pattern, _ in layer.patterns)
        result.append(Objects(exists=(Exists(_complement(layer.others), besides=besides),)))
    return result
