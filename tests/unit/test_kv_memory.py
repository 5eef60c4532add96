"""KV memory: over any store, and what its policy is."""

from typing import Any

import numpy as np
import pytest
from hypothesis import settings

from slipstream.backend import Exported
from slipstream.backend.paged_store import PagedState, PagedStore
from slipstream.kv import KVMemory, Sequence
from slipstream.kv.eviction import AWAITED, Cached
from tests.conformance.stores import (
    KINDS,
    KVMemoryMachine,
    StoreMachine,
    assert_exports_outlive_states,
    compute,
    ids,
    toy,
)
from tests.unit.toy_backend import ToyBackend

BLOCK = 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("machine", [StoreMachine, KVMemoryMachine])
def test_any_store_under_random_use(machine: Any, kind: str) -> None:
    run = type(f"{machine.__name__}Of{kind.title()}", (machine,), {"kind": kind}).TestCase
    run.settings = settings(max_examples=40, stateful_step_count=30)
    run().runTest()


@pytest.mark.parametrize("kind", KINDS)
def test_what_any_store_exports_outlives_its_state(kind: str) -> None:
    assert_exports_outlive_states(toy(kind, 200))


class Blocks:
    """Block contents that are looked at, not computed."""

    def __init__(self) -> None:
        self.copies: list[tuple[int, int]] = []

    def copy_block(self, source: int, target: int) -> None:
        self.copies.append((source, target))

    def read_blocks(self, blocks: Any) -> Any:
        return Exported.here(blocks)

    def write_blocks(self, blocks: Any, contents: Any) -> None: ...


def test_a_fork_at_a_block_border_copies_nothing() -> None:
    blocks = Blocks()
    store = PagedStore(blocks, PagedState, num_blocks=8, block_size=BLOCK, block_bytes=BLOCK)
    state = store.open(8)
    state.length = 8
    child = store.fork(state, 8, 12)
    assert child.block_table[:2].tolist() == state.block_table.tolist()
    assert not blocks.copies


def test_rewinding_into_a_shared_block_leaves_the_other_holder_alone() -> None:
    blocks = Blocks()
    store = PagedStore(blocks, PagedState, num_blocks=8, block_size=BLOCK, block_bytes=BLOCK)
    state = store.open(8)
    state.length = 8
    child = store.fork(state, 8, 8)
    shared = state.block_table[1]
    assert store.rewind(state, 6) == 6
    assert blocks.copies == [(shared, state.block_table[1])]
    assert child.block_table[1] == shared


def test_what_follows_a_rewind_is_not_written_to_blocks_of_a_fork() -> None:
    backend = ToyBackend(20)
    state = backend.store.open(20)
    compute(backend, state, ids([1, 2, 3] * 4))
    fork = backend.store.fork(state, 12, 12)
    backend.store.rewind(state, BLOCK)
    compute(backend, state, ids([9] * 5))
    assert backend.contents(fork) == [1, 2, 3] * 4
    assert backend.contents(state) == [1, 2, 3, 1, *[9] * 5]
    backend.store.check([state, fork])


def test_without_memory_for_a_copy_a_rewind_goes_on_to_the_block_s_beginning() -> None:
    store = PagedStore(Blocks(), PagedState, num_blocks=2, block_size=BLOCK, block_bytes=BLOCK)
    state = store.open(8)
    state.length = 8
    child = store.fork(state, 8, 8)
    assert store.rewind(state, 6) == 4
    assert child.length == 8
    store.check([state, child])


def memory(num_blocks: int, *, reserved: int = 0) -> KVMemory:
    kv = KVMemory((backend := ToyBackend(num_blocks)).store, reserved=reserved)
    kv.backend = backend  # type: ignore[attr-defined]  # for `filled`
    return kv


def filled(kv: KVMemory, tokens: range | list[int], tenant: str = "") -> Sequence:
    sequence = kv.open(tenant, np.array(tokens, np.int32), room=len(tokens))
    assert sequence is not None
    kv.backend.launch([sequence.chunk(sequence.pending, 0)]).wait()  # type: ignore[attr-defined]
    return sequence


def test_an_extended_conversation_is_taken_over_without_a_copy() -> None:
    kv = memory(16)
    first = filled(kv, range(10))
    kv.cache(first)
    second = kv.open("", np.arange(20, dtype=np.int32), room=20)
    assert second is first
    assert second.computed == 10


