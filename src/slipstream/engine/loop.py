"""The engine's thread: the one place where the model runs."""

import contextlib
import logging
import math
import queue
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from slipstream.backend import Backend, Chunk, Ticket
from slipstream.engine.active import ActiveRequest, Phase, StepOutput
from slipstream.engine.idle import IdlePrefill, IdleQueue
from slipstream.engine.messages import Call, Drain, Message, Note, Stop, Submit
from slipstream.engine.request import Output
from slipstream.engine.scheduler import Scheduler, Work
from slipstream.errors import EngineStoppedError
from slipstream.kv import KVMemory, KVUsage
from slipstream.sampling import Choice, Row

logger = logging.getLogger(__name__)

_IDLE_STEP_TARGET = 0.1
"""Seconds that a request may have to wait for what is computed ahead of time."""


@dataclass(slots=True)
class EngineStats:
    """Totals since the start, and what there is now."""

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
    idle_jobs: int = 0
    """Work that waits for a time when nobody waits."""
    idle_jobs_taken: int = 0
    requests_taken: int = 0
    """Out of the inbox, since the start; so are idle jobs."""
    kv: KVUsage = field(default_factory=KVUsage)


class EngineLoop:
    """Takes messages and runs steps until it is stopped. `stats` is replaced, never changed, so any thread may read."""

    def __init__(
        self,
        backend: Backend,
        kv: KVMemory,
        scheduler: Scheduler,
        inbox: "queue.SimpleQueue[Message]",
        *,
        step_target: float,
    ) -> None:
        self._backend = backend
        self._kv = kv
        self._scheduler = scheduler
        self._inbox = inbox
        self._idle_step_target = min(step_target, _IDLE_STEP_TARGET)
        self._idle = IdleQueue(kv)
        self._calls: deque[_Task] = deque()
        self._drains: list[Drain] = []
        self._stopped = False
        self.failure: EngineStoppedError | None = None
        """Why nothing is computed any more, if so."""
        self.busy_since: float | None = None
        """Since which `monotonic` time it is at what it does now, a step in most cases; None if it waits."""
        self._patient_until = 0.0
        """When to begin with idle work, for a turn may come in that would have to wait for it."""
        self._totals = EngineStats(kv=kv.usage())
        self.stats = replace(self._totals)

    def run(self) -> None:
        """Serve until `Stop`; after a fault, commands alone."""
        while not self._stopped:
            try:
                self._serve()
            except Exception as fault:
                logger.critical("the engine failed and takes no more requests", exc_info=True)
                self.failure = EngineStoppedError(f"the engine failed: {fault}")
                self._end_all(self.failure)
        for task in self._calls:
            task.give_up(EngineStoppedError("the engine is shutting down"))

    def _serve(self) -> None:
        while not self._stopped:
            self.busy_since = None
            self._receive(wait=self._seconds_to_work())
            started = time.perf_counter()
            self.busy_since = time.monotonic()
            self._drop_cancelled()
            self._end_drains()
            if self.failure is None:
                self._compute(started)
            self._carry_on()
            self._totals.busy_seconds += time.perf_counter() - started
            self._publish()

    def _compute(self, started: float) -> None:
        """Run a step, if there is something to compute."""
        self._admit()
        self._publish()
        if work := self._scheduler.plan(math.inf if self._drains else started):
            self._step(work)
        elif self._idle and self._scheduler.idle and started >= self._patient_until:
            self._step_ahead()

    def _publish(self) -> None:
        """Let other threads see how things stand."""
        totals = self._totals
        totals.preemptions = self._scheduler.preemptions
        totals.running = len(self._scheduler.running)
        totals.waiting = len(self._scheduler.waiting)
        totals.idle_jobs = len(self._idle)
        totals.kv = self._kv.usage()
        self.stats = replace(totals)

    def _seconds_to_work(self) -> float | None:
        """How long there's nothing to compute unless something comes in; None for ever."""
        if self._calls or self._drains:
            due = 0.0
        elif not self._scheduler.idle:
            due = self._scheduler.due
        elif self._idle and self.failure is None:
            due = self._patient_until
        else:
            return None
        return max(0.0, due - time.perf_counter())

    # Messages

    def _receive(self, *, wait: float | None) -> None:
        """Take in what came; waits so many seconds for something, None for ever."""
        if wait != 0.0:
            with contextlib.suppress(queue.Empty):
                self._take(self._inbox.get(timeout=wait))
        while not self._inbox.empty():
            self._take(self._inbox.get())

    def _take(self, message: Message) -> None:
        match message:
            case Submit(active):
                self._totals.requests_taken += 1
                if self.failure is not None or self._drains:
                    self._emit(active, active.abort("error", self.failure or _shut_down()))
                else:
                    self._scheduler.enqueue(active)
            case Call(command, result):
                self._calls.append(_Task(command.run(self._kv), result))
            case Note(command):
                for _ in command.run(self._kv):
                    pass
            case IdlePrefill():
                self._idle.add(message)
                self._totals.idle_jobs_taken += 1
            case Drain():
                self._drains.append(message)
            case Stop():
                self._stopped = True

    def _carry_on(self) -> None:
        """Carry on with the oldest command, once memory has all that was said by then."""
        if not self._calls:
            return
        while self.failure is None and (work := self._scheduler.plan_settling()):
            self._step(work)
        if not self._calls[0].carry_on():
            self._calls.popleft()

    def _end_drains(self) -> None:
        """Report that nothing runs any more, or end what runs when its time is up."""
        if not self._drains:
            return
        if not self._scheduler.idle:
            if time.monotonic() < min(drain.deadline for drain in self._drains):
                return
            self._end_all(_shut_down())
        for drain in self._drains:
            drain.done.set_result(None)
        self._drains.clear()

    # Requests

    def _drop_cancelled(self) -> None:
        for active in [*self._scheduler.running, *self._scheduler.waiting]:
            if active.cancelled and active.phase is not Phase.SETTLING:
                self._end(active)

    def _end_all(self, error: Exception) -> None:
        """End what has no answer yet; what has one gets the state of its last tokens, if the model still runs."""
        while self.failure is None and (work := self._scheduler.plan_settling()):
            self._step(work)
        for active in [*self._scheduler.running, *self._scheduler.waiting]:
            self._end(active, error)

    def _end(self, active: ActiveRequest, error: Exception | None = None) -> None:
        """End a request that has no answer yet or only part of one."""
        answered = active.phase is Phase.SETTLING
        output = None if answered else active.abort("error" if error else "cancelled", error)
        if active in self._scheduler.running:
            self._scheduler.retire(active)
        else:
            self._scheduler.waiting.remove(active)
        if output is not None:
            self._emit(active, output)

    def _admit(self) -> None:
        for active in self._scheduler.admit():  # one that starts may set back one that has just begun
            try:
                output = active.opening()
            except Exception as error:
                self._end(active, error)
                continue
            if output is not None:
                if output.finish_reason is not None:
                    active.conclude()
                self._emit(active, output)

    @staticmethod
    def _emit(active: ActiveRequest, output: Output) -> None:
        try:
            active.sink(output)
        except Exception:
            logger.exception("a request's sink failed; the request is cancelled")
            active.cancelled = True

    # Steps

    def _step(self, work: list[Work]) -> None:
        """Run a step and let each request have its part of it."""
        parts, first = [], 0
        for item in work:
            parts.append(_Part(item, first))
            first += item.rows
            item.active.counters.forward_passes += item.active.phase is not Phase.SETTLING
        try:
            rows: list[Row] = []
            ticket = self._run([item.chunk() for item in work], meanwhile=lambda: _look_ahead(parts, rows))
            early = {row.index: choice for row, choice in zip(rows, ticket.choose(rows), strict=True)}
            accepting: list[tuple[_Part, _Accepting]] = []
            for part in parts:
                active = part.item.active
                self._settle(active)
                if part.error is not None:
                    self._fail(part, part.error)
                elif part.item.chooses:
                    accepting.append((part, active.accept(part.item.draft, part.first, early)))
            self._accept(ticket, accepting)
        except Exception as error:
            logger.exception("a step failed; its requests are answered with the error")
            for part in parts:
                if part.item.active in self._scheduler.running:
                    self._give_back(part, error)
            self._kv.check()  # what is not sound must not go on: no answer is better than a wrong one

    def _run(self, chunks: list[Chunk], meanwhile: Callable[[], object] = lambda: None) -> Ticket:
        """Have the backend run a step, and count it."""
        started = time.perf_counter()
        ticket = self._backend.launch(chunks)
        meanwhile()
        ticket.wait()
        self._totals.infer_seconds += time.perf_counter() - started
        self._totals.steps += 1
        self._totals.tokens_forwarded += sum(len(chunk.tokens) for chunk in chunks)
        return ticket

    def _settle(self, active: ActiveRequest) -> None:
        """Let a request go if it has its answer, and now the state of its last tokens, too."""
        if active.phase is Phase.SETTLING and not active.pending:
            active.phase = Phase.DONE
            self._scheduler.retire(active)

    def _accept(self, ticket: Ticket, choosing: list[tuple["_Part", "_Accepting"]]) -> None:
        """Let requests take their tokens; what they still ask for is chosen for all of them at once."""
        answers: list[Choice | None] = [None] * len(choosing)
        while choosing:
            asking, rows = [], []
            for (part, accepting), answer in zip(choosing, answers, strict=True):
                try:
                    rows.append(accepting.send(answer))  # type: ignore[arg-type]  # None starts it
                    asking.append((part, accepting))
                except StopIteration as end:
                    self._deliver(part, end.value)
                except Exception as error:
                    self._fail(part, error)
            choosing = asking
            answers = [*ticket.choose(rows)] if rows else []

    def _fail(self, part: "_Part", error: Exception) -> None:
        """End one request of a step, in which the others go on."""
        logger.warning("a request failed, others go on", exc_info=error)
        self._give_back(part, error)

    def _give_back(self, part: "_Part", error: Exception) -> None:
        """End a request whose step went wrong; what was computed of its draft is nobody's."""
        if part.sequence.computed > part.computed:
            self._kv.rewind(part.sequence, part.computed)
        self._end(part.item.active, error)

    def _deliver(self, part: "_Part", output: StepOutput) -> None:
        """Give a request's sink what came of a step."""
        active, sequence = part.item.active, part.sequence
        if output.confirmed < len(part.item.draft.tokens):
            self._kv.rewind(sequence, part.computed + output.confirmed)
        if output.output.finish_reason is not None:
            active.conclude()
            self._patient_until = self._scheduler.settles_at(active)
        self._scheduler.accepted(part.item, output.chosen)
        if active.phase is Phase.DONE:  # before its client hears of it, and comes back for more
            self._scheduler.retire(active)
            self._publish()
        self._emit(active, output.output)

    def _step_ahead(self) -> None:
        """Compute ahead of time, in a step short enough for a request to wait for."""
        started = time.perf_counter()

        def compute(chunk: Chunk) -> None:
            self._run([chunk])
            self._totals.idle_tokens += len(chunk.tokens)

        try:
            self._idle.step(lambda past: self._backend.cost.largest_within(self._idle_step_target, past), compute)
        except Exception:
            logger.exception("computing ahead of time failed; it will be done when it's needed")
        self._totals.idle_seconds += time.perf_counter() - started


