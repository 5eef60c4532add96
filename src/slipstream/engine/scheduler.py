"""Which tokens of which request go into the next step. Knows no model, so most of it is tested without one."""

import math
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from slipstream.backend import Chunk, Load, StepCost
from slipstream.engine.active import ActiveRequest, Phase
from slipstream.engine.admission import Offer, admit_drafts
from slipstream.engine.drafting import Draft, Drafter
from slipstream.engine.fairness import Shares
from slipstream.engine.request import Flow
from slipstream.kv import KVMemory, Sequence
from slipstream.kv.prefix_index import common_length

HEADROOM = 256
"""Generated tokens that admission finds room for; a request that outgrows it competes for memory like the rest."""

_MAX_DRAFTING = 16
"""With more requests in a step, drafts can't pay for the time it takes to look them up."""

_WORTH_WAITING = 16
"""Tokens of a prefix being computed by another request that are worth waiting for rather than computing again."""

_SHARED_STEP = 5
"""How many times as long as the smallest a step with prompts may take if another flow was there lately, which has to
wait for it when it's back. Shorter ones would mostly read weights."""

_LATELY = 10.0
"""Seconds."""

_PROMPTS_EVERY = 8
"""Steps in one of which a flow's prompts go on, though its own answers take all of its share."""


@dataclass(slots=True)
class Work:
    """The next `count` tokens of a request are computed, and a draft of what follows them is verified along.

    If it `chooses` the next tokens, the last of the tokens and each of the draft give a row.
    """

    active: ActiveRequest
    count: int
    chooses: bool
    draft: Draft = field(default_factory=Draft)
    looked_up: bool = False
    """Whether a draft was looked up for it, worth having or not."""
    first: int = 0
    """Its first row in the step."""
    error: Exception | None = None
    """What went wrong while rows were asked for, such as a grammar that met a limit."""
    sequence: Sequence = field(init=False)
    past: int = field(init=False)
    """How many tokens of the request have their KV already."""

    def __post_init__(self) -> None:
        assert self.active.sequence is not None
        self.sequence, self.past = self.active.sequence, self.active.sequence.computed

    @property
    def end(self) -> int:
        """How many have it after the step, without the draft."""
        return self.past + self.count

    @property
    def rows(self) -> int:
        """How many rows the step gives for it."""
        return 1 + len(self.draft.tokens) if self.chooses else 0

    @property
    def marks(self) -> tuple[int, ...]:
        """Lengths at which others are likely to part from it."""
        again = len(self.active.request.prompt) - 1  # where it's answered again
        ends = self.active.message_ends(self.past + 1, min(self.end, again))
        return (*ends, *([again] if self.past < again < self.end else ()))

    def chunk(self) -> Chunk:
        """It as work for the backend."""
        return self.sequence.chunk(self.count, self.rows, self.draft.tokens, self.marks)


