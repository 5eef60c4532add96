"""Arrays as they are written: members one by one, counted where a schema counts them."""

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

from slipstream.chat.schema.losses import UnsupportedError
from slipstream.chat.schema.meaning import Meaning
from slipstream.chat.schema.numbers import Numbers
from slipstream.chat.schema.shapes import Arrays, Node, Not, Strings, Words, joined

if TYPE_CHECKING:
    from slipstream.chat.schema.json_rules import JsonRules

_MOST_STATES = 150
_State = tuple[int, tuple[int, ...]]
"""A place in an array, and how many members before it fit each of `contains`."""

# Arrays without repetitions are listed one by one, if they are not too many: of up to five values there are 326.
_MOST_ARRAYS = 400
_LONGEST_ARRAY = 6


class ArrayRules:
    """Writes one shape of arrays."""

    def __init__(self, arrays: Arrays, rules: "JsonRules", is_nothing: Callable[[Node], bool]) -> None:
        self._arrays, self._rules, self._is_nothing = arrays, rules, is_nothing
        self._prefix = len(arrays.prefix)
        self._tail = arrays.items
        self._most = arrays.most
        if is_nothing(self._tail):
            self._limit(self._prefix)
        for index in range(self._prefix):
            if is_nothing(arrays.node(index)):
                self._limit(index)
                break
        self._start: _State = 0, (0,) * len(arrays.contains)

    def _limit(self, most: int) -> None:
        self._most = most if self._most is None else min(self._most, most)

    @property
    def fits_some(self) -> bool:
        """Whether there is an array that fits."""
        if self._most is not None and self._arrays.least > self._most:
            return False
        if not self._arrays.contains:
            return True
        return self._start in self._states

    def expression(self) -> str:
        """The Lark expression of the arrays, of which there must be some."""
        if self._arrays.contains:
            return self._counted()
        least, most = self._arrays.least, self._most
        prefix = min(self._prefix, most) if most is not None else self._prefix
        nodes = [self._rules.expression(self._arrays.node(index)) for index in range(prefix)]
        members = ""
        if most is None or most > prefix:
            item, low, high = self._rules.expression(self._tail), max(least - prefix, 0), most and most - prefix
            members = self._rules.repeated(item, low, high, first=not prefix)
        for index in reversed(range(prefix)):
            separator = f"{self._rules.SEPARATOR} " if index else ""
            members = f"{separator}{nodes[index]} {members}"
            members = members if index < least else f"({members})?"
        return f'"[" {members} "]"'

    def _counted(self) -> str:
        """The Lark expression of members that are counted: a rule for each state."""
        names = {state: self._rules.new_name() for state in self._states}
        for state, choices in self._states.items():
            separator = self._rules.SEPARATOR if state[0] else ""
            ways = [f"{separator} {self._rules.expression(node)} {names[after]}" for node, after in choices]
            ways += ['"]"'] if self._may_end(*state) else []
            self._rules.rules.append(f"{names[state]}: {' | '.join(ways)}")
        return f'"[" {names[self._start]}'

    @cached_property
    def _states(self) -> dict[_State, list[tuple[Node, _State]]]:
        """The states that lead to an end, each with what the next member may be, and the state after it."""
        states: dict[_State, list[tuple[Node, _State]]] = {}
        pending = [self._start]
        while pending:
            state = pending.pop()
            if state not in states:
                states[state] = [way for way in self._choices(*state) if not self._is_nothing(way[0])]
                pending += (after for _, after in states[state])
            if len(states) > _MOST_STATES:
                raise UnsupportedError("contains")
        live = {state for state in states if self._may_end(*state)}
        while more := {state for state, ways in states.items() if any(after in live for _, after in ways)} - live:
            live |= more
        return {state: [way for way in ways if way[1] in live] for state, ways in states.items() if state in live}

    def _choices(self, index: int, counts: tuple[int, ...]) -> list[tuple[Node, _State]]:
        """What the member of an index may be, and the state after it."""
        if index == self._most:
            return []
        ways: list[tuple[Node, tuple[int, ...]]] = [(self._arrays.node(index), ())]
        for contains, count in zip(self._arrays.contains, counts, strict=True):
            grown: list[tuple[Node, tuple[int, ...]]] = []
            for node, after in ways:
                if contains.most is None and count >= contains.least:
                    grown.append((node, (*after, count)))
                    continue
                if contains.most is None or count < contains.most:
                    grown.append((joined((node, contains.node)), (*after, count + 1)))
                # Where no bound is above, it makes no difference to take one that fits for one that doesn't.
                other = node if contains.most is None else joined((node, (Not(contains.node),)))
                grown.append((other, (*after, count)))
            ways = grown
        last = max(self._prefix, self._arrays.least, 1)  # stands for all places after it
        place = index + 1 if self._most is not None else min(index + 1, last)
        return [(node, (place, after)) for node, after in ways]

    def _may_end(self, index: int, counts: tuple[int, ...]) -> bool:
        enough = all(count >= each.least for count, each in zip(counts, self._arrays.contains, strict=True))
        return enough and index >= self._arrays.least


def listed_arrays(arrays: Arrays, meaning: Meaning) -> list[tuple[Any, ...]] | None:
    """All arrays without repetitions, in any order; None if they are too many, or not to be listed."""
    if arrays.contains:
        return None
    longest = arrays.most
    if longest is None or longest > _LONGEST_ARRAY:
        tail = listed_values(arrays.items, meaning)
        if tail is None or len(arrays.prefix) + len(tail) > _LONGEST_ARRAY:
            return None
        longest = len(arrays.prefix) + len(tail)
    result: list[tuple[Any, ...]] = []
    grown: list[tuple[Any, ...]] = [()]
    for length in range(longest + 1):
        if length >= arrays.least:
            result += grown
        if len(grown) > _MOST_ARRAYS or len(result) > _MOST_ARRAYS:
            return None
        if length < longest:
            values = listed_values(arrays.node(length), meaning)
            if values is None:
                return None
            grown = [(*array, new) for array in grown for new in values if not any(_same(new, each) for each in array)]
    return result


def listed_values(node: Node, meaning: Meaning) -> list[Any] | None:
    """The values of a node; None if they can't be listed."""
    result: list[Any] = []
    for shape in meaning.shapes(node):
        match shape:
            case Strings(values=values) | Numbers(values=values) if values is not None:
                result += values
            case Words(values):
                result += sorted(values, key=str)
            case _:
                return None
    return result


def _same(first: Any, second: Any) -> bool:
    return first == second and isinstance(first, bool) == isinstance(second, bool)