_Accepting = Generator[Row, Choice, StepOutput]


class _Part:
    """A request's part of a step, whose rows begin with the step's row `first`."""

    __slots__ = ("computed", "error", "first", "item", "sequence")

    def __init__(self, item: Work, first: int) -> None:
        assert item.active.sequence is not None
        self.item = item
        self.sequence = item.active.sequence
        self.computed = self.sequence.computed + item.count
        """How many tokens are computed after the step, without the draft."""
        self.first = first
        self.error: Exception | None = None
        """What went wrong while rows were asked for, such as a grammar that met a limit."""


def _look_ahead(parts: list[_Part], rows: list[Row]) -> None:
    """Collect the rows of a step whose choice can be made at once, and make their masks."""
    for part in parts:
        if part.item.chooses:
            try:
                rows += part.item.active.early_rows(part.item.draft, part.first)
            except Exception as error:
                part.error = error


class _Task:
    """A command being carried out."""

    def __init__(self, progress: Iterator[Any], result: "Future[Any]") -> None:
        self._progress = progress
        self._result = result
        self._last: Any = None

    def carry_on(self) -> bool:
        """Do the next part of it; False if there was none left."""
        try:
            self._last = next(self._progress)
        except StopIteration:
            self._result.set_result(self._last)
            return False
        except Exception as error:
            self._result.set_exception(error)
            return False
        return True

    def give_up(self, error: Exception) -> None:
        """End it without a result."""
        self._result.set_exception(error)


def _shut_down() -> EngineStoppedError:
    return EngineStoppedError("the server shut down before the answer was finished")
