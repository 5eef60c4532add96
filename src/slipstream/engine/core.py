"""The engine thread: the one place where the model runs."""

import contextlib
import logging
import math
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

from slipstream.backend import Backend, Piece
from slipstream.backend.base import FloatArray
from slipstream.engine.generation import Generation, GenerationRequest, Output, Phase
from slipstream.engine.idle import IdlePrefill, IdleQueue
from slipstream.engine.limits import Limits
from slipstream.engine.response_cache import ResponseCache
from slipstream.engine.scheduler import Scheduler, Work
from slipstream.engine.step_cost import Load, StepCost
from slipstream.errors import EngineStoppedError, OverloadedError
from slipstream.kv import KVMemory, KVUsage
from slipstream.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_IDLE_STEP_TARGET = 0.1
"""Seconds that a request may have to wait for what is computed ahead of time."""
T = TypeVar("T")

RETRY_AFTER_SECONDS = 5


@dataclass(slots=True)
class EngineStats:
    """Totals since the start."""

    steps: int = 0
    tokens_forwarded: int = 0
    """Real tokens, without padding."""
    infer_seconds: float = 0.0
    busy_seconds: float = 0.0
    """Time of the engine thread with something to do, `infer_seconds` included."""
    idle_tokens: int = 0
    """Of `tokens_forwarded`: computed ahead of time, while nobody waited."""
    idle_seconds: float = 0.0
    preemptions: int = 0
    running: int = 0
    waiting: int = 0


