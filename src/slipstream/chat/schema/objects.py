"""Objects as they are written: which keys in which order, and which of them must be there."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import combinations

from slipstream.chat.schema.emptiness import fits_nothing, listed
from slipstream.chat.schema.losses import UnsupportedError
from slipstream.chat.schema.regex import ANYTHING as ANY_TEXT
from slipstream.chat.schema.regex import NEVER, Regex, text
from slipstream.chat.schema.regex_writing import both, either, texts_with, without
from slipstream.chat.schema.shapes import ANYTHING, NOTHING, Layer, Node, Objects, Strings, joined

_MOST_PATTERNS = 5
_MOST_KEYS = 32
_MOST_ALTERNATIVES = 256


@dataclass(frozen=True, slots=True)
class Member:
    """A member of a known key."""

    key: str
    node: Node
    required: bool


@dataclass(frozen=True, slots=True)
class Keys:
    """Keys in which some patterns are found and others aren't, not `taken`, and fitting one of each of `names`."""

    found: tuple[Regex, ...]
    others: tuple[Regex, ...]
    taken: tuple[str, ...]
    names: tuple[tuple[Strings, ...], ...]

    @property
    def are_any(self) -> bool:
        """Whether any key will do."""
        return not (self.found or self.others or self.taken or self.names)

    def texts(self, within: Regex = ANY_TEXT) -> Regex:
        """What they look like, of those that fit another expression; `NEVER` if there are none."""
        wanted = [texts_with(regex) for regex in self.found]
        wanted += [either(each.texts for each in strings) for strings in self.names]
        others = [*map(texts_with, self.others), *map(text, self.taken)]
        wanted += [within] if within != ANY_TEXT or not wanted else []
        found = without(both(wanted), others)
        simple = not (self.found or self.others or self.names) and within == ANY_TEXT
        return NEVER if not simple and fits_nothing(found) else found


@dataclass(frozen=True, slots=True)
class FreeMembers:
    """Members of all keys that are among some."""

    keys: tuple[Keys, ...]
    node: Node


@dataclass(frozen=True, slots=True)
class Form:
    """One way to write an object."""

    members: tuple[Member, ...]
    free: tuple[FreeMembers, ...]
    """They come after all others."""
    least: int
    most: int | None


def settled(objects: Objects) -> list[Objects]:
    """The same without silences and `exists`.

    An object that lists properties and says nothing of others gets none, unless it couldn't be otherwise. Of several
    ways to be no object of another kind, those that a writer would think of are taken: a key is missing.
    """
    listed = dict.fromkeys(key for layer in objects.layers if layer.lists for key in layer.properties)
    described = dict.fromkeys((*listed, *(key for key in objects.required if key not in objects.denied)))
    patterns = tuple(dict.fromkeys(regex for layer in objects.layers if layer.lists for regex, _ in layer.patterns))
    silent = not any(layer.says for layer in objects.layers)
    if silent and _closes(objects, bool(described), patterns, len(described)):
        if not objects.denied <= described.keys():
            return []
        last = Layer(dict.fromkeys(described, ANYTHING), tuple((regex, ANYTHING) for regex in patterns), NOTHING)
        objects = replace(objects, layers=(*objects.layers, last))
    return _with_members(objects)


def _closes(objects: Objects, describes: bool, patterns: tuple[Regex, ...], count: int) -> bool:
    if patterns:
        return True
    if describes:
        return objects.least <= count
    return objects.is_root and not objects.least and not objects.names and not objects.exists


def _with_members(objects: Objects) -> list[Objects]:
    """The same, where it's a known key that each of `exists` is about."""
    known = dict.fromkeys((*(key for layer in objects.layers for key in layer.properties), *objects.required))
    result = [replace(objects, exists=())]
    for exists in objects.exists:
        keys = [key for key in known if exists.holds(key)]
        grown = []
        for each in result:
            for key in keys:
                layer = Layer({key: exists.node}, lists=False)
                if (both := each.and_also(Objects((layer,), (key,)))) is not None:
                    grown.append(both)
        result = grown
        if len(result) > _MOST_ALTERNATIVES:
            raise UnsupportedError("too many alternatives")
    return result


def form_of(objects: Objects, is_nothing: Callable[[Node], bool]) -> Form | None:
    """How to write a settled object; None if there is none. Members that no value fits are left out."""
    keys = dict.fromkeys(key for layer in objects.layers for key in layer.properties)
    members = []
    for key in dict.fromkeys((*keys, *objects.required)):
        node, required = objects.node(key), key in objects.required
        if not is_nothing(node):
            members.append(Member(key, node, required))
        elif required:
            return None
    keys = dict.fromkeys((*keys, *objects.required))
    free = []
    for each in _free(objects, list(keys), is_nothing):
        given = [listed(some.texts(), _MOST_KEYS) for some in each.keys]
        known = [key for some in given for key in some or ()]  # which come once each if they are listed
        members += [Member(key, each.node, required=False) for key in known]
        if left := tuple(some for some, found in zip(each.keys, given, strict=True) if found is None):
            free.append(FreeMembers(left, each.node))
    count, needed = len(members), sum(member.required for member in members)
    most = objects.most
    if (not free and count < objects.least) or (most is not None and needed > most):
        return None
    return Form(
        tuple(members), tuple(free), objects.least, None if not free and most is not None and most >= count else most
    )


def _free(objects: Objects, taken: list[str], is_nothing: Callable[[Node], bool]) -> list[FreeMembers]:
    """Members of other keys, by the patterns that are found in them."""
    patterns = list(dict.fromkeys(regex for layer in objects.layers for regex, _ in layer.patterns))
    if len(patterns) > _MOST_PATTERNS:
        if all(layer.others == NOTHING for layer in objects.layers):
            raise UnsupportedError("patternProperties")
        patterns = patterns[:_MOST_PATTERNS]
    cells: dict[Node, list[Keys]] = {}
    for count in range(len(patterns) + 1):
        for found in combinations(patterns, count):
            node = joined(layer.node_where(frozenset(found)) for layer in objects.layers)
            if is_nothing(node):
                continue
            keys = Keys(found, tuple(each for each in patterns if each not in found), tuple(taken), objects.names)
            if keys.texts() != NEVER:
                cells.setdefault(node, []).append(keys)
    return [FreeMembers(tuple(keys), node) for node, keys in cells.items()]