def test_a_sequence_that_extends_another_replaces_it() -> None:
    kv = memory(16)
    short, long = filled(kv, range(10)), filled(kv, range(15))
    kv.cache(short)
    kv.cache(long)
    assert kv.usage().cached_sequences == 1
    assert kv.computed("", np.arange(16, dtype=np.int32)) == 15


def test_least_recently_used_goes_first_and_running_never() -> None:
    kv = memory(8)
    filled(kv, [9] * 7)
    old, recent = filled(kv, [1] * 7), filled(kv, [2] * 7)
    kv.cache(old)
    kv.cache(recent)
    filled(kv, [3] * 10)
    assert kv.computed("", np.array([1] * 8, np.int32)) == 0
    assert kv.computed("", np.array([2] * 8, np.int32)) == 7
    assert kv.computed("", np.array([9] * 7, np.int32)) == 7


def test_where_memory_holds_no_fork_the_source_is_cut_down() -> None:
    kv = memory(6)
    kv.cache(filled(kv, range(22)))
    branch = kv.open("", np.array([*range(14), 99, 98, 97], np.int32), room=19)
    assert branch is not None
    assert branch.computed == 14
    kv.check()


def test_tenants_share_nothing() -> None:
    kv = memory(16)
    kv.cache(filled(kv, range(10), "one"))
    assert kv.computed("one", np.arange(10, dtype=np.int32)) == 10
    assert kv.computed("two", np.arange(10, dtype=np.int32)) == 0


def test_what_is_pinned_is_never_evicted() -> None:
    kv = memory(8)
    kv.cache(filled(kv, [1] * 7))
    assert kv.pin("mine", "", np.array([1] * 7, np.int32))
    for token in range(2, 8):
        kv.cache(filled(kv, [token] * 20))
    assert kv.computed("", np.array([1] * 7, np.int32)) == 7
    kv.unpin("mine")
    kv.cache(filled(kv, [9] * 28))
    assert kv.computed("", np.array([1] * 7, np.int32)) == 0


def test_pins_leave_room_for_a_request() -> None:
    kv = memory(8, reserved=4 * BLOCK)
    kv.cache(filled(kv, range(20)))
    assert not kv.pin("mine", "", np.arange(20, dtype=np.int32))
    assert kv.pin("mine", "", np.arange(10, dtype=np.int32))
    assert not kv.pin("another", "", np.arange(12, dtype=np.int32))


def test_a_pin_moves_with_its_conversation() -> None:
    kv = memory(16)
    kv.cache(filled(kv, range(10)))
    kv.pin("mine", "", np.arange(10, dtype=np.int32))
    kv.cache(filled(kv, range(15)))
    kv.pin("mine", "", np.arange(15, dtype=np.int32))
    kv.clear()
    assert kv.computed("", np.arange(20, dtype=np.int32)) == 15
    assert kv.usage().cached_sequences == 0
    assert kv.usage().free == 12 * BLOCK


def export(kv: KVMemory, tokens: range, start: int = 0) -> Any:
    exported = kv.export("", np.array(tokens, np.int32), start)
    return exported and exported.wait()


def test_exported_kv_comes_back() -> None:
    kv = memory(16)
    kv.cache(filled(kv, range(10)))
    parts = [export(kv, range(end), start) for start, end in ((0, 6), (6, 10))]
    kv.clear()
    ten = np.arange(10, dtype=np.int32)
    assert list(kv.install("", ten, 6, parts[1])) == [False], "what comes before is not there"
    assert list(kv.install("", ten[:6], 0, parts[0])) == [True]
    assert list(kv.install("", ten, 6, parts[1])) == [True]
    assert kv.computed("", ten) == 10
    assert kv.usage().cached_sequences == 1


def test_what_is_guarded_is_rescued_when_it_is_evicted() -> None:
    kv = memory(8)
    kv.cache(filled(kv, range(10)))
    rescued = {}
    kv.on_rescue = lambda key, exported: rescued.update({key: exported})
    kv.guard(b"all", "", np.arange(10, dtype=np.int32), 0)
    kv.guard(b"end", "", np.arange(10, dtype=np.int32), 8)
    kv.guard(b"more", "", np.arange(11, dtype=np.int32), 0)
    kv.guard(b"other", "another tenant", np.arange(10, dtype=np.int32), 0)
    expected = {b"all": export(kv, range(10)), b"end": export(kv, range(10), 8)}
    filled(kv, [42] * 30)
    assert {key: each.wait().tolist() for key, each in rescued.items()} == {k: e.tolist() for k, e in expected.items()}


