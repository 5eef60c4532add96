"""The engine's thread: the one place where the model runs."""

import contextlib
import logging
import math
import queue
import time
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any

from slipstream.backend import Backend, Chunk, Ticket
from slipstream.engine.active import ActiveRequest, Found, Phase
from slipstream.engine.commands import Command, Task
from slipstream.engine.idle import IdlePrefill, IdleQueue
from slipstream.engine.messages import Drain, EngineStats, Message, Stop
from slipstream.engine.request import Output
from slipstream.engine.scheduler import Scheduler, Work
from slipstream.errors import EngineStoppedError
from slipstream.kv import KVMemory
from slipstream.sampling import Choice, Row

logger = logging.getLogger(__name__)

_IDLE_STEP_TARGET = 0.1
"""Seconds that a request may have to wait for what is computed ahead of time."""


@dataclass(frozen=True, slots=True)
class Step:
    """A step under way."""

    work: list[Work]
    ticket: Ticket
    tokens: int
    started: float
    """When it was launched, a `perf_counter` time."""

    def early_rows(self) -> list[Row]:
        """The rows whose choice can be made at once, with their masks."""
        rows: list[Row] = []
        for item in self.work:
            if item.chooses:
                try:
                    rows += item.active.early_rows(item.draft, item.first)
                except Exception as error:
                    item.error = error
        return rows


