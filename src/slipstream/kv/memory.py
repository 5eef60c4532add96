"""All KV memory of a server: who holds it, who may share it, and who has to make room."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from slipstream.backend.base import Backend, BlockContents, IntArray
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
    pinned_sequences: int
    evictions: int
    """Retained sequences given up for others since the start."""


class KVMemory:
    """Running and retained sequences over one block pool, with a prefix index for each tenant.

    A *running* sequence belongs to a request; its computed tokens are in the index, so others can fork it at once.
    A *retained* one belongs to nobody and waits for reuse; retained sequences are evicted least recently used first.
    A *pinned* one stays until it is unpinned; all of them together leave room for `reserved` tokens.
    """

    def __init__(self, backend: Backend, *, reserved: int = 0) -> None:
        self._backend = backend
        self._pool = BlockPool(backend.num_blocks, backend.block_size, backend.copy_block)
        self._pinnable = max(0, backend.num_blocks - self._pool.blocks_for(reserved))
        self._indexes: dict[str, PrefixIndex[Sequence]] = {}
        self._tenants: dict[Sequence, str] = {}
        self._retained: dict[Sequence, None] = {}  # least recently used first
        self._pinned: dict[str, Sequence] = {}
        self.evictions = 0
        """How often retained KV was given up."""
        self.before_eviction: Callable[[str, IntArray], None] = lambda *_: None
        """Called with what is about to be given up, while its KV is still there."""

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
            running_sequences=len(self._tenants) - len(self._retained) - len(self._pinned),
            retained_sequences=len(self._retained),
            pinned_sequences=len(self._pinned),
            evictions=self.evictions,
        )

    def open(self, tenant: str, tokens: IntArray, *, room: int, reuse: bool = True) -> Sequence | None:
        """A running sequence of `tokens`, as much of it computed as memory has, with space for `room` tokens.

        The last token is never computed, so that there is something to get logits from. Returns None, and changes
        nothing, when room can't be made now.
        """
        index = self._index(tenant)
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
        return self.computed(tenant, tokens[:-1])

    def computed(self, tenant: str, tokens: IntArray) -> int:
        """How many of the `tokens` have their KV in memory."""
        return self._find(tenant, tokens)[0]

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

    def pin(self, name: str, tenant: str, tokens: IntArray) -> bool:
        """Hold on to as much of `tokens` as is computed, under a name, in place of what the name held before.

        Returns False, and leaves everything as it was, if pinned sequences would take too much of the memory.
        """
        length, source = self._find(tenant, tokens)
        if not self._make_free(1, spare=source):  # for a copy of the last block
            length -= length % self._pool.block_size
        if source is None or length == 0:
            return True
        others = [sequence.block_table for held, sequence in self._pinned.items() if held != name]
        together = np.unique(np.concatenate([*others, source.block_table[: self._pool.blocks_for(length)]]))
        if len(together) + len(others) + 1 > self._pinnable:
            return False
        pinned = source.fork(length)
        self._index(tenant).insert(pinned.tokens, pinned)
        self._tenants[pinned] = tenant
        self.unpin(name)
        self._pinned[name] = pinned
        return True

    def unpin(self, name: str) -> None:
        """Let go what is held under a name, if anything is; it is retained unless another sequence has it too."""
        if (pinned := self._pinned.pop(name, None)) is not None:
            extended = self._index_of(pinned).is_extended(pinned)
            (self.release if extended else self.retain)(pinned)

    def export(self, tenant: str, tokens: IntArray, start: int) -> BlockContents | None:
        """A copy of the KV of `tokens` from token `start` on; None unless all of it is in memory.

        It comes in whole blocks, so a few tokens before `start` and some rubbish after the end may be in it.
        """
        length, source = self._find(tenant, tokens)
        if source is None or length < len(tokens):
            return None
        first, end = start // self._pool.block_size, self._pool.blocks_for(length)
        return self._backend.read_blocks(source.block_table[first:end])

    def install(self, tenant: str, tokens: IntArray, contents: BlockContents) -> bool:
        """Take in what `export` gave, as the last blocks of `tokens`, and retain all of them.

        Returns False if there's no room for it, or if the tokens before are not in memory.
        """
        first = self._pool.blocks_for(len(tokens)) - len(contents)
        start = first * self._pool.block_size
        length, source = self._find(tenant, tokens)
        if length == len(tokens):
            return True
        if length < start:
            return False
        sequence = self._reuse(source, start, len(tokens)) if source and start else self._start(len(tokens))
        if sequence is None:
            return False
        sequence.extend(tokens[start:])
        index = self._index(tenant)
        if sequence not in index:
            index.insert(sequence.tokens[:start], sequence)
            self._tenants[sequence] = tenant
        self._backend.write_blocks(sequence.block_table[first : first + len(contents)], contents)
        self.advance(sequence, len(tokens) - start)
        self.retain(sequence)
        return True

    def discard(self, tenant: str, tokens: IntArray) -> None:
        """Free a retained sequence of just these tokens, or fewer, if there is one."""
        length, source = self._find(tenant, tokens)
        if source in self._retained and length == len(source):
            self.evictions += 1
            self.release(source)

    def clear(self) -> None:
        """Free all retained sequences."""
        while self._evict():
            pass

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

    def _index(self, tenant: str) -> PrefixIndex[Sequence]:
        return self._indexes.setdefault(tenant, PrefixIndex())

    def _find(self, tenant: str, tokens: IntArray) -> tuple[int, Sequence | None]:
        """How many of the tokens are in memory, and a sequence that has them."""
        index = self._indexes.get(tenant)
        return index.longest_prefix(tokens) if index else (0, None)

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
        self._announce(source)
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
        self._announce(victim)
        self.release(victim)
        return True

    def _announce(self, victim: Sequence) -> None:
        """Count an eviction that is about to happen."""
        self.evictions += 1
        self.before_eviction(self._tenants[victim], victim.tokens)
