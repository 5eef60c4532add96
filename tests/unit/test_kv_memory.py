"""KV memory under random use: nothing leaks, nothing is freed twice, no computed slot changes under its holder."""

from collections.abc import Callable
from typing import cast

import numpy as np
import pytest
from hypothesis import assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from slipstream.backend import Backend
from slipstream.kv import BlockPool, KVMemory, OutOfBlocksError, Sequence

BLOCK = 4
Tokens = st.lists(st.integers(0, 2), min_size=1, max_size=20)
Tenants = st.sampled_from(["", "other"])


class Storage:
    """Stands for a backend's KV: each slot remembers which token was computed into it."""

    block_size = BLOCK

    def __init__(self, num_blocks: int, *, copies: bool = True) -> None:
        self.num_blocks = num_blocks
        self.slots = np.full((num_blocks + 1, BLOCK), -1)
        self._copies = copies

    def copy_block(self, source: int, target: int) -> None:
        assert self._copies, "nothing should be copied"
        self.slots[target] = self.slots[source]

    def read_blocks(self, blocks: np.ndarray) -> np.ndarray:
        return self.slots[blocks]

    def write_blocks(self, blocks: np.ndarray, contents: np.ndarray) -> None:
        self.slots[blocks] = contents

    def compute(self, sequence: Sequence, count: int) -> None:
        for position in range(sequence.computed, sequence.computed + count):
            self.slots[sequence.block_table[position // BLOCK], position % BLOCK] = sequence.tokens[position]
        after = sequence.computed + count  # a backend may write rubbish there
        self.slots[sequence.block_table[after // BLOCK], after % BLOCK] = -1

    def read(self, sequence: Sequence) -> list[int]:
        return [self.slots[sequence.block_table[i // BLOCK], i % BLOCK] for i in range(sequence.computed)]


class KVMemoryMachine(RuleBasedStateMachine):
    running = Bundle("running")

    @initialize(num_blocks=st.integers(4, 24))
    def start(self, num_blocks: int) -> None:
        self.storage = Storage(num_blocks)
        self.reserved = 4 * BLOCK
        self.kv = KVMemory(cast(Backend, self.storage), reserved=self.reserved)
        self.held: dict[Sequence, str] = {}
        self.saved: list[tuple[str, np.ndarray, np.ndarray]] = []

    @rule(target=running, tokens=Tokens, tenant=Tenants, more=st.integers(0, 8), reuse=st.booleans())
    def open(self, tokens: list[int], tenant: str, more: int, reuse: bool) -> Sequence | None:
        assume(len(tokens) + more < (self.reserved if self.kv.usage().pinned_sequences else self.kv.capacity))
        prompt = np.array(tokens, np.int32)
        before = self.kv.usage()
        expected = self.kv.available(tenant, prompt)
        sequence = self.kv.open(tenant, prompt, room=len(prompt) + more + 1, reuse=reuse)
        if sequence is None:
            assert self.kv.usage() == before
            assert self.held, "with nothing running, everything is reclaimable"
            return None
        self.held[sequence] = tenant
        assert sequence.tokens.tolist() == tokens
        assert sequence.computed in ((expected, 0) if reuse else (0,))
        assert sequence.capacity > len(prompt) + more
        return sequence

    @rule(sequence=running, count=st.integers(1, 12))
    def compute(self, sequence: Sequence | None, count: int) -> None:
        assume(sequence is not None)
        count = min(count, len(sequence) - sequence.computed)
        assume(count > 0)
        self.storage.compute(sequence, count)
        self.kv.advance(sequence, count)

    @rule(sequence=running, tokens=Tokens)
    def generate(self, sequence: Sequence | None, tokens: list[int]) -> None:
        assume(sequence is not None)
        if self.kv.grow(sequence, len(sequence) + len(tokens) + 1):
            sequence.extend(tokens)
        else:
            assert self.kv.usage().retained_sequences == 0

    @rule(sequence=running, share=st.floats(0, 1))
    def reject_drafts(self, sequence: Sequence | None, share: float) -> None:
        assume(sequence is not None)
        pending = len(sequence) - sequence.computed
        sequence.truncate(sequence.computed + int(pending * share))
        self.kv.grow(sequence, len(sequence) + 1)

    @rule(sequence=consumes(running), keep=st.booleans())
    def finish(self, sequence: Sequence | None, keep: bool) -> None:
        assume(sequence is not None)
        del self.held[sequence]
        (self.kv.retain if keep else self.kv.release)(sequence)

    @rule(tokens=Tokens, tenant=Tenants, name=st.sampled_from(["first", "second"]))
    def pin(self, tokens: list[int], tenant: str, name: str) -> None:
        prompt = np.array(tokens, np.int32)
        before, computed = self.kv.usage(), self.kv.computed(tenant, prompt)
        if self.kv.pin(name, tenant, prompt):
            assert computed - BLOCK < self.kv.computed(tenant, prompt) <= computed
        else:
            assert self.kv.usage().pinned_sequences == before.pinned_sequences

    @rule(name=st.sampled_from(["first", "second"]))
    def unpin(self, name: str) -> None:
        self.kv.unpin(name)
        assert name not in self.kv._pinned

    @rule(tokens=Tokens, tenant=Tenants, share=st.floats(0, 0.99))
    def export(self, tokens: list[int], tenant: str, share: float) -> None:
        prompt = np.array(tokens, np.int32)
        contents = self.kv.export(tenant, prompt, int(len(prompt) * share))
        assert (contents is not None) == (self.kv.computed(tenant, prompt) == len(prompt))
        if contents is not None:
            self.saved.append((tenant, prompt, contents))

    @rule(data=st.data())
    def install(self, data: st.DataObject) -> None:
        assume(self.saved)
        tenant, tokens, contents = data.draw(st.sampled_from(self.saved))
        before = self.kv.computed(tenant, tokens)
        if self.kv.install(tenant, tokens, contents):
            assert self.kv.computed(tenant, tokens) == len(tokens)
        else:
            assert self.kv.computed(tenant, tokens) <= before < len(tokens)

    @invariant()
    def consistent(self) -> None:
        if not hasattr(self, "kv"):
            return
        self.kv.check()
        for sequence in [*self.held, *self.kv._retained, *self.kv._pinned.values()]:
            assert self.storage.read(sequence) == sequence.tokens[: sequence.computed].tolist()

    def teardown(self) -> None:
        if not hasattr(self, "kv"):
            return
        for sequence in self.held:
            self.kv.release(sequence)
        for name in list(self.kv._pinned):
            self.kv.unpin(name)
        self.kv.clear()
        self.kv.check()
        assert self.kv.usage().free == self.kv.capacity


KVMemoryMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
TestKVMemory = KVMemoryMachine.TestCase


def no_copy(source: int, target: int) -> None:
    raise AssertionError("nothing should be copied")


def pool(num_blocks: int = 8, copy: Callable[[int, int], None] = no_copy) -> BlockPool:
    return BlockPool(num_blocks, BLOCK, copy)


def test_a_pool_gives_all_blocks_once_and_then_refuses() -> None:
    blocks = pool()
    assert sorted(blocks.allocate(8)) == list(range(1, 9))
    with pytest.raises(OutOfBlocksError):
        blocks.allocate(1)


def test_releasing_a_free_block_is_an_error() -> None:
    blocks = pool()
    taken = blocks.allocate(2)
    blocks.release(taken)
    with pytest.raises(ValueError, match="more often"):
        blocks.release(taken[:1])


def test_a_fork_at_a_block_border_copies_nothing() -> None:
    sequence = Sequence(blocks := pool(), range(8))
    sequence.reserve(9)
    sequence.computed = 8
    child = sequence.fork(8)
    assert child.block_table.tolist() == sequence.block_table[:2].tolist()
    sequence.release()
    child.release()
    blocks.check()
    assert blocks.free_count == 8


def test_truncating_into_a_shared_block_leaves_the_other_holder_alone() -> None:
    copies = []
    blocks = pool(copy=lambda source, target: copies.append((source, target)))
    sequence = Sequence(blocks, range(8))
    sequence.reserve(9)
    sequence.computed = 8
    child = sequence.fork(8)
    shared = sequence.block_table[1]
    sequence.truncate(6)
    assert copies == [(shared, sequence.block_table[1])]
    assert child.block_table[1] == shared


def memory(num_blocks: int, *, copies: bool = True, reserved: int = 0) -> KVMemory:
    return KVMemory(cast(Backend, Storage(num_blocks, copies=copies)), reserved=reserved)


def filled(kv: KVMemory, tokens: range | list[int], tenant: str = "") -> Sequence:
    sequence = kv.open(tenant, np.array(tokens, np.int32), room=len(tokens) + 1)
    assert sequence is not None
    kv.advance(sequence, len(sequence) - sequence.computed)
    return sequence


def test_an_extended_conversation_is_taken_over_without_a_copy() -> None:
    kv = memory(16, copies=False)
    first = filled(kv, range(10))
    kv.retain(first)
    second = kv.open("", np.arange(20, dtype=np.int32), room=21)
    assert second is first
    assert second.computed == 10


def test_a_sequence_that_extends_another_replaces_it() -> None:
    kv = memory(16)
    short, long = filled(kv, range(10)), filled(kv, range(15))
    kv.retain(short)
    kv.retain(long)
    assert kv.usage().retained_sequences == 1
    assert kv.available("", np.arange(16, dtype=np.int32)) == 15


def test_least_recently_used_goes_first_and_running_never() -> None:
    kv = memory(8)
    running = filled(kv, [9] * 7)
    old, recent = filled(kv, [1] * 7), filled(kv, [2] * 7)
    kv.retain(old)
    kv.retain(recent)
    filled(kv, [3] * 10)
    assert kv.available("", np.array([1] * 8, np.int32)) == 0
    assert kv.available("", np.array([2] * 8, np.int32)) == 7
    assert not running.released


def test_where_memory_holds_no_fork_the_source_is_cut_down() -> None:
    kv = memory(6)
    kv.retain(filled(kv, range(22)))
    branch = kv.open("", np.array([*range(14), 99, 98, 97], np.int32), room=20)
    assert branch is not None
    assert branch.computed == 14
    kv.check()


def test_tenants_share_nothing() -> None:
    kv = memory(16, copies=False)
    kv.retain(filled(kv, range(10), "one"))
    assert kv.available("one", np.arange(10, dtype=np.int32)) == 9
    assert kv.available("two", np.arange(10, dtype=np.int32)) == 0


def test_what_is_pinned_is_never_evicted() -> None:
    kv = memory(8)
    kv.retain(filled(kv, [1] * 7))
    assert kv.pin("mine", "", np.array([1] * 7, np.int32))
    for token in range(2, 8):
        kv.retain(filled(kv, [token] * 20))
    assert kv.computed("", np.array([1] * 7, np.int32)) == 7
    kv.unpin("mine")
    kv.retain(filled(kv, [9] * 28))
    assert kv.computed("", np.array([1] * 7, np.int32)) == 0


def test_pins_leave_room_for_a_request() -> None:
    kv = memory(8, reserved=4 * BLOCK)
    kv.retain(filled(kv, range(20)))
    assert not kv.pin("mine", "", np.arange(20, dtype=np.int32))
    assert kv.pin("mine", "", np.arange(10, dtype=np.int32))
    assert not kv.pin("another", "", np.arange(12, dtype=np.int32))


def test_a_pin_moves_with_its_conversation() -> None:
    kv = memory(16)
    kv.retain(filled(kv, range(10)))
    kv.pin("mine", "", np.arange(10, dtype=np.int32))
    kv.retain(filled(kv, range(15)))
    kv.pin("mine", "", np.arange(15, dtype=np.int32))
    kv.clear()
    assert kv.computed("", np.arange(20, dtype=np.int32)) == 15
    assert kv.usage().retained_sequences == 0
    assert kv.usage().free == 12 * BLOCK


def test_exported_kv_comes_back() -> None:
    kv = memory(16)
    kv.retain(filled(kv, range(10)))
    parts = [kv.export("", np.arange(end, dtype=np.int32), start) for start, end in ((0, 6), (6, 10))]
    kv.clear()
    assert not kv.install("", np.arange(10, dtype=np.int32), parts[1]), "what comes before is not there"
    assert kv.install("", np.arange(6, dtype=np.int32), parts[0])
    assert kv.install("", np.arange(10, dtype=np.int32), parts[1])
    assert kv.computed("", np.arange(10, dtype=np.int32)) == 10
    assert kv.usage().retained_sequences == 1


def test_an_eviction_is_announced_while_the_kv_is_there() -> None:
    kv = memory(8)
    kv.retain(filled(kv, range(10)))
    announced = []
    kv.before_eviction = lambda tenant, tokens: announced.append((tenant, kv.export(tenant, tokens, 0) is not None))
    filled(kv, [99] * 30)
    assert announced == [("", True)]