class EngineLoop:
    """Takes messages and runs steps until it is stopped. `stats` is replaced, never changed, so any thread may read."""

    def __init__(
        self, backend: Backend, kv: KVMemory, scheduler: Scheduler, inbox: "queue.SimpleQueue[Message]"
    ) -> None:
        self._backend = backend
        self._kv = kv
        self._scheduler = scheduler
        self._inbox = inbox
        self._idle_step_target = min(scheduler.step_target, _IDLE_STEP_TARGET)
        self._idle = IdleQueue(kv)
        self._calls: deque[Task[Any]] = deque()
        self._drains: list[Drain] = []
        self._stopped = False
        self._queued: Step | None = None
        """A step that was launched and not waited for yet; nothing is chosen from it."""
        self._to_give_out: list[tuple[ActiveRequest, Found]] = []
        """What the last step brought, in order."""
        self._device_free = 0.0
        """When the last step was over, a `perf_counter` time."""
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
                self._queued = None
                self._end_all(self.failure)
        for task in self._calls:
            task.result.set_exception(EngineStoppedError("the engine is shutting down"))

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
        """Run a step, if there is something to compute; one that is queued need not be over when it's planned."""
        self._admit()
        self._publish()
        if work := self._scheduler.plan(math.inf if self._drains else started):
            self._step(work)
        elif self._queued is not None:
            self._finish_queued()
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
        if self._calls or self._drains or self._queued is not None:
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
            case ActiveRequest():
                self._totals.requests_taken += 1
                if self.failure is not None or self._drains:
                    self._emit(message, message.abort("error", self.failure or _shut_down()))
                else:
                    self._scheduler.enqueue(message)
            case Task():
                self._calls.append(message)
            case Command():
                for _ in message.run(self._kv):
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
        self._give_out()
        while self.failure is None and (work := self._scheduler.plan_settling()):
            self._step(work)
        self._finish_queued()
        if not self._calls[0].carry_on(self._kv):
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
            if (active.cancelled or active.failure is not None) and active.phase is not Phase.SETTLING:
                self._end(active, active.failure)

    def _end_all(self, error: Exception) -> None:
        """End what has no answer yet; what has one gets the state of its last tokens, if the model still runs."""
        while self.failure is None and (work := self._scheduler.plan_settling()):
            self._step(work)
        for active in [*self._scheduler.running, *self._scheduler.waiting]:
            self._end(active, error)

    def _end(self, active: ActiveRequest, error: Exception | None = None) -> None:
        """End a request that has no answer yet or only part of one."""
        self._finish_queued()
        self._give_out()
        if active.phase is Phase.DONE:  # by then, for the queued step failed
            return
        answered = active.phase is Phase.SETTLING
        output = None if answered else active.abort("error" if error else "cancelled", error)
        self._scheduler.retire(active)
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
        """Launch a step; and finish it, unless the next one may be launched first.

        What the step before brought is given out while the device is at this one.
        """
        for item in work:
            item.active.counters.forward_passes += item.active.phase is not Phase.SETTLING
        try:
            chunks = [item.chunk() for item in work]
            started = time.perf_counter()
            step = Step(work, self._backend.launch(chunks), sum(len(chunk.tokens) for chunk in chunks), started)
        except Exception as error:
            self._fail_step(work, error)
            return
        self._give_out()
        sound = self._finish_queued()
        if step.ticket.queued and sound:
            self._queued = step
        else:
            self._finish(step)

    def _finish_queued(self) -> bool:
        """Wait for the queued step, if there is one; False if it failed."""
        step, self._queued = self._queued, None
        return step is None or self._finish(step)

    def _finish(self, step: Step) -> bool:
        """Wait for a step, and let each request have its part of it; False if it failed."""
        try:
            rows = step.early_rows()
            early = {row.index: choice for row, choice in zip(rows, self._wait(step, rows), strict=True)}
            accepting: list[tuple[Work, _Accepting]] = []
            for item in step.work:
                active = item.active
                if active.phase is Phase.SETTLING and not active.pending:  # its last tokens have their state now, too
                    active.phase = Phase.DONE
                    self._scheduler.retire(active)
                if item.error is not None:
                    self._fail(item, item.error)
                elif item.chooses:
                    accepting.append((item, active.accept(item.draft, item.first, early)))
            self._accept(step.ticket, accepting)
        except Exception as error:
            if step.ticket.queued:  # others may have gone on from what it was to compute
                for item in step.work:
                    self._kv.distrust(item.active.request.tenant, item.sequence.tokens, item.past)
            self._fail_step(step.work, error)
            return False
        return True

    def _wait(self, step: Step, rows: list[Row]) -> list[Choice]:
        """Wait for a step and the choice for some rows, and count it."""
        choices = step.ticket.wait(rows)
        now = time.perf_counter()
        self._totals.infer_seconds += now - max(step.started, self._device_free)
        self._device_free = now
        self._totals.steps += 1
        self._totals.tokens_forwarded += step.tokens
        return choices

    def _accept(self, ticket: Ticket, choosing: list[tuple[Work, "_Accepting"]]) -> None:
        """Let requests take their tokens; what they still ask for is chosen for all of them at once."""
        answers: list[Choice | None] = [None] * len(choosing)
        while choosing:
            asking, rows = [], []
            for (item, accepting), answer in zip(choosing, answers, strict=True):
                try:
                    rows.append(accepting.send(answer))  # type: ignore[arg-type]  # None starts it
                    asking.append((item, accepting))
                except StopIteration as end:
                    self._deliver(item, end.value)
                except Exception as error:
                    self._fail(item, error)
            choosing = asking
            answers = [*ticket.choose(rows)] if rows else []

    def _fail_step(self, work: list[Work], error: Exception) -> None:
        """End the requests of a step that went wrong."""
        logger.error("a step failed; its requests are answered with the error", exc_info=error)
        for item in work:
            if item.active in self._scheduler.running:
                self._give_back(item, error)
        self._kv.check()  # what is not sound must not go on: no answer is better than a wrong one

    def _fail(self, item: Work, error: Exception) -> None:
        """End one request of a step, in which the others go on."""
        logger.warning("a request failed, others go on", exc_info=error)
        item.active.failure = error
        self._give_back(item, error)

    def _give_back(self, item: Work, error: Exception) -> None:
        """End a request whose step went wrong; what was computed of its draft is nobody's."""
        if item.sequence.computed > item.end:
            self._kv.rewind(item.sequence, item.end)
        self._end(item.active, error)

    def _deliver(self, item: Work, found: Found) -> None:
        """Take in what came of a step for a request."""
        active, sequence = item.active, item.sequence
        if active.failure is not None:
            self._give_back(item, active.failure)
            return
        if found.confirmed < len(item.draft.tokens):
            self._kv.rewind(sequence, item.end + found.confirmed)
        if found.last is not None:
            active.conclude()
            self._patient_until = self._scheduler.settles_at(active)
        self._scheduler.accepted(item, found.chosen)
        if active.phase is Phase.DONE:  # before its client hears of it, and comes back for more
            self._scheduler.retire(active)
            self._publish()
        if found.last is not None:
            self._emit(active, found.last)
        else:
            self._to_give_out.append((active, found))

    def _give_out(self) -> None:
        """Let the sinks have what came of the last step."""
        for active, found in self._to_give_out:
            try:
                self._emit(active, active.output(found))
            except Exception as error:
                logger.warning("a request's output can't be made, others go on", exc_info=error)
                active.failure = error
        self._to_give_out.clear()

    def _step_ahead(self) -> None:
        """Compute ahead of time, in a step short enough for a request to wait for."""
        started = time.perf_counter()

        def compute(chunk: Chunk) -> None:
            self._wait(Step([], self._backend.launch([chunk]), len(chunk.tokens), started), [])
            self._totals.idle_tokens += len(chunk.tokens)

        try:
            self._idle.step(lambda past: self._backend.cost.largest_within(self._idle_step_target, past), compute)
        except Exception:
            logger.exception("computing ahead of time failed; it will be done when it's needed")
        self._totals.idle_seconds += time.perf_counter() - started


_Accepting = Generator[Row, Choice, Found]


def _shut_down() -> EngineStoppedError:
    return EngineStoppedError("the server shut down before the answer was finished")