class EngineCore:
    """Owns a backend and its KV memory, on a thread of its own.

    Requests come in through `submit` from any thread; outputs go to the request's sink, on the engine thread.
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
        self._backend = backend
        self._tokenizer = tokenizer
        self._stop_token_ids = stop_token_ids
        self._kv = KVMemory(backend, reserved=context_length + 1)
        self._cost = StepCost(backend.measurements)
        self._idle_step_target = min(step_target, _IDLE_STEP_TARGET)
        self._scheduler = Scheduler(
            self._kv,
            self._cost,
            step_target=step_target,
            patience=patience,
            max_running=max_running,
            max_waiting=max_waiting,
        )
        self.limits = Limits(backend.vocab_size, context_length, self._kv.capacity)
        self.response_cache = response_cache
        self._idle = IdleQueue(self._kv)
        self._stats = EngineStats()
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._queued = 0
        self._queued_lock = threading.Lock()
        self._jobs_sent = self._jobs_taken = 0
        self._deadline: float | None = None
        self._patient_until = 0.0
        """When to begin with idle work, for a turn may come in that would have to wait for it."""
        self.before_end: Callable[[KVMemory], None] = lambda _: None
        """Called on the engine's thread when it has stopped and its memory is still there."""
        self._thread = threading.Thread(target=self._run, name="slipstream-engine", daemon=True)
        self._thread.start()

    def submit(self, request: GenerationRequest, sink: Callable[[Output], None]) -> Generation | None:
        """Queue a request; its outputs go to `sink`, which must not block.

        Returns None if the answer was known: it went to the sink already, and there is nothing to cancel.
        Raises `ContextLengthError` or `InvalidRequestError` for what can't be served, `OverloadedError` when too many
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
        generation = Generation(
            request,
            limit=limit,
            vocab_size=self._backend.vocab_size,
            tokenizer=self._tokenizer,
            stop_token_ids=self._stop_token_ids,
            sink=sink,
        )
        generation.counters.response_cache = "miss" if key is not None else "off"
        with self._queued_lock:
            if self._deadline is not None:
                raise EngineStoppedError("the engine is shutting down")
            if self._queued >= self._scheduler.max_waiting:
                raise OverloadedError(
                    f"{self._queued} requests are waiting already: try again in {RETRY_AFTER_SECONDS} s",
                    retry_after=RETRY_AFTER_SECONDS,
                )
            self._queued += 1
            self._inbox.put(lambda: self._scheduler.waiting.append(generation))
        return generation

    def cancel(self, generation: Generation) -> None:
        """Stop a generation before the next step; what it computed stays for reuse. Harmless when it's done."""
        generation.cancelled = True
        self._inbox.put(None)  # wakes the thread

    def prefill(self, job: IdlePrefill) -> None:
        """Have KV computed when there is nothing else to do. Any request goes first, at the next step."""
        if 0 < len(job.tokens) < self.limits.max_sequence:
            with self._queued_lock:
                self._jobs_sent += 1
                self._inbox.put(lambda: self._take_job(job))

    def call(self, function: Callable[[KVMemory], T]) -> T:
        """Run a function on the engine thread, between two steps, and return its result.

        Memory has all that was said by then: what answers have yet to compute is computed first.
        """
        future: Future[T] = Future()

        def run() -> None:
            try:
                while work := self._scheduler.plan_settling():
                    self._step(work)
                future.set_result(function(self._kv))
            except Exception as error:
                future.set_exception(error)

        with self._queued_lock:
            if self._deadline is not None:
                raise EngineStoppedError("the engine is shutting down")
            self._inbox.put(run)
        return future.result()

    def stats(self) -> EngineStats:
        """Totals since the start, and how much runs and waits now."""
        self._stats.running = len(self._scheduler.running)
        self._stats.waiting = self._queued
        self._stats.preemptions = self._scheduler.preemptions
        return self._stats

    @property
    def idle_waiting(self) -> int:
        """How many jobs there are for when there is nothing else to do."""
        return self._jobs_sent - self._jobs_taken + len(self._idle)

    @property
    def evictions(self) -> int:
        """How often KV was given up for lack of memory."""
        return self._kv.evictions

    @property
    def block_size(self) -> int:
        """Tokens in a block of KV, the unit in which it is copied."""
        return self._backend.block_size

    @property
    def kv_bytes_per_token(self) -> int:
        """How much memory the KV of a token takes."""
        return self._backend.block_bytes // self._backend.block_size

    @property
    def prefill_seconds_per_token(self) -> float:
        """What a token of a long prompt costs, at the least."""
        return self._cost.token(0)

    @property
    def alive(self) -> bool:
        """Whether it takes requests."""
        return self._deadline is None

    def kv_usage(self) -> KVUsage:
        """What the KV memory holds; counted without stopping the engine, so good for a glance."""
        return self._kv.usage()

    def shutdown(self, *, drain_seconds: float = 0.0) -> None:
        """Take no more requests, give those that run so long to finish, abort the rest, and end the thread."""
        with self._queued_lock:
            deadline = time.monotonic() + drain_seconds
            self._deadline = deadline if self._deadline is None else min(self._deadline, deadline)
            self._inbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        error = EngineStoppedError("the server shut down before the answer was finished")
        try:
            self._serve()
        except Exception as fault:
            logger.critical("the engine failed and takes no more requests", exc_info=True)
            error = EngineStoppedError(f"the engine failed: {fault}")
        with self._queued_lock:
            self._deadline = 0.0
        self._receive(wait=0.0)
        for generation in [*self._scheduler.running, *self._scheduler.waiting]:
            self._end(generation, error)
        self.before_end(self._kv)

    def _serve(self) -> None:
        """Step after step, until the shutdown's deadline."""
        while self._deadline is None or (time.monotonic() < self._deadline and not self._out_of_work) or self._settling:
            self._receive(wait=self._seconds_to_work())
            started = time.perf_counter()
            self._drop_cancelled()
            self._admit()
            with self._queued_lock:
                self._queued = len(self._scheduler.waiting) + self._inbox.qsize()
            if work := self._scheduler.plan(self._backend.prepared, started if self.alive else math.inf):
                self._step(work)
            elif self._idle and self._scheduler.idle and started >= self._patient_until:
                self._step_ahead()
            self._stats.busy_seconds += time.perf_counter() - started

    @property
    def _out_of_work(self) -> bool:
        return self._scheduler.idle and self._inbox.empty()

    @property
    def _settling(self) -> bool:
        """Whether somebody has an answer whose last tokens want their KV."""
        return any(generation.phase is Phase.SETTLING for generation in self._scheduler.running)

    def _seconds_to_work(self) -> float | None:
        """How long there's nothing to compute unless something comes in; None for ever."""
        if not self._scheduler.idle:
            due = self._scheduler.due if self.alive else 0.0
        elif self._idle:
            due = self._patient_until
        else:
            return None
        return max(0.0, due - time.perf_counter())

    def _receive(self, *, wait: float | None) -> None:
        """Carry out what came in; waits so many seconds for something, None for ever."""
        if wait != 0.0:
            with contextlib.suppress(queue.Empty):
                self._carry_out(self._inbox.get(timeout=wait))
        while not self._inbox.empty():
            self._carry_out(self._inbox.get())

    def _take_job(self, job: IdlePrefill) -> None:
        self._idle.add(job)
        self._jobs_taken += 1  # now, so that a job is seen in one place at least

    @staticmethod
    def _carry_out(message: Callable[[], None] | None) -> None:
        if message is not None:
            message()

    def _drop_cancelled(self) -> None:
        for generation in [*self._scheduler.running, *self._scheduler.waiting]:
            if generation.cancelled and generation.phase is not Phase.SETTLING:
                self._end(generation)

    def _end(self, generation: Generation, error: Exception | None = None) -> None:
        """End a generation that has no answer yet or only part of one."""
        answered = generation.phase is Phase.SETTLING
        output = None if answered else generation.abort("error" if error else "cancelled", error)
        if generation in self._scheduler.running:
            self._scheduler.retire(generation)
        else:
            self._scheduler.waiting.remove(generation)
        if output is not None:
            self._emit(generation, output)

    def _admit(self) -> None:
        for generation in list(self._scheduler.admit()):
            try:
                output = generation.opening()
            except Exception as error:
                self._end(generation, error)
                continue
            if output is not None:
                if output.finish_reason is not None:
                    generation.conclude()
                self._emit(generation, output)

    def _step(self, work: list[Work]) -> None:
        """Run one forward pass and let each generation have its part of it."""
        pieces = []
        for item in work:
            assert item.generation.sequence is not None
            pieces.append(item.generation.sequence.piece(item.count, item.logit_rows, item.draft.tokens))
            item.generation.counters.forward_passes += item.generation.phase is not Phase.SETTLING
        try:
            logits = self._forward(pieces)
        except Exception as error:
            logger.exception("a step failed; its requests are answered with the error")
            for item in work:
                self._end(item.generation, error)
            return
        row = 0
        for item in work:
            self._deliver(item, logits[row : row + item.logit_rows])
            row += item.logit_rows

    def _step_ahead(self) -> None:
        """Compute ahead of time, in a step short enough for a request to wait for."""
        started = time.perf_counter()

        def compute(piece: Piece) -> None:
            self._forward([piece])
            self._stats.idle_tokens += len(piece.tokens)

        try:
            self._idle.step(lambda past: self._cost.largest_within(self._idle_step_target, past), compute)
        except Exception:
            logger.exception("computing ahead of time failed; it will be done when it's needed")
        self._stats.idle_seconds += time.perf_counter() - started

    def _deliver(self, item: Work, logits: FloatArray) -> None:
        """Give a generation its rows of the step, and its sink what came of them."""
        generation = item.generation
        assert generation.sequence is not None
        self._kv.advance(generation.sequence, item.count)
        if not item.logits:
            if generation.phase is Phase.SETTLING and not generation.pending:
                generation.phase = Phase.DONE
                self._scheduler.retire(generation)
            return
        start = len(generation.sequence)
        try:
            output, confirmed, chosen = generation.accept(logits, item.draft)
        except Exception as error:
            logger.warning("a request failed, others go on", exc_info=True)
            self._end(generation, error)
            return
        self._kv.advance(generation.sequence, confirmed)
        if output.finish_reason is not None:
            generation.conclude()
            self._patient_until = self._scheduler.settles_at(generation)
        self._scheduler.accepted(generation, start, chosen)
        if generation.phase is Phase.DONE:  # before its client hears of it, and comes back for more
            self._scheduler.retire(generation)
        self._emit(generation, output)

    def _forward(self, pieces: list[Piece]) -> FloatArray:
        """Run a forward pass, count it, and learn what it cost."""
        prepared = self._backend.prepared
        started = time.perf_counter()
        logits = self._backend.forward(pieces)
        seconds = time.perf_counter() - started
        tokens = sum(len(piece.tokens) for piece in pieces)
        self._cost.observe(Load.of((len(piece.tokens), piece.past) for piece in pieces), prepared, seconds)
        self._stats.steps += 1
        self._stats.tokens_forwarded += tokens
        self._stats.infer_seconds += seconds
        return logits

    @staticmethod
    def _emit(generation: Generation, output: Output) -> None:
        try:
            generation.sink(output)
        except Exception:
            logger.exception("a request's sink failed; the request is cancelled")
            generation.cancelled = True