class Scheduler:
    """Continuous batching over one KV memory: admits, plans steps, makes room, lets go.

    Oldest first within a flow (see `fairness`), which all requests are of one tenant and one priority. A step takes
    every decoding request, then prompt chunks up to `step_target` seconds; with nothing decoding there is nobody to
    keep waiting, and chunks grow to the largest step. With several flows, a step costs none more than its share: the
    others' requests take turns, their chunks are smaller, prompts of one have a part beside whatever others decode, and
    if memory or places are short, those are set back whose flow has more than its share. Memory is promised for the
    prompt and a little more; when requests outgrow it, the youngest is preempted: it starts again later from what is
    left of its KV, with the same tokens, since results do not depend on how they were computed.

    An answer's last tokens are left uncomputed for `patience` seconds: a conversation that goes on at once, because its
    tool takes no time, has them computed in a step with its new ones, and doesn't have to wait for a step of theirs.
    """

    def __init__(
        self,
        kv: KVMemory,
        cost: StepCost,
        *,
        largest_draft: int | None,
        step_target: float,
        patience: float,
        max_running: int,
    ) -> None:
        self._kv = kv
        self._cost = cost
        self._largest_draft = largest_draft
        self._drafter = Drafter()
        self.step_target = step_target
        self._patience = patience
        self._max_running = max_running
        self.waiting: deque[ActiveRequest] = deque()
        self.running: list[ActiveRequest] = []  # oldest first
        self.preemptions = 0
        self._shares = Shares(cost.largest)
        self._steps = 0
        self._shared_until = 0.0
        """Until when steps are kept short for flows that may come back, a `perf_counter` time."""

    @property
    def idle(self) -> bool:
        """Whether there is nothing to compute."""
        return not self.running and not self.waiting

    def enqueue(self, active: ActiveRequest) -> None:
        """Let a request wait for its start."""
        self._shares.arrive(active, self.waiting)
        self.waiting.append(active)

    def admit(self) -> Iterator[ActiveRequest]:
        """Start waiting requests as long as there is memory for them; yields those that it started.

        Next is the oldest of the flow that had least. One whose prefix another request is just computing waits for
        that, and lets others pass.
        """
        passed: set[ActiveRequest] = set()
        while ready := [active for active in self.waiting if active not in passed]:
            active = self._shares.next_start(ready)
            if self._prefix_under_way(active):
                passed.add(active)
                continue
            if len(self.running) >= self._max_running and not self._make_way(active):
                return
            before = self._take_over(active)
            sequence = self._open(active)
            if sequence is None:
                return
            self.waiting.remove(active)
            self._shares.started(active, sequence.pending + HEADROOM, [*self.waiting, *self.running])
            self.running.append(active)
            sequence.awaited = False  # it came
            active.start(sequence, owed=len(before) if sequence.computed == before.start else 0)
            yield active

    @property
    def due(self) -> float:
        """Until when there is time, since all that is left to do is settling; a `perf_counter` time, 0 for no time."""
        if self.waiting or any(each.phase is not Phase.SETTLING for each in self.running):
            return 0.0
        return min(map(self.settles_at, self.running))

    def settles_at(self, active: ActiveRequest) -> float:
        """When to compute what an answer left to do, if its conversation didn't go on until then."""
        return active.answered_at + self._patience

    def plan(self, now: float) -> list[Work]:
        """The next step, at the `perf_counter` time `now`.

        Empty only when nothing runs, or what runs has its answer and time to settle.
        """
        for active in list(self.running):
            self._make_room(active)
        self._steps += 1
        flows = {each.flow for each in self.running}
        self._shares.plan_for(flows)
        work = [Work(each, each.pending, chooses=True) for each in self.running if each.phase is Phase.DECODE]
        if len(flows) > 1 and len({each.flow for each in self.running if each.phase is not Phase.SETTLING}) > 1:
            self._shared_until = now + _LATELY
            work = self._within_shares(work)
        others = [each for each in self.running if each.phase is not Phase.DECODE]
        due = [each for each in others if each.phase is Phase.PREFILL or self._to_settle(each, now)]
        budget = self._prefill_budget(work, due, now) if due else 0
        work += self._chunks(self._shares.prompts_in_turn(due), budget)
        self._add_drafts(work)
        rows = 0
        for item in work:
            item.active.last_step = self._steps
            item.first, rows = rows, rows + item.rows
        self._charge([item for item in work if item.active.phase is Phase.DECODE])
        return work

    def plan_settling(self) -> list[Work]:
        """A step that computes what answers left to do, without patience; empty when there's nothing left."""
        for active in list(self.running):
            if active.phase is Phase.SETTLING:
                self._make_room(active)
        return self._chunks(filter(self._to_settle, self.running), self._cost.largest)

    def accepted(self, item: Work, chosen: list[int]) -> None:
        """Learn from the tokens that a step brought, those at positions `chosen` by the model, at least one."""
        if item.looked_up:
            self._drafter.learn(item.sequence, item.active.request.tenant, chosen[0], chosen)

    def retire(self, active: ActiveRequest) -> None:
        """Let a request go, and keep its KV for whoever comes next."""
        (self.running if active in self.running else self.waiting).remove(active)
        if active.sequence is not None:
            if active.constraint is not None:
                answer = active.sequence.tokens[len(active.request.prompt) :]
                self._drafter.remember(answer, active.request.tenant)
            self._kv.cache(active.sequence)
            active.sequence = None

    def _to_settle(self, active: ActiveRequest, now: float = math.inf) -> bool:
        """Whether an answer left tokens that no queued step computes, and has waited long enough at `now`."""
        return active.phase is Phase.SETTLING and active.pending > 0 and self.settles_at(active) <= now

    def _prefill_budget(self, work: list[Work], due: list[ActiveRequest], now: float) -> int:
        """How many tokens of prompts a step may compute besides the work of those that decode."""
        past = max(each.sequence.computed for each in due if each.sequence is not None)
        most = self.step_target if work else math.inf
        prompts = [each for each in due if each.phase is Phase.PREFILL]  # what else is due is done, and is a few tokens
        prefilling, decoding = {each.flow for each in prompts}, {item.active.flow for item in work}
        least, load = self._cost.smallest, self._load(work)
        if len(prefilling | decoding) > 1:
            most = min(most, self._seconds_for(work, prompts))
            if others := prefilling - decoding:
                least = max(least, self._part_beside(load, self._shares.ratio(others, decoding)))
            elif self._steps % _PROMPTS_EVERY:
                least = 0  # each flow has its part already
        elif now < self._shared_until:
            most = min(most, _SHARED_STEP * self._cost.seconds(Load(least)))
        return max(self._cost.room_beside(load, most, past), least)

    def _part_beside(self, load: Load, ratio: float) -> int:
        """How many tokens of prompts others compute at least beside this load, even if that fills a step.

        Half of what they have a right to, and what else would be padding.
        """
        size = self._cost.rounded(load.tokens + int(load.tokens * ratio / 2))
        return min(size, self._cost.largest) - load.tokens

    def _charge(self, decoding: list[Work]) -> None:
        """Charge flows for what of their answers goes into the step; prompts are charged as they take turns."""
        tokens: Counter[Flow] = Counter()
        for item in decoding:
            tokens[item.active.flow] += self._cost.chunk(item.count + len(item.draft))
        for flow, count in tokens.items():
            self._shares.computed(flow, count)

    def _within_shares(self, work: list[Work]) -> list[Work]:
        """What of the requests that decode has part in the step, so that it costs no flow more than its share.

        Those that were longest without a step come first. Every flow has one at least; but the priorities of a tenant
        take turns in that beside another tenant, which would have a small share of such a step otherwise.
        """
        if len(work) < 2:
            return work
        most = self._seconds_for(work, [each for each in self.running if each.phase is not Phase.SETTLING])
        if self._cost.seconds(self._load(work)) <= most:
            return work
        waited = sorted(work, key=lambda item: item.active.last_step)
        kept: list[Work] = []
        load, served = Load(), set()
        last: Counter[Flow] = Counter()
        for item in work:
            last[item.active.flow] = max(last[item.active.flow], item.active.last_step)
        for item in self._shares.in_turn(waited, [item.active.flow for item in waited]):
            own, flow = self._load([item]), item.active.flow
            has_turn = flow not in served and self._steps - last[flow] >= self._shares.turns(flow)
            if not kept or has_turn or self._cost.seconds(load + own) <= most:
                kept.append(item)
                served.add(flow)
                load += own
        return kept

    def _seconds_for(self, work: list[Work], due: list[ActiveRequest]) -> float:
        """How long a step may take so that it costs no flow more than its share."""
        chunks = [(item.active.flow, item.count, item.past) for item in work]
        decoding = {item.active for item in work}
        room = dict.fromkeys((each.flow for each in due), self._cost.largest)
        for active in due:
            flow = active.flow
            if active not in decoding and active.sequence is not None and room[flow]:
                count = min(active.pending, room[flow])
                room[flow] -= count
                chunks.append((flow, count, active.sequence.computed))
        return self._shares.seconds_for(chunks, self._cost)

    def _add_drafts(self, work: list[Work]) -> None:
        """Let requests bring drafts, as far as the step gains by it."""
        able = [item for item in work if item.chooses and item.active.request.speculation]
        if not able or len(able) > _MAX_DRAFTING:
            return
        for item in able:
            item.draft, item.looked_up = self._propose(item), True
        offers = [self._offer(item) for item in able]
        lengths = admit_drafts(offers, load=self._load(work), cost=self._cost)
        for item, length in zip(able, lengths, strict=True):
            item.draft = item.draft.cut(length)

    def _offer(self, item: Work) -> Offer:
        """The draft of a request as admission sees it."""
        draft = item.draft
        kept = not draft.tokens or self._kv.keeps_draft(item.sequence, item.count, len(draft), item.marks)
        return Offer(draft.chances, draft.guessed, item.past, item.count, kept)

    def _propose(self, item: Work) -> Draft:
        sequence, active = item.sequence, item.active
        draft = self._drafter.propose(sequence, active.constraint, active.request.tenant, forced=active.jumps_forward)
        room = active.limit - 1 - len(sequence)  # nothing follows the last token that an answer may have
        draft = draft.cut(max(0, room if self._largest_draft is None else min(room, self._largest_draft)))
        fits = self._kv.grow_freely(sequence, len(sequence) + len(draft))  # nothing is evicted for a guess
        return draft if fits else Draft()

    def _open(self, active: ActiveRequest) -> Sequence | None:
        """A sequence for a request, at the cost of others if there's no room without and its flow has a right to it."""
        request = active.request
        room = min(len(active.tokens) + HEADROOM, active.limit)
        while True:
            sequence = self._kv.open(request.tenant, active.tokens, room=room, reuse=request.reuse)
            if sequence is not None or not self._make_way(active):
                return sequence

    def _make_way(self, active: ActiveRequest) -> bool:
        """Let a running request go in favour of one that waits, if that is fair; False if none has to.

        First the oldest answer, whose last tokens are left to whoever goes on.
        """
        settling = (each for each in self.running if each.phase is Phase.SETTLING)
        victim = next(settling, None) or self._shares.to_set_back_for(active, self.running)
        if victim is not None:
            self._preempt(victim)
        return victim is not None

    def _take_over(self, active: ActiveRequest) -> range:
        """Let go the turn before of the same conversation if it has yet to settle: this one computes its last tokens.

        Returns which those are; none if there's no such turn.
        """
        for other in self.running if active.request.reuse else ():
            if other.phase is Phase.SETTLING and other.request.tenant == active.request.tenant:
                assert other.sequence is not None
                if other.sequence.begins(active.tokens[:-1]):
                    last = range(other.sequence.computed, len(other.sequence))
                    self._preempt(other)
                    return last
        return range(0)

    def _prefix_under_way(self, active: ActiveRequest) -> bool:
        """Whether a running request is computing the same prefix, and will soon have much more than memory does."""
        tenant, tokens = active.request.tenant, active.tokens
        if not active.request.reuse:
            return False
        shared = 0
        for other in self.running:
            if other.phase is Phase.PREFILL and other.sequence is not None and other.request.tenant == tenant:
                shared = max(shared, common_length(other.sequence.tokens, tokens[:-1]))
        return shared >= _WORTH_WAITING and shared - self._kv.computed(tenant, tokens[:-1]) >= _WORTH_WAITING

    def _make_room(self, active: ActiveRequest) -> None:
        """Make room for what the request computes next, at the cost of younger ones and of flows that have more than
        their share; or it has to go itself."""
        while active.sequence is not None and not self._kv.grow(active.sequence, len(active.sequence)):
            self._preempt(self._shares.youngest_of_largest(self.running))

    def _preempt(self, active: ActiveRequest) -> None:
        if active.phase is Phase.SETTLING:  # it has its answer; its last tokens are left to whoever goes on
            active.phase = Phase.DONE
            self.retire(active)
            return
        self.preemptions += 1
        self.running.remove(active)
        self._kv.cache(active.suspend())
        self.waiting.appendleft(active)

    def _chunks(self, requests: Iterable[ActiveRequest], budget: int) -> list[Work]:
        """What they have yet to compute, up to so many tokens."""
        work: list[Work] = []
        for active in requests:
            if budget < self._cost.chunk(1):
                break
            count = min(active.pending, budget)
            budget -= self._cost.chunk(count)
            self._shares.computed(active.flow, self._cost.chunk(count))
            last = count == active.pending and active.phase is Phase.PREFILL
            work.append(Work(active, count, chooses=last))
        return work

    def _load(self, work: list[Work]) -> Load:
        """What a step has to compute, without drafts."""
        return self._cost.load((item.count, item.past) for item in work)
