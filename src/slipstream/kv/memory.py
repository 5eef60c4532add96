"""All KV memory of a server: who holds it, who may share it, and who has to make room."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from slipstream.backend.base import IntArray
from slipstream.kv.block_pool import BlockPool
from slipstream.kv.prefix_index import PrefixIndex
from slipstream.kv.sequence import Sequence


@dataclass(frozen=True, slots=True)
class KVUsage:
    """A snapshot of the KV memory; all sizes in tokens."""

    capacity: int
    free: int
    running_sequences: int
    retained_sequences: int
    evictions: int
    """Retained sequences given up for others since the start."""


class KVMemory:
    """Running and retained sequences over one block pool, with a prefix index for each tenant.

    A *running* sequence belongs to a request; its computed tokens are in the index, so others can fork it at once.
    A *retained* one belongs to nobody and waits for reuse; retained sequences are evicted least recently used first.
    """

    def __init__(self, num_blocks: int, block_size: int, copy_block: Callable[[int, int], None]) -> None:
        self._pool = BlockPool(num_blocks, block_size, copy_block)
        self._indexes: dict[str, PrefixIndex[Sequence]] = {}
        self._tenants: dict[Sequence, str] = {}
        self._retained: dict[Sequence, None] = {}  # least recently used first
        self._evictions = 0

    @property
    def capacity(self) -> int:
        """How many tokens one sequence can have at most."""
        return self._pool.num_blocks * self._pool.block_size

    @property
    def free(self) -> int:
        """Room for how many tokens there is without evicting anything."""
        return self._pool.free_count * self._pool.block_size

    def usage(self) -> KVUsage:
        """What the memory holds now."""
        return KVUsage(
            capacity=self.capacity,
            free=self.free,
            running_sequences=len(self._tenants) - len(self._retained),
            retained_sequences=len(self._retained),
            evictions=self._evictions,
        )

    def open(self, tenant: str, tokens: IntArray, *, room: int, reuse: bool = True) -> Sequence | None:
        """A running sequence of `tokens`, as much of it computed as memory has, with space for `room` tokens.

        The last token is never computed, so that there is something to get logits from. Returns None, and changes
        nothing, when room can't be made now.
        """
        index = self._indexes.setdefault(tenant, PrefixIndex())
        length, source = index.longest_prefix(tokens[:-1]) if reuse else (0, None)
        sequence = self._reuse(source, length, room) if source is not None else None
        if sequence is None and (sequence := self._start(room)) is None:
            return None
        sequence.extend(tokens[len(sequence) :])
        if sequence not in index:
            index.insert(sequence.tokens[: sequence.computed], sequence)
            self._tenants[sequence] = tenant
        return sequence

    def available(self, tenant: str, tokens: IntArray) -> int:
        """How many of the `tokens` a sequence opened now would find computed."""
        index = self._indexes.get(tenant)
        return index.longest_prefix(tokens[:-1])[0] if index else 0

    def grow(self, sequence: Sequence, slots: int) -> bool:
        """Make room for `slots` tokens in a running sequence, evicting retained ones; False if that's not enough."""
        missing = sequence.missing_blocks(slots)
        while self._pool.free_count < missing and self._evict():
            pass
        if self._pool.free_count < missing:
            return False
        sequence.reserve(slots)
        return True

    def advance(self, sequence: Sequence, count: int) -> None:
        """Note that the KV of the next `count` tokens of a running sequence is computed."""
        start = sequence.computed
        sequence.computed += count
        self._index_of(sequence).extend(sequence, sequence.tokens[start : sequence.computed])

    def retain(self, sequence: Sequence) -> None:
        """Keep what a running sequence has computed; retained sequences that it extends are given up for it."""
        if sequence.computed == 0:
            self.release(sequence)
            return
        sequence.truncate(sequence.computed)
        for other in list(self._index_of(sequence).prefixes_of(sequence)):
            if other in self._retained:
                self.release(other)
        self._retained[sequence] = None

    def release(self, sequence: Sequence) -> None:
        """Free a sequence, running or retained."""
        self._retained.pop(sequence, None)
        self._index_of(sequence).remove(sequence)
        del self._tenants[sequence]
        sequence.release()

    def clear(self) -> None:
        """Free all retained sequences."""
        for sequence in list(self._retained):
            self.release(sequence)

    def check(self) -> None:
        """Assert that reference counts equal what the block tables say (for tests)."""
        self._pool.check()
        counted = np.zeros_like(self._pool.references)
        for sequence, tenant in self._tenants.items():
            counted[sequence.block_table] += 1
            assert sequence in self._indexes[tenant]
            assert sequence.computed <= min(len(sequence), sequence.capacity)
            assert sequence not in self._retained or len(sequence) == sequence.computed
        assert np.array_equal(counted, self._pool.references), "reference counts differ from the block tables"

    def _index_of(self, sequence: Sequence) -> PrefixIndex[Sequence]:
        return self._indexes[self._tenants[sequence]]

    def _start(self, room: int) -> Sequence | None:
        if not self._make_free(self._pool.blocks_for(room)):
            return None
        sequence = Sequence(self._pool)
        sequence.reserve(room)
        return sequence

    def _reuse(self, source: Sequence, length: int, room: int) -> Sequence | None:
        """The first `length` tokens of `source`: itself where nobody loses by it, else a fork."""
        if source in self._retained and length == len(source):
            if not self._make_free(source.missing_blocks(room), spare=source):
                return None
            del self._retained[source]
            source.reserve(room)
            return source
        if source in self._retained:  # used now, so it is evicted last
            self._retained[source] = self._retained.pop(source)
        full = length // self._pool.block_size
        if self._make_free(self._pool.blocks_for(room) - full, spare=source):
            child = source.fork(length)
            child.reserve(room)
            return child
        return self._cut_down(source, length, room) if source in self._retained else None

    def _cut_down(self, source: Sequence, length: int, room: int) -> Sequence | None:
        """Where memory can't hold a retained sequence beside its fork, the sequence itself loses its tail."""
        blocks = self._pool.blocks_for(length)
        missing = self._pool.blocks_for(room) - blocks + source.ends_in_shared_block(length)
        tail = source.block_table[blocks:]
        freed = int((self._pool.references[tail] == 1).sum())
        if not self._make_free(missing - freed, spare=source):
            return None
        index = self._index_of(source)
        index.remove(source)
        source.truncate(length)
        index.insert(source.tokens, source)
        del self._retained[source]
        source.reserve(room)
        return source

    def _make_free(self, count: int, *, spare: Sequence | None = None) -> bool:
        """Evict until `count` blocks are free, but never `spare`; where that can't be done, evict nothing."""
        if count <= self._pool.free_count:
            return True
        held = np.zeros_like(self._pool.references)
        for sequence in self._retained:
            held[sequence.block_table] += 1
        reclaimable = (held > 0) & (held == self._pool.references)
        if spare is not None:
            reclaimable[spare.block_table] = False
        if count > self._pool.free_count + int(reclaimable.sum()):
            return False
        while self._pool.free_count < count:
            self._evict(spare)
        return True

    def _evict(self, spare: Sequence | None = None) -> bool:
        """Free the least recently used retained sequence other than `spare`; False if there is none."""
        victim = next((sequence for sequence in self._retained if sequence is not spare), None)
        if victim is None:
            return False
        self._evictions += 1
        self.release(victim)
        return True
