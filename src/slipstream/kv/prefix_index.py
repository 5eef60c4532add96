"""A radix tree that finds the longest common prefix of a prompt with what is in memory."""

from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

import numpy as np

from slipstream.types import IntArray

T = TypeVar("T")


class _Node(Generic[T]):
    """The end of an edge; `edge` holds the tokens on the way from the parent. Holds no KV."""

    __slots__ = ("_buffer", "children", "edge", "entries", "parent")

    def __init__(self, edge: IntArray, parent: "_Node[T] | None") -> None:
        self.edge = self._buffer = edge
        self.parent = parent
        self.children: dict[int, _Node[T]] = {}
        self.entries: list[T] = []

    def lengthen(self, tokens: IntArray) -> None:
        """Add tokens at the end of the edge; costs O(tokens added), amortised."""
        size = len(self.edge)
        end = size + len(tokens)
        if end > len(self._buffer):
            self._buffer = np.concatenate((self.edge, np.empty(end + 16, np.int32)))
        self._buffer[size:end] = tokens
        self.edge = self._buffer[:end]

    def shorten(self, length: int) -> None:
        """Drop the first `length` tokens of the edge."""
        self.edge, self._buffer = self.edge[length:], self._buffer[length:]


class PrefixIndex(Generic[T]):
    """A compressed radix tree over token sequences, each with an entry (hashable) at its end.

    Splitting an edge touches no KV: nodes know tokens and entries only. Lookup compares each token once.
    """

    def __init__(self) -> None:
        self._root: _Node[T] = _Node(np.empty(0, np.int32), None)
        self._ends: dict[T, _Node[T]] = {}

    def __contains__(self, entry: T) -> bool:
        return entry in self._ends

    def insert(self, tokens: IntArray, entry: T) -> None:
        """Add an entry that stands for `tokens`."""
        assert entry not in self._ends
        self._attach(self._root, tokens, entry)

    def extend(self, entry: T, tokens: IntArray) -> None:
        """Let the entry stand for `tokens` more than it did; costs O(tokens added)."""
        node = self._ends[entry]
        node.entries.remove(entry)
        self._attach(node, tokens, entry)
        self._prune(node)

    def remove(self, entry: T) -> None:
        """Take the entry out; raises `KeyError` if it isn't there."""
        node = self._ends.pop(entry)
        node.entries.remove(entry)
        self._prune(node)

    def sharing(self, tokens: IntArray) -> tuple[int, Iterator[T]]:
        """Length of the longest common prefix of `tokens` with any entry, and all entries that share some of it.

        Those that share most come first, of these the one that ends nearest.
        """
        node, matched = self._root, 0
        while matched < len(tokens) and (child := node.children.get(int(tokens[matched]))):
            common = common_length(child.edge, tokens[matched:])
            matched += common
            node = child
            if common < len(child.edge):
                break
        return matched, self._around(node)

    def prefixes_of(self, entry: T) -> Iterator[T]:
        """Other entries that stand for the same tokens or a prefix of them."""
        node: _Node[T] | None = self._ends[entry]
        while node is not None:
            yield from [other for other in node.entries if other != entry]
            node = node.parent

    def is_extended(self, entry: T) -> bool:
        """Whether another entry stands for the same tokens or more."""
        node = self._ends[entry]
        return bool(node.children) or len(node.entries) > 1

    @staticmethod
    def _around(node: _Node[T]) -> Iterator[T]:
        """Entries at a node and below it, then those above."""
        below = deque([node])
        while below:
            each = below.popleft()
            yield from reversed(each.entries)
            below.extend(each.children.values())
        above = node.parent
        while above is not None:
            yield from reversed(above.entries)
            above = above.parent

    def _attach(self, node: _Node[T], tokens: IntArray, entry: T) -> None:
        """Put the entry at the end of `tokens` below `node`, adding and splitting edges as needed."""
        position = 0
        while position < len(tokens):
            child = node.children.get(int(tokens[position]))
            if child is None:
                if not node.children and not node.entries and node.parent is not None:
                    node.lengthen(tokens[position:])
                    break
                leaf = _Node(tokens[position:].copy(), node)
                node.children[int(tokens[position])] = leaf
                node = leaf
                break
            common = common_length(child.edge, tokens[position:])
            position += common
            node = child if common == len(child.edge) else self._split(child, common)
        node.entries.append(entry)
        self._ends[entry] = node

    def _split(self, node: _Node[T], length: int) -> _Node[T]:
        """Cut the edge of `node` after `length` tokens; returns the new node in between."""
        assert node.parent is not None
        middle = _Node(node.edge[:length], node.parent)
        node.parent.children[int(node.edge[0])] = middle
        node.shorten(length)
        node.parent = middle
        middle.children[int(node.edge[0])] = node
        return middle

    def _prune(self, node: _Node[T]) -> None:
        """Remove what no longer leads to an entry, and join edges that no longer part."""
        while node.parent is not None and not node.entries and not node.children:
            del node.parent.children[int(node.edge[0])]
            node = node.parent
        if node.parent is not None and not node.entries and len(node.children) == 1:
            (child,) = node.children.values()
            child.edge = child._buffer = np.concatenate((node.edge, child.edge))
            child.parent = node.parent
            node.parent.children[int(child.edge[0])] = child


def common_length(first: IntArray, second: IntArray) -> int:
    """How many tokens the two sequences share from their start."""
    size = min(len(first), len(second))
    different = np.flatnonzero(first[:size] != second[:size])
    return int(different[0]) if len(different) else size
