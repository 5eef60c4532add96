"""All memory of a server for the states of sequences: who holds it, who may share it, and who has to make room."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from slipstream.backend import Blob, Exported, Store
from slipstream.kv.eviction import Cached
from slipstream.kv.prefix_index import PrefixIndex, common_length
from slipstream.kv.sequence import Sequence
from slipstream.types import IntArray

_CANDIDATES = 32
"""Sequences that are asked how far they keep the state of a prompt that all of them share."""


@dataclass(frozen=True, slots=True)
class KVUsage:
    """A snapshot of the KV memory; all sizes in tokens."""

    capacity: int = 0
    """Of which one sequence may take a little less, see `KVMemory.capacity`."""
    free: int = 0
    evictable: int = 0
    """What cached sequences alone hold."""
    running_sequences: int = 0
    cached_sequences: int = 0
    pinned_sequences: int = 0
    evictions: int = 0
    """Cached sequences given up for others since the start."""
    peak: int = 0
    """The most that was held at once: so much of the capacity takes memory of the system, which pages don't leave."""


class KVMemory:
    """Running, cached and pinned sequences over one store, with a prefix index for each tenant.

    A *running* sequence belongs to a request; its computed tokens are in the index, so others can fork it at once.
    A *cached* one belongs to nobody and waits for reuse; those of least value are evicted first (see `eviction`).
    A *pinned* one stays until it is unpinned; all of them together leave room for `reserved` tokens.
    """

    def __init__(self, store: Store[Any], *, reserved: int = 0) -> None:
        self._store = store
        self.capacity = store.capacity
        """How many tokens one sequence can have at most."""
        self._size = store.free
        self._peak = 0
        self._pinnable = max(0, self._size - (store.open_cost(reserved) if reserved else 0))
        self._indexes: dict[str, PrefixIndex[Sequence]] = {}
        self._tenants: dict[Sequence, str] = {}
        self._running: dict[Sequence, None] = {}
        self._cached = Cached()
        self._pinned: dict[str, Sequence] = {}
        self.evictions = 0
        """How often cached sequences were given up."""
        self._guarded: dict[bytes, tuple[str, IntArray, int]] = {}
        self.on_rescue: Callable[[bytes, Exported], None] = lambda *_: None
        """Gets a copy of what is guarded and about to be evicted, by its key; it must not block."""

    def usage(self) -> KVUsage:
        """What the memory holds now."""
        self._peak = max(self._peak, self._size - self._store.free)
        return KVUsage(
            capacity=self._size,
            free=self._store.free,
            evictable=self._store.evictable,
            running_sequences=len(self._running),
            cached_sequences=len(self._cached),
            pinned_sequences=len(self._pinned),
            evictions=self.evictions,
            peak=self._peak,
        )

    def open(self, tenant: str, tokens: IntArray, *, room: int, reuse: bool = True) -> Sequence | None:
        """A running sequence of `tokens`, as much of it computed as memory has, with room for `room` tokens.

        The last token is never computed, so that there is a row to choose the next one from. Returns None, and changes
        nothing, if room can't be made now.
        """
        length, source = self._find(tenant, tokens[:-1]) if reuse else (0, None)
        sequence = self._reuse(source, tokens, length, room) if source is not None else None
        if sequence is None and (sequence := self._start(tokens, room)) is None:
            return None
        self._run(tenant, sequence, tokens)
        return sequence

    def computed(self, tenant: str, tokens: IntArray) -> int:
        """How many of the `tokens` have their state in memory."""
        return self._find(tenant, tokens)[0]

    def grow(self, sequence: Sequence, room: int) -> bool:
        """Make room for `room` tokens in a running sequence, evicting cached ones; False if that's not enough."""
        if room <= sequence.state.room:
            return True
        if not self._make_free(self._store.reserve_cost(sequence.state, room)):
            return False
        self._store.reserve(sequence.state, room)
        return True

    def grow_freely(self, sequence: Sequence, room: int) -> bool:
        """Make room for `room` tokens in a running sequence if nothing has to be evicted for it."""
        if room <= sequence.state.room:
            return True
        return self._store.reserve_cost(sequence.state, room) <= self._store.free and self.grow(sequence, room)

    def keeps_draft(self, sequence: Sequence, count: int, draft: int, marks: tuple[int, ...]) -> bool:
        """Whether a draft that is rejected leaves nothing to compute again; see `Store.keeps_draft`."""
        return self._store.keeps_draft(sequence.state, count, draft, marks)

    def rewind(self, sequence: Sequence, length: int) -> None:
        """Forget what a step computed after the first `length` tokens; the store may have to forget more."""
        self._store.rewind(sequence.state, length)

    def distrust(self, tenant: str, tokens: IntArray, length: int) -> None:
        """Forget what sequences have of `tokens` after the first `length`, if a step failed that was to compute them.

        Pinned ones had them before.
        """
        for sequence in [each for each, owner in self._tenants.items() if owner == tenant]:
            if common_length(sequence.tokens, tokens) > length:
                if sequence in self._cached:
                    self.release(sequence)
                elif sequence in self._running and sequence.computed > length:
                    self.rewind(sequence, length)

    def cache(self, sequence: Sequence) -> None:
        """Keep what a running sequence has computed; cached sequences that it extends are given up for it."""
        if sequence.computed == 0:
            self.release(sequence)
            return
        del self._running[sequence]
        index = self._index_of(sequence)
        self._sync(sequence, index)
        sequence.cut()
        self._store.trim(sequence.state)
        for other in list(index.prefixes_of(sequence)):
            if other in self._cached:
                self.release(other)
        self._cached.use(sequence)
        self._store.set_evictable(sequence.state, evictable=True)

    def expect(self, tenant: str, tokens: IntArray) -> None:
        """Know that a conversation of these tokens will go on soon, since it waits for the results of tools.

        Its sequence may still be running, with tokens that are yet to be computed.
        """
        length, source = self._find(tenant, tokens)
        found = [source] if source is not None and length == source.computed else []
        found += [each for each in self._running if self._tenants[each] == tenant and each.begins(tokens)]
        if found:
            awaited = max(found, key=len)
            awaited.awaited = True
            if awaited in self._cached:
                self._cached.use(awaited)

    def release(self, sequence: Sequence) -> None:
        """Free a sequence, running or cached."""
        self._cached.discard(sequence)
        self._running.pop(sequence, None)
        self._index_of(sequence).remove(sequence)
        del self._tenants[sequence]
        self._store.release(sequence.state)

    def pin(self, name: str, tenant: str, tokens: IntArray) -> bool:
        """Hold on to as much of `tokens` as is computed, under a name, in place of what the name held before.

        Returns False, and what the name held stays, if pinned sequences would take too much of the memory.
        """
        length, source = self._find(tenant, tokens)
        if source is not None and not self._make_free(self._store.fork_cost(source.state, length, 0), source):
            length = self._store.reach(source.state, self._store.aligned(length))
            if not self._make_free(self._store.fork_cost(source.state, length, 0), source):
                return True
        if source is None or length == 0:
            return True
        pinned = Sequence(self._store.fork(source.state, length, 0), tokens[:length])
        pinned.cut()
        others = [sequence.state for held, sequence in self._pinned.items() if held != name]
        if self._store.held([*others, pinned.state]) > self._pinnable:
            self._store.release(pinned.state)
            return False
        self.unpin(name)
        self._enter(tenant, pinned)
        self._pinned[name] = pinned
        return True

    def unpin(self, name: str) -> None:
        """Let go of what is held under a name, if anything is; it is cached unless another sequence has it too."""
        if (pinned := self._pinned.pop(name, None)) is not None:
            self._sync_running()
            if self._index_of(pinned).is_extended(pinned):
                self.release(pinned)
            else:
                self._running[pinned] = None
                self.cache(pinned)

    def export(self, tenant: str, tokens: IntArray, start: int) -> Exported | None:
        """A copy of the state of `tokens` from token `start` on; None unless all of it is in memory."""
        parts = []
        for span in self._store.spans(start, len(tokens)):
            length, source = self._find(tenant, tokens[: span.end])
            if source is None or length < span.end:
                return None
            parts.append(self._store.export(source.state, span.start, span.end))
        return Exported.joined(parts)

    def install(self, tenant: str, tokens: IntArray, start: int, blob: Blob) -> Iterator[bool]:
        """Take in what was exported from `tokens` from token `start` on, and cache it, in parts, between which other
        work may be done.

        A part is False, and the last, if there is no room for it, or if the tokens before are not in memory.
        """
        taken = 0
        for span in self._store.spans(start, len(tokens)):
            part, taken = blob[taken : taken + span.rows], taken + span.rows
            installed = self._install(tenant, tokens[: span.end], self._store.aligned(span.start), part)
            yield installed
            if not installed:
                return

    def guard(self, key: bytes, tenant: str, tokens: IntArray, start: int) -> None:
        """Have a copy made of the state of `tokens` from token `start` on, under a key, before it is evicted."""
        self._guarded[key] = tenant, tokens, start

    def unguard(self, key: bytes) -> None:
        """Have no copy made any more; harmless if there was none to make."""
        self._guarded.pop(key, None)

    def discard(self, tenant: str, tokens: IntArray) -> None:
        """Free a cached sequence of just these tokens, or fewer, if there is one."""
        length, source = self._find(tenant, tokens)
        if source is not None and source in self._cached and length == len(source):
            self.evictions += 1
            self.release(source)

    def clear(self) -> None:
        """Free all cached sequences."""
        while self._evict():
            pass

    def check(self) -> None:
        """Assert that nothing is lost and nothing is held twice: in tests, and after a step that failed."""
        self._store.check([sequence.state for sequence in self._tenants])
        assert len(self._tenants) == len(self._running) + len(self._cached) + len(self._pinned)
        for sequence, tenant in self._tenants.items():
            assert sequence in self._indexes[tenant]
            assert sequence in self._running or len(sequence) == sequence.computed == sequence.indexed

    def _find(self, tenant: str, tokens: IntArray) -> tuple[int, Sequence | None]:
        """How many of the tokens have their state in memory, and a sequence that has it.

        Of several sequences that share tokens, one may keep its state further on than another.
        """
        self._sync_running()
        best: tuple[int, Sequence | None] = (0, None)
        if (index := self._indexes.get(tenant)) is not None:
            shared, sources = index.sharing(tokens)
            for source in islice(sources, _CANDIDATES if shared else 0):
                reached = self._store.reach(source.state, min(shared, source.computed))
                if reached > best[0]:
                    best = reached, source
                if reached == shared:
                    break
        return best

    def _index_of(self, sequence: Sequence) -> PrefixIndex[Sequence]:
        return self._indexes[self._tenants[sequence]]

    def _sync_running(self) -> None:
        """Let the indexes know what running sequences have computed since somebody last asked."""
        for sequence in self._running:
            if sequence.indexed != sequence.computed:
                self._sync(sequence, self._index_of(sequence))

    @staticmethod
    def _sync(sequence: Sequence, index: PrefixIndex[Sequence]) -> None:
        computed = sequence.computed
        if computed < sequence.indexed:
            index.remove(sequence)
            index.insert(sequence.tokens[:computed], sequence)
        else:
            index.extend(sequence, sequence.tokens[sequence.indexed : computed])
        sequence.indexed = computed

    def _enter(self, tenant: str, sequence: Sequence) -> None:
        """Let the index know a new sequence."""
        self._tenants[sequence] = tenant
        sequence.indexed = sequence.computed
        self._indexes.setdefault(tenant, PrefixIndex()).insert(sequence.tokens[: sequence.computed], sequence)

    def _run(self, tenant: str, sequence: Sequence, tokens: IntArray) -> None:
        """Let a sequence, new or taken out of the cache with the first of these tokens, be a running one of all."""
        sequence.extend(tokens[len(sequence) :])
        if sequence not in self._tenants:
            self._enter(tenant, sequence)
        self._running[sequence] = None

    def _start(self, tokens: IntArray, room: int) -> Sequence | None:
        if not self._make_free(self._store.open_cost(room)):
            return None
        return Sequence(self._store.open(room), tokens)

    def _reuse(self, source: Sequence, tokens: IntArray, length: int, room: int) -> Sequence | None:
        """A sequence with the state of the first `length` tokens of `source`, which `tokens` begin with.

        It is `source` itself if nobody loses by it, else a fork of all `tokens`. None if there's no room for either.
        """
        store, state = self._store, source.state
        fork_cost = store.fork_cost(state, length, room)
        little = length < len(source) and not store.aligned(length)  # no block would be shared
        if little and fork_cost > store.free:
            return None  # nobody else is evicted to keep it for that
        if source in self._cached:
            if length == len(source):
                cost = store.reserve_cost(state, room)
                return self._take_back(source, room) if self._make_free(cost, source) else None
            if not little:
                self._cached.use(source)
        if self._make_free(fork_cost, source):
            return Sequence(store.fork(state, length, room), tokens, source)
        if source not in self._cached or not self._make_free(store.cut_cost(state, length, room), source):
            return None
        # Memory can't hold a cached sequence beside its fork: the sequence itself loses its tail.
        self._give_up(source)
        store.rewind(state, length)
        store.trim(state)
        source.cut()
        self._sync(source, self._index_of(source))
        return self._take_back(source, room)

    def _take_back(self, source: Sequence, room: int) -> Sequence:
        self._cached.discard(source)
        self._store.set_evictable(source.state, evictable=False)
        self._store.reserve(source.state, room)
        return source

    def _install(self, tenant: str, tokens: IntArray, start: int, part: Blob) -> bool:
        length, source = self._find(tenant, tokens)
        if length == len(tokens):
            return True
        if length < start:
            return False
        room = len(tokens)
        if source is not None and start:
            sequence = self._reuse(source, tokens, start, room)
        else:
            sequence = self._start(tokens, room)
        if sequence is None:
            return False
        self._run(tenant, sequence, tokens)
        if fits := sequence.computed == start:
            self._store.install(sequence.state, room, part)
        self.cache(sequence)
        return fits

    def _make_free(self, cost: int, spare: Sequence | None = None) -> bool:
        """Evict until the store has that much free memory, but never `spare`; evict nothing if that can't be done."""
        store = self._store
        if cost <= store.free:
            return True
        spared = spare if spare is not None and spare in self._cached else None
        if spared is not None:
            store.set_evictable(spared.state, evictable=False)
        possible = cost <= store.free + store.evictable
        while possible and cost > store.free:
            self._evict(spare)
        if spared is not None:
            store.set_evictable(spared.state, evictable=True)
        return possible

    def _evict(self, spare: Sequence | None = None) -> bool:
        """Free the cached sequence of least value other than `spare`; False if there is none."""
        if (victim := self._cached.take_least(spare)) is None:
            return False
        self._give_up(victim)
        self.release(victim)
        return True

    def _give_up(self, victim: Sequence) -> None:
        """Count an eviction that is about to happen, and copy what is guarded of the sequence."""
        self.evictions += 1
        tenant, tokens = self._tenants[victim], victim.tokens
        for key, (owner, part, start) in list(self._guarded.items()):
            guarded = owner == tenant and np.array_equal(part, tokens[: len(part)])
            if guarded and (exported := self.export(tenant, part, start)) is not None:
                del self._guarded[key]
                self.on_rescue(key, exported)
