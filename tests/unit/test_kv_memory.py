"""KV memory under random use: nothing leaks, nothing is freed twice, no computed slot changes under its holder."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from slipstream.kv import BlockPool, KVMemory, OutOfBlocksError, Sequence

BLOCK = 4
Tokens = st.lists(st.integers(0, 2), min_size=1, max_size=20)
Tenants = st.sampled_from(["", "other"])


class Storage:
    """Stands for KV tensors: each slot remembers which token was computed into it."""

    def __init__(self, num_blocks: int) -> None:
        self.slots = np.full((num_blocks + 1, BLOCK), -1)

    def copy_block(self, source: int, target: int) -> None:
        self.slots[target] = self.slots[source]

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
        self.kv = KVMemory(num_blocks, BLOCK, self.storage.copy_block)
        self.held: dict[Sequence, str] = {}

    @rule(target=running, tokens=Tokens, tenant=Tenants, more=st.integers(0, 8), reuse=st.booleans())
    def open(self, tokens: list[int], tenant: str, more: int, reuse: bool) -> Sequence | None:
        assume(len(tokens) + more < self.kv.capacity)
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

    @invariant()
    def consistent(self) -> None:
        if not hasattr(self, "kv"):
            return
        self.kv.check()
        for sequence in [*self.held, *self.kv._retained]:
            assert self.storage.read(sequence) == sequence.tokens[: sequence.computed].tolist()

    def teardown(self) -> None:
        if not hasattr(self, "kv"):
            return
        for sequence in self.held:
            self.kv.release(sequence)
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


def filled(kv: KVMemory, tokens: range | list[int], tenant: str = "") -> Sequence:
    sequence = kv.open(tenant, np.array(tokens, np.int32), room=len(tokens) + 1)
    assert sequence is not None
    kv.advance(sequence, len(sequence) - sequence.computed)
    return sequence


def test_an_extended_conversation_is_taken_over_without_a_copy() -> None:
    kv = KVMemory(16, BLOCK, no_copy)
    first = filled(kv, range(10))
    kv.retain(first)
    second = kv.open("", np.arange(20, dtype=np.int32), room=21)
    assert second is first
    assert second.computed == 10


def test_a_sequence_that_extends_another_replaces_it() -> None:
    kv = KVMemory(16, BLOCK, lambda *_: None)
    short, long = filled(kv, range(10)), filled(kv, range(15))
    kv.retain(short)
    kv.retain(long)
    assert kv.usage().retained_sequences == 1
    assert kv.available("", np.arange(16, dtype=np.int32)) == 15


def test_least_recently_used_goes_first_and_running_never() -> None:
    kv = KVMemory(8, BLOCK, lambda *_: None)
    running = filled(kv, [9] * 7)
    old, recent = filled(kv, [1] * 7), filled(kv, [2] * 7)
    kv.retain(old)
    kv.retain(recent)
    filled(kv, [3] * 10)
    assert kv.available("", np.array([1] * 8, np.int32)) == 0
    assert kv.available("", np.array([2] * 8, np.int32)) == 7
    assert not running.released


def test_where_memory_holds_no_fork_the_source_is_cut_down() -> None:
    kv = KVMemory(6, BLOCK, lambda *_: None)
    kv.retain(filled(kv, range(22)))
    branch = kv.open("", np.array([*range(14), 99, 98, 97], np.int32), room=20)
    assert branch is not None
    assert branch.computed == 14
    kv.check()


def test_tenants_share_nothing() -> None:
    kv = KVMemory(16, BLOCK, no_copy)
    kv.retain(filled(kv, range(10), "one"))
    assert kv.available("one", np.arange(10, dtype=np.int32)) == 9
    assert kv.available("two", np.arange(10, dtype=np.int32)) == 0
