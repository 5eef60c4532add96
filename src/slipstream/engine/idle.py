"""Prefill ahead of time: what a conversation will certainly begin its next turn with, while nobody waits."""

from collections.abc import Callable
from dataclasses import dataclass

from slipstream.backend import Chunk
from slipstream.kv import KVMemory
from slipstream.types import IntArray

MAX_JOBS = 256
"""Older ones are given up: their conversations compute the tokens when they need them."""


@dataclass(slots=True)
class IdlePrefill:
    """KV that is wanted for `tokens`, int32 [n], of the conversation called `name`.

    It's not worth anything if `at_least` so many of them have lost theirs. `on_done` is called with the places of those
    whose KV was computed, on the engine's thread, and must not block, once all have it, unless the job is replaced by
    another one for the conversation, or memory has no room for it.
    """

    name: str
    tenant: str
    tokens: IntArray
    on_done: Callable[[range], None]
    at_least: int = 0
    start: int | None = None
    """How many tokens had their KV when the job began."""


class IdleQueue:
    """Jobs for when the engine has nothing else to do, oldest first, one a conversation.

    A job holds nothing between steps: each takes up the KV where the last one left it, so a request that comes in
    between finds everything, and a job can be dropped at any time.
    """

    def __init__(self, kv: KVMemory) -> None:
        self._kv = kv
        self._jobs: dict[tuple[str, str], IdlePrefill] = {}

    def __len__(self) -> int:
        return len(self._jobs)

    def add(self, job: IdlePrefill) -> None:
        """Queue a job, in place of an earlier one for the same conversation."""
        self._jobs.pop((job.tenant, job.name), None)
        self._jobs[job.tenant, job.name] = job
        while len(self._jobs) > MAX_JOBS:
            self._drop(next(iter(self._jobs.values())))

    def step(self, largest: Callable[[int], int], compute: Callable[[Chunk], None]) -> None:
        """Let the oldest job compute; what needs no work, or finds no memory, is done.

        `largest` says how many tokens at the most, from how many have their KV already.
        """
        job = next(iter(self._jobs.values()))
        computed = self._kv.computed(job.tenant, job.tokens)
        job.start = computed if job.start is None else job.start
        if computed < job.at_least:
            self._drop(job)
            return
        if computed < len(job.tokens):
            sequence = self._kv.open(job.tenant, job.tokens, room=len(job.tokens))
            if sequence is None:
                self._drop(job)
                return
            count = min(largest(sequence.computed), len(job.tokens) - sequence.computed)
            try:
                compute(sequence.chunk(count, 0))
            except Exception:
                self._drop(job)
                raise
            finally:
                computed = sequence.computed
                self._kv.cache(sequence)
        if computed == len(job.tokens):
            self._drop(job)
            job.on_done(range(job.start, computed))

    def _drop(self, job: IdlePrefill) -> None:
        del self._jobs[job.tenant, job.name]
