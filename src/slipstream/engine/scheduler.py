"""Which tokens of which generation go into the next step. Knows no model, so most of it is tested without one."""

from collections import deque
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field

from slipstream.engine.admission import Offer, admit_drafts
from slipstream.engine.drafting import Draft, Drafter
from slipstream.engine.generation import Generation, Phase
from slipstream.engine.step_cost import Load, StepCost
from slipstream.kv import KVMemory, Sequence
from slipstream.kv.prefix_index import common_length

HEADROOM = 256
"""Generated tokens that admission finds room for; a generation that outgrows it competes for memory like the rest."""

_MAX_DRAFTING = 16
"""With more generations in a step, drafts can't pay for the time it takes to look them up."""

_WORTH_WAITING = 16
"""Tokens of a prefix being computed by another generation that are worth waiting for rather than computing again."""


@dataclass(slots=True)
class Work:
    """The next `count` tokens of a generation are computed, and a draft of what follows them is verified along.

    With `logits`, the last of the tokens and each of the draft yield a row.
    """

    generation: Generation
    count: int
    logits: bool
    draft: Draft = field(default_factory=Draft)

    @property
    def past(self) -> int:
        """How many tokens of the generation have their KV already."""
        assert self.generation.sequence is not None
        return self.generation.sequence.computed

    @property
    def logit_rows(self) -> int:
        """How many rows of logits the step gives for it."""
        return 1 + len(self.draft) if self.logits else 0