def test_a_guard_that_was_removed_rescues_nothing() -> None:
    kv = memory(8)
    kv.cache(filled(kv, range(10)))
    rescued = []
    kv.on_rescue = lambda key, _: rescued.append(key)
    kv.guard(b"all", "", np.arange(10, dtype=np.int32), 0)
    kv.unguard(b"all")
    filled(kv, [42] * 30)
    assert rescued == []


def test_a_sequence_leaves_the_prompt_that_it_shares_alone() -> None:
    kv = KVMemory(PagedStore(Blocks(), PagedState, num_blocks=8, block_size=BLOCK, block_bytes=BLOCK))
    prompt = np.arange(8, dtype=np.int32)
    prompt.flags.writeable = False
    sequence = kv.open("", prompt, room=12)
    assert sequence is not None
    assert np.shares_memory(sequence.tokens, prompt)
    sequence.state.length = 6
    sequence.cut()
    sequence.append(99)
    assert sequence.tokens.tolist() == [0, 1, 2, 3, 4, 5, 99]
    assert prompt.tolist() == list(range(8))


def test_a_conversation_whose_tool_runs_outlives_others_but_not_for_ever() -> None:
    kv = memory(8)
    waiting, answered = [1] * 7, [2] * 7
    for tokens in (waiting, answered):
        kv.cache(filled(kv, tokens))
    kv.expect("", np.array([*waiting, 9, 9], np.int32))  # with two tokens that are yet to be computed
    kv.expect("", np.array([7, 7], np.int32))  # of which nothing is there
    new = filled(kv, [3] * 20)
    assert kv.computed("", np.array(answered, np.int32)) == 0
    assert kv.computed("", np.array(waiting, np.int32)) == 7
    kv.release(new)
    for number in range(10, 20):
        kv.cache(filled(kv, [number] * 20))
    assert kv.computed("", np.array(waiting, np.int32)) == 0


def test_a_conversation_that_only_begins_like_it_is_not_expected() -> None:
    kv = memory(8)
    for tokens in ([1, 1, 1, 1, 5, 5, 5], [2] * 7):
        kv.cache(filled(kv, tokens))
    kv.expect("", np.array([1, 1, 1, 1, 6, 6, 6], np.int32))
    filled(kv, [3] * 20)
    assert kv.computed("", np.array([1] * 4, np.int32)) == 0


def test_what_is_awaited_outlives_as_many_others_as_it_is_worth() -> None:
    cached, awaited = Cached(), Sequence(PagedState())
    awaited.awaited = True
    cached.use(awaited)
    for _ in range(int(AWAITED)):
        cached.use(other := Sequence(PagedState()))
        assert cached.take_least() is other
    cached.use(Sequence(PagedState()))
    assert cached.take_least() is awaited


def test_a_conversation_is_expected_before_its_tokens_are_computed() -> None:
    """As when a grammar forces all of an answer; another conversation with the same beginning doesn't stand for it."""
    kv = memory(16)
    system, call = [1] * 6, [4] * 3
    kv.cache(filled(kv, [*system, 8]))
    kv.cache(filled(kv, [*system, 9]))
    running = kv.open("", np.array([*system, 5, 5], np.int32), room=20)
    assert running is not None
    running.extend(np.array(call, np.int32))
    kv.expect("", np.array([*system, 5, 5, *call, 7], np.int32))
    assert running.awaited
    assert not any(each.awaited for each in kv._cached)


def test_nothing_is_kept_for_the_few_tokens_that_all_conversations_begin_with() -> None:
    kv = memory(8)
    old, recent = [1, 1, 2, 2, 2, 2, 2], [1, 1, 3, 3, 3, 3, 3]
    kv.cache(filled(kv, old))
    kv.cache(filled(kv, recent))
    filled(kv, [1, 1, 4, 4])  # which uses neither
    filled(kv, [1, 1, *[5] * 9])
    assert kv.computed("", np.array(old, np.int32)) == 2
    assert kv.computed("", np.array(recent, np.int32)) == 7
