"""Moves KV between memory and disk: what a turn computed is written soon after, what a turn needs is read before it."""

import logging
import threading
import time
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from itertools import islice

from slipstream.backend import Exported
from slipstream.chat import Conversations, Part
from slipstream.chat.messages import Digest
from slipstream.engine import EngineCore
from slipstream.engine.commands import CountComputed, Guard, Install, Unguard
from slipstream.errors import EngineStoppedError, ModelError
from slipstream.recent import Recent
from slipstream.sessions.saved_kv import SavedKV
from slipstream.sessions.worker import Worker
from slipstream.types import IntArray

logger = logging.getLogger(__name__)

_DELAY = 0.05
"""Seconds from an answer to its saving: its last tokens get their KV meanwhile."""
_ATTEMPTS = 50
_WORTH_LOADING = 16
"""Tokens; fewer are computed sooner than read."""
_RESCUED_BYTES = 256 * 2**20
"""KV that is held in memory for the disk after its eviction."""
_TOUCH_INTERVAL = 60.0
"""Seconds; a conversation has a file for each turn, so counting them all as used takes longer the longer it is."""
_RECENTLY_TOUCHED = 1024
"""Conversations that are known to have been counted as used lately."""


@dataclass(slots=True)
class _Unsaved:
    tenant: str
    key: Digest
    tokens: IntArray
    start: int
    attempts: int = 0
    rescued: Exported | None = None
    """Taken out of memory already, since it was about to be evicted."""


