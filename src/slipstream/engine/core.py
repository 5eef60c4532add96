"""The engine as other threads see it: requests and commands go in, outputs come out."""

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import TypeVar

import numpy as np

from slipstream.backend import Backend, Blob, Exported
from slipstream.engine.active import ActiveRequest
from slipstream.engine.commands import Command, Export, Task
from slipstream.engine.idle import IdlePrefill
from slipstream.engine.limits import Limits
from slipstream.engine.loop import EngineLoop
from slipstream.engine.messages import Drain, EngineStats, Message, Stop, Wake
from slipstream.engine.request import EngineRequest, Output
from slipstream.engine.response_cache import ResponseCache
from slipstream.engine.scheduler import Scheduler
from slipstream.errors import EngineStoppedError, OverloadedError
from slipstream.kv import KVMemory
from slipstream.sandbox import roomy_stack
from slipstream.tokenizer import Tokenizer
from slipstream.types import IntArray

T = TypeVar("T")

RETRY_AFTER_SECONDS = 5


class EngineCore:
    """Owns a backend, on a thread of its own.

    Requests come in through `submit` from any thread; outputs go to the request's sink, on the engine's thread.
    """

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer,
        *,
        context_length: int,
        stop_token_ids: frozenset[int],
        step_target: float = 0.4,
        patience: float = 0.03,
        max_running: int = 64,
        max_waiting: int = 256,
        response_cache: ResponseCache | None = None,
    ) -> None:
        kv = KVMemory(backend.store, reserved=context_length)
        scheduler = Scheduler(
            kv,
            backend.cost,
            largest_draft=backend.largest_draft,
            step_target=step_target,
            patience=patience,
            max_running=max_running,
        )
        self.backend = backend
        self._tokenizer = tokenizer
        self._stop_token_ids = stop_token_ids
        self._max_waiting = max_waiting
        self.limits = Limits(backend.vocab_size, context_length, kv.capacity, tokenizer.longest_token)
        self.response_cache = response_cache
        self._kv = kv
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._loop = EngineLoop(backend, kv, scheduler, self._inbox)
        self._lock = threading.Lock()
        self._submitted = self._jobs_sent = 0
        self._draining = self._stopped = False
        self._thread = threading.Thread(target=self._loop.run, name="slipstream-engine", daemon=True)
        with roomy_stack():  # a grammar that compiled on a smaller one may need more to be followed
            self._thread.start()

    def submit(self, request: EngineRequest, sink: Callable[[Output], None]) -> ActiveRequest | None:
        """Queue a request; its outputs go to `sink`, which must not block.

        Returns None if the answer was known: it went to the sink already, and there is nothing to cancel.
        Raises `ContextLengthError` or `InvalidRequestError` for what can't be served, `OverloadedError` if too many
        wait already, and `EngineStoppedError` after a shutdown.
        """
        self.limits.check_token_ids(request)
        limit = self.limits.sequence_limit(request)
        key = self.response_cache.key(request) if self.response_cache is not None else None
        if self.response_cache is not None and key is not None:
            if self.alive and (answer := self.response_cache.get(key, len(request.prompt))) is not None:
                sink(answer)
                return None
            sink = self.response_cache.recording(key, sink)
        active = ActiveRequest(
            request,
            limit=limit,
            vocab_size=self.backend.vocab_size,
            tokenizer=self._tokenizer,
            stop_token_ids=self._stop_token_ids,
            sink=sink,
        )
        active.counters.response_cache = "miss" if key is not None else "off"
        with self._lock:
            self._require(self.alive)
            waiting = self.stats().waiting
            if waiting >= self._max_waiting:
                raise OverloadedError(
                    f"{waiting} requests are waiting already: try again in {RETRY_AFTER_SECONDS} s",
                    retry_after=RETRY_AFTER_SECONDS,
                )
            self._submitted += 1
            self._inbox.put(active)
        return active

    def cancel(self, active: ActiveRequest) -> None:
        """Stop a request when the step under way is over; what it computed stays cached. Harmless when it's done."""
        active.cancelled = True
        self._inbox.put(Wake())

    def prefill(self, job: IdlePrefill) -> None:
        """Have tokens computed when there is nothing else to do. Any request goes first, at the next step."""
        if 0 < len(job.tokens) < self.limits.max_sequence:
            with self._lock:
                self._jobs_sent += 1
                self._inbox.put(job)

    def call(self, command: Command[T]) -> T:
        """Have a command carried out between two steps, and return its result.

        Memory has all that was said by then: what answers have yet to compute is computed first.
        """
        task = Task(command)
        with self._lock:
            self._require(not self._stopped)
            self._inbox.put(task)
        return task.result.result()

    def export(self, tenant: str, tokens: IntArray, start: int = 0) -> Blob | None:
        """A copy of the state of `tokens` from token `start` on; None unless all of it is in memory.

        The engine goes on while the caller waits for a span to arrive, and then asks for the next: so many bytes are
        under way for each thread that exports. Raises `ModelError` if one doesn't arrive, and `EngineStoppedError`.
        """
        parts = []
        for span in self.backend.store.spans(start, len(tokens)):
            exported = self.call(Export(tenant, tokens[: span.end], span.start))
            if exported is None:
                return None
            parts.append(exported.wait())
        return np.concatenate(parts)

    def rescue_to(self, sink: Callable[[bytes, Exported], None]) -> None:
        """Have `sink` get what is guarded (see `Guard`) and about to be evicted, on the engine's thread."""
        self._kv.on_rescue = sink

    def send(self, command: Command[None]) -> None:
        """Have a command carried out that nobody waits for, in one go; a stopped engine ignores it."""
        with self._lock:
            if not self._stopped:
                self._inbox.put(command)

    def stats(self) -> EngineStats:
        """Totals since the start, and how much runs and waits now."""
        stats = self._loop.stats
        return replace(stats, waiting=self._submitted - stats.requests_taken + stats.waiting)

    @property
    def idle_waiting(self) -> int:
        """How many jobs there are for when there is nothing else to do."""
        stats = self._loop.stats
        return self._jobs_sent - stats.idle_jobs_taken + stats.idle_jobs

    @property
    def alive(self) -> bool:
        """Whether it takes requests."""
        return not self._draining and self._loop.failure is None

    @property
    def stalled_seconds(self) -> float:
        """For how long it has been at one step, or whatever else it does between two looks at its inbox."""
        since = self._loop.busy_since
        return time.monotonic() - since if since is not None else 0.0

    def drain(self, seconds: float = 0.0) -> None:
        """Take no more requests, give those that run so long to finish, and abort the rest; commands still work."""
        done: Future[None] = Future()
        with self._lock:
            self._draining = True
            if self._stopped:
                return
            self._inbox.put(Drain(time.monotonic() + seconds, done))
        done.result()

    def shutdown(self, *, drain_seconds: float = 0.0) -> None:
        """Drain, and end the thread."""
        self.drain(drain_seconds)
        with self._lock:
            self._stopped = True
            self._inbox.put(Stop())
        self._thread.join()

    @staticmethod
    def _require(running: bool) -> None:
        if not running:
            raise EngineStoppedError("the engine is shutting down")
