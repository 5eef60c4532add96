"""Objects as they are written: which keys in which order, and which of them must be there."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from slipstream.chat.schema.emptiness import listed
from slipstream.chat.schema.losses import UnsupportedError
from slipstream.chat.schema.regex import NEVER
from slipstream.chat.schema.shapes import ANYTHING, NOTHING, Members, Node, Objects, besides, joined

_MOST_CELLS = 32
_MOST_KEYS = 32
_MOST_ALTERNATIVES = 256


@dataclass(frozen=True, slots=True)
class Member:
    """A member of a known key."""

    key: str
    node: Node
    required: bool


@dataclass(frozen=True, slots=True)
class Form:
    """One way to write an object."""

    members: tuple[Member, ...]
    free: tuple[Members, ...]
    """They come after all others."""
    least: int
    most: int | None


def settled(objects: Objects) -> list[Objects]:
    """The same without silences and `exists`.

    An object that lists properties and says nothing of others gets none, unless it couldn't be otherwise. Of several
    ways to be no object of another kind, those that a writer would think of are taken: a key is missing.
    """
    described = dict.fromkeys((*objects.listed, *(key for key in objects.required if key not in objects.denied)))
    if not objects.says and _closes(objects, len(described)):
        if not objects.denied <= described.keys():
            return []
        last = Members(besides(described, objects.patterns), NOTHING)
        objects = replace(objects, members=(*objects.members, last))
    return _with_members(objects)


def _closes(objects: Objects, described: int) -> bool:
    if objects.patterns:
        return True
    if described:
        return objects.least <= described
    return objects.is_root and not objects.least and not objects.members and not objects.exists


def _with_members(objects: Objects) -> list[Objects]:
    """The same, where it's a known key that each of `exists` is about."""
    known = dict.fromkeys((*objects.properties, *objects.required))
    result = [replace(objects, exists=())]
    for exists in objects.exists:
        ways = [Objects({key: exists.node}, required=(key,)) for key in known if key in exists.keys]
        result = [both for each in result for way in ways if (both := each.and_also(way)) is not None]
        if len(result) > _MOST_ALTERNATIVES:
            raise UnsupportedError("too many alternatives")
    return result


def form_of(objects: Objects, is_nothing: Callable[[Node], bool]) -> Form | None:
    """How to write a settled object; None if there is none. Members that no value fits are left out."""
    keys = dict.fromkeys((*objects.properties, *objects.required))
    members = []
    for key in keys:
        node, required = objects.node(key), key in objects.required
        if not is_nothing(node):
            members.append(Member(key, node, required))
        elif required:
            return None
    free = []
    for each in _free(objects, keys, is_nothing):
        if (known := listed(each.keys.texts, _MOST_KEYS)) is None:
            free.append(each)
        else:  # these come once each
            members += [Member(key, each.node, required=False) for key in known]
    most, needed = objects.most, [member for member in members if member.required]
    if most == len(needed):
        members, free = needed, []
    if (not free and len(members) < objects.least) or (most is not None and len(needed) > most):
        return None
    if not free and most is not None and most >= len(members):
        most = None
    return Form(tuple(members), tuple(free), objects.least, most)


def _free(objects: Objects, taken: Iterable[str], is_nothing: Callable[[Node], bool]) -> list[Members]:
    """Members of other keys, by which of `members` these are among."""
    cells = {Members(besides(taken, ()), ANYTHING): None}
    for each in dict.fromkeys(objects.members):
        parts = [each, *(Members(others, ANYTHING) for others in each.keys.complements())]
        cells = dict.fromkeys(
            Members(keys, joined((cell.node, part.node)))
            for cell in cells
            for part in parts
            if part.node != NOTHING and (keys := cell.keys.and_also(part.keys)) is not None and keys.texts != NEVER
        )
        if len(cells) > _MOST_CELLS:
            raise UnsupportedError("patternProperties")
    return [cell for cell in cells if not is_nothing(cell.node)]