class KVConnector:
    """Writes each part of a conversation to disk within a bandwidth of `bytes_per_second`, and reads them back.

    Thread-safe. Nobody waits for the disk but who asks for something on it.
    """

    def __init__(self, core: EngineCore, conversations: Conversations, saved: SavedKV, bytes_per_second: float) -> None:
        self._core = core
        self._conversations = conversations
        self._saved = saved
        self._bytes_per_second = bytes_per_second
        self._not_before = 0.0
        self._unsaved: dict[Digest, _Unsaved] = {}
        self._rescued_bytes = 0
        self._resident: set[Digest] = set()
        self._evictions = 0
        self._complete: set[Digest] = set()
        """Parts that are on disk or on their way there, with all before them, as of so many `_removals`."""
        self._removals = 0
        self._leaving: Counter[Digest] = Counter()
        """Parts that are about to be removed from disk, and how often."""
        self._touched: Recent[Digest, float] = Recent(_RECENTLY_TOUCHED)  # by the last part of a conversation
        self._lock = threading.Lock()  # never held while files are read or written
        self._worker = Worker("slipstream-kv-connector")
        self.saved_tokens = 0
        self.restored_tokens = 0
        core.rescue_to(self.keep)

    @property
    def saved_bytes(self) -> int:
        """What is on disk."""
        return self._saved.total_bytes

    @property
    def unsaved_parts(self) -> int:
        """How many parts wait to be written."""
        return len(self._unsaved)

    def add(self, tenant: str, part: Part) -> None:
        """Save a part that was just computed, soon, and those before it that disk lacks: it's no good without them."""
        end, missing = len(part.tokens), []
        lineage = self._conversations.lineage(part.key)
        with self._lock:
            self._note_resident(part.key)
            for key, entry in lineage:
                if self._is_complete(key):
                    break
                start = end - len(entry.tokens)
                if (key in self._leaving or not self._saved.size(key)) and key not in self._unsaved:
                    self._unsaved[key] = _Unsaved(tenant, key, part.tokens.ids[:end], start)
                    missing.append(self._unsaved[key])
                end = start
            self._complete.add(part.key)
        for unsaved in reversed(missing):
            self._core.send(Guard(unsaved.key, tenant, unsaved.tokens, unsaved.start))
            self._worker.run(partial(self._save_in_time, unsaved.key), after=_DELAY)

    def forget(self, keys: Collection[Digest]) -> None:
        """Remove parts that no conversation has any more."""
        with self._lock:
            for key in keys:
                self._drop(key)
            self._leaving.update(keys)
            self._complete.difference_update(keys)
        if keys:
            self._worker.run(lambda: self._remove(keys))

    def save_now(self, key: Digest) -> None:
        """Save all parts of a conversation before returning, as far as their KV is in memory."""
        for part, _ in self._conversations.path(key):
            self._save(part)

    def size(self, key: Digest) -> int:
        """Bytes on disk of all parts of a conversation."""
        return sum(self._saved.size(part) for part, _ in self._conversations.path(key))

    def restore(self, tenant: str, key: Digest, tokens: IntArray) -> None:
        """Bring into memory what disk has of a conversation in the ledger, and memory has not.

        `tokens` begins with the conversation's. What can't be read is left to be computed.
        """
        with self._lock:
            if self._is_resident(key):
                return
        path = self._conversations.path(key)
        if not path:
            return
        (there,) = self._core.call(CountComputed([(tenant, tokens)]))
        if path[-1][1] - there >= _WORTH_LOADING:
            self._load(tenant, path, tokens, there)
        with self._lock:
            self._note_resident(key)

    def close(self) -> None:
        """Write what waits, as far as its KV is in memory, and stop; the engine still takes commands."""
        self._worker.close()
        self._remove([*self._leaving])
        for key in list(self._unsaved):
            self._save(key)

    def _remove(self, keys: Collection[Digest]) -> None:
        """Remove parts from disk. What was added again meanwhile is written anew, after this."""
        self._saved.remove(keys)
        with self._lock:
            self._leaving -= Counter(keys)

    def _load(self, tenant: str, path: list[tuple[Digest, int]], tokens: IntArray, there: int) -> None:
        start = 0
        for index, (key, end) in enumerate(path):
            if end > there:
                contents = self._saved.load(key, tokens[:end])
                if contents is None:
                    # Which is as it should be if the part was never written, or left the disk for others; a damaged
                    # file has had its warning.
                    logger.info("%d tokens of a saved conversation are computed again", path[-1][1] - start)
                    self._worker.run(partial(self._weed_out, path[index + 1 :], tokens))
                    return
                if not self._core.call(Install(tenant, tokens[:end], start, contents)):
                    return  # memory is full of what runs
                self.restored_tokens += end - max(start, there)
            start = end

    def _weed_out(self, path: list[tuple[Digest, int]], tokens: IntArray) -> None:
        """Read parts that were not loaded, so that those that are no good are removed, and saved again by a turn."""
        for key, end in path:
            self._saved.load(key, tokens[:end])

    def _save_in_time(self, key: Digest) -> None:
        """Save a part if the budget allows it now, or later."""
        wait = self._not_before - time.monotonic()
        if wait > 0 or not self._save(key):
            self._worker.run(lambda: self._save_in_time(key), after=max(wait, _DELAY))

    def _save(self, key: Digest) -> bool:
        """Write a part that waits for it; False if its KV is not complete yet."""
        with self._lock:
            unsaved = self._unsaved.get(key)
        if unsaved is None:
            return True
        written = 0
        try:
            contents = None
            if unsaved.rescued is None:
                contents = self._core.export(unsaved.tenant, unsaved.tokens, unsaved.start)
            if contents is None and unsaved.rescued is not None:
                contents = unsaved.rescued.wait()
            unsaved.attempts += 1
            if contents is None and unsaved.attempts < _ATTEMPTS:
                return False
            if contents is not None:
                written = self._saved.save(unsaved.key, unsaved.tokens, contents)
                self._touch(unsaved.key)
                self.saved_tokens += len(unsaved.tokens) - unsaved.start
                self._not_before = time.monotonic() + written / self._bytes_per_second
        except EngineStoppedError:
            return True
        except (MemoryError, ModelError, OSError) as error:
            logger.warning("the KV of a conversation can't be saved: %s", error)
        with self._lock:
            self._drop(unsaved.key)
            if not written:
                self._complete.clear()
        return True

    def _touch(self, key: Digest) -> None:
        """Count the files of a conversation that goes on as used, those of its beginning last, once in a while."""
        lineage = [part for part, _ in islice(self._conversations.lineage(key), 2)]
        touched = self._touched.pop(lineage[-1], 0.0) if lineage else 0.0
        if time.monotonic() - touched > _TOUCH_INTERVAL:
            touched = time.monotonic()
            self._saved.touch(part for part, _ in reversed(self._conversations.path(key)))
        self._touched[key] = touched

    def _drop(self, key: Digest) -> None:
        """Let a part wait no more. The lock is held."""
        unsaved = self._unsaved.pop(key, None)
        if unsaved is not None and unsaved.rescued is not None:
            self._rescued_bytes -= unsaved.rescued.nbytes
        self._core.send(Unguard(key))

    def keep(self, key: Digest, exported: Exported) -> None:
        """Take what was guarded and is evicted now; on the engine's thread."""
        with self._lock:
            unsaved = self._unsaved.get(key)
            if unsaved is not None and unsaved.rescued is None and self._rescued_bytes <= _RESCUED_BYTES:
                unsaved.rescued = exported
                self._rescued_bytes += exported.nbytes

    def _is_complete(self, key: Digest) -> bool:
        """Whether nothing of a part and those before it is missing on disk. The lock is held."""
        if self._removals != self._saved.removals:
            self._removals = self._saved.removals
            self._complete.clear()
        return key in self._complete

    def _note_resident(self, key: Digest) -> None:
        """Remember that a conversation's KV is in memory; until something is evicted, that stays so."""
        self._is_resident(key)
        self._resident.add(key)

    def _is_resident(self, key: Digest) -> bool:
        evictions = self._core.stats().kv.evictions
        if evictions != self._evictions:
            self._resident.clear()
            self._evictions = evictions
        return key in self._resident
