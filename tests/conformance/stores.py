"""What any store must keep to, alone and below a `KVMemory`: random use, with an oracle that knows all tokens."""

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from slipstream.backend import Chunk, Exported, OutOfMemoryError, SequenceState, Store
from slipstream.backend.store import Span
from slipstream.kv import KVMemory, Sequence
from slipstream.types import IntArray
from tests.unit.toy_backend import CheckpointToy, HybridToy, Toy, ToyBackend, WindowToy

Tokens = st.lists(st.integers(1, 3), min_size=1, max_size=20)
Tenants = st.sampled_from(["", "other"])
Runs = st.builds(
    lambda start, count: [(start + at) % 3 + 1 for at in range(count)], st.integers(0, 2), st.integers(1, 24)
)
"""Tokens by the dozen: lists that are drawn one by one stay short."""
Shares = st.sampled_from([0.0, 0.3, 0.5, 0.8, 0.95, 1.0])
KINDS = ("paged", "checkpoints", "hybrid", "windows", "windows alone")


def toy(kind: str, tokens: int) -> Toy:
    """A backend of a kind, with memory for about so many tokens."""
    if kind == "hybrid":
        return HybridToy(tokens)
    if kind.startswith("windows"):
        return WindowToy(tokens, has_full_attention=kind == "windows")
    return ToyBackend(tokens // 4) if kind == "paged" else CheckpointToy(tokens, every=3)


def ids(tokens: object) -> IntArray:
    return np.array(tokens, np.int32)


def carry_over(store: Store[Any], state: SequenceState, copy: SequenceState, start: int, end: int) -> int:
    """Have a copy go on by what a state has from `start` to `end`; returns how many rows of blobs that takes."""
    parts = [(span, store.export(state, span.start, span.end)) for span in store.spans(start, end)]
    install(store, copy, parts)
    return sum(span.rows for span, _ in parts)


def install(store: Store[Any], state: SequenceState, parts: Iterable[tuple[Span, Exported]]) -> None:
    """Have a state go on by what was exported."""
    for span, exported in parts:
        blob = exported.wait()
        assert len(blob) == span.rows
        assert blob.nbytes == exported.nbytes
        store.install(state, span.end, blob)


def assert_exports_outlive_states(backend: Toy) -> None:
    """What was exported arrives as it was then, whoever has its memory by now."""
    store, tokens = backend.store, ids([at % 3 + 1 for at in range(40)])
    state = store.open(41)
    compute(backend, state, tokens)
    parts = [(span, store.export(state, span.start, span.end)) for span in store.spans(0, 40)]
    store.rewind(state, 0)
    compute(backend, state, ids([4] * 40))
    store.release(state)
    others = []
    while store.open_cost(41) <= store.free:
        others.append(store.open(41))
        compute(backend, others[-1], ids([5] * 40))
    store.release(others.pop())
    copy = store.open(41)
    install(store, copy, parts)
    assert backend.contents(copy) == tokens.tolist()


def compute(backend: Toy, state: SequenceState, tokens: IntArray) -> None:
    """Run a step of one chunk."""
    backend.launch([Chunk(state, tokens, 1)]).wait()


class StoreMachine(RuleBasedStateMachine):
    """States of a store: opened, forked, rewound, extended, exported and installed at random."""

    kind: ClassVar[str]

    @initialize(size=st.sampled_from([60, 200, 400]))
    def start(self, size: int) -> None:
        self.backend = toy(self.kind, size)
        self.store = self.backend.store
        self.size = self.store.free
        self.said: dict[SequenceState, list[int]] = {}
        self.room: dict[SequenceState, int] = {}

    @rule(tokens=Runs, more=st.integers(0, 12))
    def open(self, tokens: list[int], more: int) -> None:
        room = len(tokens) + more
        cost, free = self.store.open_cost(room), self.store.free
        try:
            state = self.store.open(room)
        except OutOfMemoryError:
            assert cost > free == self.store.free
            return
        assert self.store.free == free - cost
        compute(self.backend, state, ids(tokens))
        self.said[state], self.room[state] = tokens, room

    @precondition(lambda self: self.said)
    @rule(data=st.data(), share=Shares, more=st.integers(0, 12))
    def fork(self, data: st.DataObject, share: float, more: int) -> None:
        source = self._any(data)
        length = round(len(self.said[source]) * share)
        cost, free = self.store.fork_cost(source, length, length + more), self.store.free
        try:
            state = self.store.fork(source, length, length + more)
        except OutOfMemoryError:
            assert cost > free == self.store.free
            return
        assert self.store.free == free - cost
        assert state.length <= length
        self.said[state], self.room[state] = self.said[source][: state.length], length + more

    @precondition(lambda self: self.said)
    @rule(data=st.data(), tokens=Runs)
    def extend(self, data: st.DataObject, tokens: list[int]) -> None:
        state = self._any(data, evictable=False)
        room = len(self.said[state]) + len(tokens)
        cost, free = self.store.reserve_cost(state, room), self.store.free
        try:
            self.store.reserve(state, room)
        except OutOfMemoryError:
            assert cost > free == self.store.free
            return
        assert self.store.free == free - cost
        compute(self.backend, state, ids(tokens))
        self.said[state] = self.said[state] + tokens
        self.room[state] = max(self.room[state], room)
        assert self.store.reserve_cost(state, self.room[state]) == 0

    @precondition(lambda self: self.said)
    @rule(data=st.data(), share=Shares)
    def rewind(self, data: st.DataObject, share: float) -> None:
        state = self._any(data, evictable=False)
        length = round(len(self.said[state]) * share)
        reached = self.store.rewind(state, length)
        assert reached == state.length <= length
        self.said[state] = self.said[state][:reached]

    @precondition(lambda self: self.said)
    @rule(data=st.data())
    def trim(self, data: st.DataObject) -> None:
        state = self._any(data)
        free = self.store.free
        self.store.trim(state)
        self.room[state] = len(self.said[state])
        assert self.store.free >= free

    @precondition(lambda self: self.said)
    @rule(data=st.data(), evictable=st.sampled_from([True, False, False]))
    def lend(self, data: st.DataObject, evictable: bool) -> None:
        state = self._any(data)
        self.store.set_evictable(state, evictable)

    @precondition(lambda self: self.said)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        state = self._any(data)
        del self.said[state]
        self.store.release(state)

    @rule()
    def evict(self) -> None:
        """What evictable states alone hold is what all of them give back."""
        expected = self.store.free + self.store.evictable
        for state in [state for state in self.said if state.evictable]:
            del self.said[state]
            self.store.release(state)
        assert self.store.free == expected

    @precondition(lambda self: self.said)
    @rule(data=st.data(), share=Shares)
    def export_and_install(self, data: st.DataObject, share: float) -> None:
        state = self._any(data)
        assume(self.said[state])
        end, start = len(self.said[state]), round(len(self.said[state]) * share)
        assume(start < end)
        aligned = self.store.aligned(start)
        assert 0 <= aligned <= start
        spans = list(self.store.spans(start, end))
        assert [span.start for span in spans] == [start, *(span.end for span in spans[:-1])]
        assert spans[-1].end == end
        try:
            copy = self.store.fork(state, aligned, end)
        except OutOfMemoryError:
            return
        if copy.length < aligned:
            self.store.release(copy)
            return
        carry_over(self.store, state, copy, start, end)
        self.said[copy], self.room[copy] = list(self.said[state]), end

    def _any(self, data: st.DataObject, *, evictable: bool = True) -> SequenceState:
        """One of the states, if need be one that isn't evictable; the newest are the likeliest."""
        states = [state for state in reversed(self.said) if evictable or not state.evictable]
        assume(states)
        return data.draw(st.sampled_from(states), "state")

    @invariant()
    def holds_what_was_said(self) -> None:
        if not hasattr(self, "store"):
            return
        self.store.check(list(self.said))
        assert self.store.held(self.said) == self.size - self.store.free
        for state, tokens in self.said.items():
            assert self.backend.contents(state) == tokens

    def teardown(self) -> None:
        if hasattr(self, "store"):
            for state in self.said:
                self.store.release(state)
            assert self.store.free == self.size


class KVMemoryMachine(RuleBasedStateMachine):
    """Sequences of a `KVMemory`: nothing leaks, nothing is freed twice, nothing computed changes under its holder."""

    kind: ClassVar[str]

    @initialize(size=st.integers(16, 96))
    def start(self, size: int) -> None:
        self.backend = toy(self.kind, size)
        self.reserved = 16
        self.kv = KVMemory(self.backend.store, reserved=self.reserved)
        self.held: dict[Sequence, str] = {}
        self.saved: list[tuple[str, IntArray, int, Exported]] = []

    @rule(tokens=Tokens, tenant=Tenants, more=st.integers(0, 8), reuse=st.booleans())
    def open(self, tokens: list[int], tenant: str, more: int, reuse: bool) -> None:
        assume(len(tokens) + more <= (self.reserved if self.kv.usage().pinned_sequences else self.kv.capacity))
        prompt, before = ids(tokens), self.kv.usage()
        expected = self.kv.computed(tenant, prompt[:-1])
        sequence = self.kv.open(tenant, prompt, room=len(prompt) + more, reuse=reuse)
        if sequence is None:
            assert self.kv.usage() == before
            assert self.held, "with nothing running, everything is reclaimable"
            return
        self.held[sequence] = tenant
        assert sequence.tokens.tolist() == tokens
        assert sequence.computed <= (expected if reuse else 0)
        assert self.kind != "paged" or sequence.computed in ((expected, 0) if reuse else (0,))

    @precondition(lambda self: self.held)
    @rule(data=st.data(), count=st.integers(1, 12))
    def compute(self, data: st.DataObject, count: int) -> None:
        sequence = self._any(data)
        count = min(count, sequence.pending)
        assume(count > 0)
        self.backend.launch([sequence.chunk(count, 0)]).wait()

    @precondition(lambda self: self.held)
    @rule(data=st.data(), tokens=Tokens)
    def generate(self, data: st.DataObject, tokens: list[int]) -> None:
        sequence = self._any(data)
        if self.kv.grow(sequence, len(sequence) + len(tokens)):
            sequence.extend(ids(tokens))

    @precondition(lambda self: self.held)
    @rule(data=st.data(), draft=Tokens, confirmed=st.integers(0, 20))
    def verify_a_draft(self, data: st.DataObject, draft: list[int], confirmed: int) -> None:
        sequence = self._any(data)
        assume(sequence.pending)
        if not self.kv.grow_freely(sequence, len(sequence) + len(draft)):
            return
        kept = self.kv.keeps_draft(sequence, sequence.pending, len(draft), ())
        self.backend.launch([sequence.chunk(sequence.pending, 1 + len(draft), draft)]).wait()
        length = len(sequence)
        sequence.extend(ids(draft[:confirmed]))
        self.kv.rewind(sequence, length + min(confirmed, len(draft)))
        assert sequence.computed <= len(sequence)
        assert not kept or sequence.computed == length + min(confirmed, len(draft))

    @precondition(lambda self: self.held)
    @rule(data=st.data(), keep=st.booleans())
    def finish(self, data: st.DataObject, keep: bool) -> None:
        sequence = self._any(data)
        del self.held[sequence]
        (self.kv.cache if keep else self.kv.release)(sequence)

    @rule(tokens=Tokens, tenant=Tenants, name=st.sampled_from(["first", "second"]))
    def pin(self, tokens: list[int], tenant: str, name: str) -> None:
        before, computed = self.kv.usage(), self.kv.computed(tenant, ids(tokens))
        if not self.kv.pin(name, tenant, ids(tokens)):
            assert self.kv.usage().pinned_sequences == before.pinned_sequences
        elif self.kind == "paged":
            assert computed - 4 < self.kv.computed(tenant, ids(tokens)) <= computed

    @rule(name=st.sampled_from(["first", "second"]))
    def unpin(self, name: str) -> None:
        self.kv.unpin(name)
        assert name not in self.kv._pinned

    @rule(tokens=Tokens, tenant=Tenants, share=st.floats(0, 0.99))
    def export(self, tokens: list[int], tenant: str, share: float) -> None:
        start = int(len(tokens) * share)
        exported = self.kv.export(tenant, ids(tokens), start)
        assert (exported is not None) == (self.kv.computed(tenant, ids(tokens)) == len(tokens))
        if exported is not None:
            self.saved.append((tenant, ids(tokens), start, exported))

    @precondition(lambda self: self.saved)
    @rule(data=st.data())
    def install(self, data: st.DataObject) -> None:
        tenant, tokens, start, exported = data.draw(st.sampled_from(self.saved))
        before = self.kv.computed(tenant, tokens)
        if list(self.kv.install(tenant, tokens, start, exported.wait()))[-1]:
            assert self.kv.computed(tenant, tokens) == len(tokens)
        else:
            assert self.kv.computed(tenant, tokens) <= before < len(tokens)

    @invariant()
    def consistent(self) -> None:
        if not hasattr(self, "kv"):
            return
        self.kv.check()
        assert not self.backend.violations
        for sequence in self._all():
            assert self.backend.contents(sequence.state) == sequence.tokens[: sequence.computed].tolist()

    def _any(self, data: st.DataObject) -> Sequence:
        return data.draw(st.sampled_from(list(reversed(self.held))), "sequence")

    def _all(self) -> Iterator[Sequence]:
        yield from (*self.held, *self.kv._cached, *self.kv._pinned.values())

    def teardown(self) -> None:
        if not hasattr(self, "kv"):
            return
        for sequence in self.held:
            self.kv.release(sequence)
        for name in list(self.kv._pinned):
            self.kv.unpin(name)
        self.kv.clear()
        self.kv.check()
        usage = self.kv.usage()
        assert usage.free == usage.capacity