class Scheduler:
    """Continuous batching over one KV memory: admits, plans steps, makes room, lets go.

    Oldest first throughout. A step takes every decoding generation, then prompt chunks up to `step_target` seconds;
    with nothing decoding there is nobody to keep waiting, and chunks grow to the largest step. Memory is promised for
    the prompt and a little more; when generations outgrow it, the youngest is preempted: it starts again later from
    what is left of its KV, with the same tokens, since results do not depend on how they were computed.

    An answer's last tokens are left uncomputed for `patience` seconds: a conversation that goes on at once, because its
    tool takes no time, has them computed in a step with its new ones, and doesn't have to wait for a step of theirs.
    """

    def __init__(
        self,
        kv: KVMemory,
        cost: StepCost,
        *,
        step_target: float,
        patience: float,
        max_running: int,
        max_waiting: int,
    ) -> None:
        self._kv = kv
        self._cost = cost
        self._drafter = Drafter()
        self._step_target = step_target
        self._patience = patience
        self._max_running = max_running
        self.max_waiting = max_waiting
        self.waiting: deque[Generation] = deque()
        self.running: list[Generation] = []  # oldest first
        self.preemptions = 0

    @property
    def idle(self) -> bool:
        """Whether there is nothing to compute."""
        return not self.running and not self.waiting

    def admit(self) -> Iterator[Generation]:
        """Start waiting generations, oldest first, as long as there is memory for them; yields those that it started.

        One whose prefix another generation is just computing waits for that, and lets others pass.
        """
        for generation in list(self.waiting):
            if len(self.running) >= self._max_running and not self._give_up_settling():
                return
            if self._prefix_under_way(generation):
                continue
            before = self._take_over(generation)
            sequence = self._open(generation)
            if sequence is None:
                return
            self.waiting.remove(generation)
            self.running.append(generation)
            generation.start(sequence, owed=len(before) if sequence.computed == before.start else 0)
            yield generation

    @property
    def due(self) -> float:
        """Until when there is time, since all that is left to do is settling; a `perf_counter` time, 0 for no time."""
        if self.waiting or any(each.phase is not Phase.SETTLING for each in self.running):
            return 0.0
        return min(map(self.settles_at, self.running))

    def settles_at(self, generation: Generation) -> float:
        """When to compute what an answer left to do, if its conversation didn't go on until then."""
        return generation.answered_at + self._patience

    def plan(self, prepared: Collection[int], now: float) -> list[Work]:
        """The next step, with the sizes that the backend has `prepared`, at the `perf_counter` time `now`.

        Empty only when nothing runs, or what runs has its answer and time to settle.
        """
        for generation in list(self.running):
            self._make_room(generation)
        work = [Work(each, each.pending, logits=True) for each in self.running if each.phase is Phase.DECODE]
        due = [each for each in self.running if each.phase is Phase.PREFILL or self._settles_by(each, now)]
        work += _pieces(due, self._prefill_budget(_load(work).tokens))
        self._add_drafts(work, prepared)
        return work

    def plan_settling(self) -> list[Work]:
        """A step that computes what answers left to do, without patience; empty when there's nothing left."""
        for generation in list(self.running):
            if generation.phase is Phase.SETTLING:
                self._make_room(generation)
        return _pieces([each for each in self.running if each.phase is Phase.SETTLING], self._cost.largest)

    def accepted(self, generation: Generation, start: int, chosen: Collection[int]) -> None:
        """Learn from the tokens of a generation from `start` on, those at positions `chosen` by the model."""
        if generation.request.speculation and generation.sequence is not None:
            self._drafter.learn(generation.sequence, generation.request.tenant, start, chosen)

    def retire(self, generation: Generation) -> None:
        """Let a running generation go, and keep its KV for whoever comes next."""
        self.running.remove(generation)
        if generation.sequence is not None:
            if generation.constraint is not None:
                self._drafter.remember(generation.answer, generation.request.tenant)
            self._kv.retain(generation.sequence)
            generation.sequence = None

    def _settles_by(self, generation: Generation, now: float) -> bool:
        return generation.phase is Phase.SETTLING and self.settles_at(generation) <= now

    def _prefill_budget(self, decoding: int) -> int:
        if not decoding:
            return self._cost.largest
        past = max((each.sequence.computed for each in self.running if each.sequence is not None), default=0)
        return max(self._cost.largest_within(self._step_target, past) - decoding, self._cost.smallest)

    def _add_drafts(self, work: list[Work], prepared: Collection[int]) -> None:
        """Let generations bring drafts, as far as the step gains by it."""
        able = [item for item in work if item.logits and item.generation.request.speculation]
        if not able or len(able) > _MAX_DRAFTING:
            return
        for item in able:
            item.draft = self._propose(item.generation)
        offers = [Offer(item.draft.chances, item.draft.guessed, item.past, item.count) for item in able]
        lengths = admit_drafts(offers, load=_load(work), cost=self._cost, prepared=prepared)
        for item, length in zip(able, lengths, strict=True):
            item.draft = item.draft.cut(length)

    def _propose(self, generation: Generation) -> Draft:
        sequence, request = generation.sequence, generation.request
        assert sequence is not None
        draft = self._drafter.propose(sequence, generation.constraint, request.tenant, forced=generation.jumps_forward)
        # Nothing is evicted for a guess, and the last token that an answer may have needs none: nothing follows it.
        room = min(generation.limit - 1, sequence.capacity + self._kv.free - 1) - len(sequence)
        draft = draft.cut(max(0, room if self._cost.largest_draft is None else min(room, self._cost.largest_draft)))
        self._kv.grow(sequence, len(sequence) + len(draft) + 1)
        return draft

    def _open(self, generation: Generation) -> Sequence | None:
        """A sequence for a generation, at the cost of what others have yet to settle if there's no room without."""
        request = generation.request
        room = min(len(generation.tokens) + HEADROOM, generation.limit) + 1
        while True:
            sequence = self._kv.open(request.tenant, generation.tokens, room=room, reuse=request.reuse)
            if sequence is not None or not self._give_up_settling():
                return sequence

    def _give_up_settling(self) -> bool:
        """Leave the last tokens of the oldest answer to whoever goes on; False if all have their KV."""
        for generation in self.running:
            if generation.phase is Phase.SETTLING:
                self._preempt(generation)
                return True
        return False

    def _take_over(self, generation: Generation) -> range:
        """Let go the turn before of the same conversation if it has yet to settle: this one computes its last tokens.

        Returns which those are; none if there's no such turn.
        """
        for other in self.running:
            if other.phase is Phase.SETTLING and self._goes_on_from(other, generation):
                assert other.sequence is not None
                last = range(other.sequence.computed, len(other.sequence))
                self._preempt(other)
                return last
        return range(0)

    @staticmethod
    def _goes_on_from(other: Generation, generation: Generation) -> bool:
        """Whether a generation's prompt goes on where another one ended, and may use its KV."""
        if other.sequence is None or other.request.tenant != generation.request.tenant or not generation.request.reuse:
            return False
        return common_length(other.sequence.tokens, generation.tokens[:-1]) == len(other.sequence)

    def _prefix_under_way(self, generation: Generation) -> bool:
        """Whether a running generation is computing the same prefix, and will soon have much more than memory does."""
        tenant, tokens = generation.request.tenant, generation.tokens
        if not generation.request.reuse:
            return False
        shared = 0
        for other in self.running:
            if other.phase is Phase.PREFILL and other.sequence is not None and other.request.tenant == tenant:
                shared = max(shared, common_length(other.sequence.tokens, tokens[:-1]))
        return shared >= _WORTH_WAITING and shared - self._kv.available(tenant, tokens) >= _WORTH_WAITING

    def _make_room(self, generation: Generation) -> None:
        """Make room for what the generation computes next, at the cost of younger ones, or it has to go itself."""
        while generation.sequence is not None and not self._kv.grow(generation.sequence, len(generation.sequence) + 1):
            self._preempt(self.running[-1])

    def _preempt(self, generation: Generation) -> None:
        if generation.phase is Phase.SETTLING:  # it has its answer; its last tokens are left to whoever goes on
            generation.phase = Phase.DONE
            self.retire(generation)
            return
        self.preemptions += 1
        self.running.remove(generation)
        self._kv.retain(generation.suspend())
        self.waiting.appendleft(generation)


def _pieces(generations: Iterable[Generation], budget: int) -> list[Work]:
    """What they have yet to compute, up to so many tokens."""
    work = []
    for generation in generations:
        if budget > 1:  # a lone token takes two
            count = min(generation.pending, budget)
            budget -= max(2, count)
            last = count == generation.pending and generation.phase is Phase.PREFILL
            work.append(Work(generation, count, logits=last))
    return work


def _load(work: list[Work]) -> Load:
    """What a step has to compute, without drafts."""
    return Load.of((item.count, item.past) for item in work)
