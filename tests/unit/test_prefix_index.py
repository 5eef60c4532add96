"""The prefix index against a brute-force oracle."""

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from slipstream.kv import PrefixIndex
from slipstream.kv.prefix_index import common_length

Tokens = st.lists(st.integers(0, 2), max_size=12)


def array(tokens: list[int]) -> np.ndarray:
    return np.array(tokens, np.int32)


class PrefixIndexMachine(RuleBasedStateMachine):
    entries = Bundle("entries")

    def __init__(self) -> None:
        super().__init__()
        self.index: PrefixIndex[str] = PrefixIndex()
        self.oracle: dict[str, list[int]] = {}
        self.count = 0

    @rule(target=entries, tokens=Tokens)
    def insert(self, tokens: list[int]) -> str:
        self.count += 1
        entry = f"entry {self.count}"
        self.index.insert(array(tokens), entry)
        self.oracle[entry] = tokens
        return entry

    @rule(entry=entries, more=Tokens)
    def extend(self, entry: str, more: list[int]) -> None:
        self.index.extend(entry, array(more))
        self.oracle[entry] = self.oracle[entry] + more

    @rule(entry=consumes(entries))
    def remove(self, entry: str) -> None:
        self.index.remove(entry)
        del self.oracle[entry]

    @rule(tokens=Tokens)
    def look_up(self, tokens: list[int]) -> None:
        def common(other: list[int]) -> int:
            return next(
                (i for i, (a, b) in enumerate(zip(tokens, other, strict=False)) if a != b), min(len(tokens), len(other))
            )

        length, entries = self.index.sharing(array(tokens))
        assert length == max(map(common, self.oracle.values()), default=0)
        if length:
            entry = next(entries)
            assert common(self.oracle[entry]) == length
            ends_there = [e for e, t in self.oracle.items() if t == tokens[:length]]
            assert not ends_there or entry in ends_there

    @rule(entry=entries)
    def prefixes(self, entry: str) -> None:
        own = self.oracle[entry]
        expected = {e for e, t in self.oracle.items() if e != entry and own[: len(t)] == t}
        assert set(self.index.prefixes_of(entry)) == expected

    @invariant()
    def compressed(self) -> None:
        """Every node but the root ends an entry or parts ways; edges start with the key they are filed under."""
        assert len(self.index._ends) == len(self.oracle)
        pending = [self.index._root]
        while pending:
            node = pending.pop()
            for token, child in node.children.items():
                assert child.parent is node
                assert child.edge[0] == token
                assert child.entries or len(child.children) > 1
                pending.append(child)


PrefixIndexMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40)
TestPrefixIndex = PrefixIndexMachine.TestCase


def test_common_length() -> None:
    assert common_length(array([]), array([1])) == 0
    assert common_length(array([1, 2, 3]), array([1, 2])) == 2
    assert common_length(array([1, 2, 3]), array([1, 5, 3])) == 1
