"""Which tokens of which generation go into the next step. Knows no model, so most of it is tested without one."""

from collections import deque
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field

from slipstream.backend import Chunk, Load, StepCost
from slipstream.engine.admission import Offer, admit_drafts
from slipstream.engine.drafting import Draft, Drafter
from slipstream.engine.generation import Generation, Phase
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

    If it `chooses` the next tokens, the last of the tokens and each of the draft give a row.
    """

    generation: Generation
    count: int
    chooses: bool
    draft: Draft = field(default_factory=Draft)
    looked_up: bool = False
    """Whether a draft was looked up for it, worth having or not."""

    @property
    def past(self) -> int:
        """How many tokens of the generation have their KV already."""
        assert self.generation.sequence is not None
        return self.generation.sequence.computed

    @property
    def rows(self) -> int:
        """How many rows the step gives for it."""
        return 1 + len(self.draft) if self.chooses else 0

    def chunk(self) -> Chunk:
        """It as work for the backend."""
        assert self.generation.sequence is not None
        return self.generation.sequence.chunk(self.count, self.rows, self.draft.tokens)


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
        largest_draft: int | None,
        step_target: float,
        patience: float,
        max_running: int,
    ) -> None:
        self._kv = kv
        self._cost = cost
        self._largest_draft = largest_draft
        self._drafter = Drafter()
        self._step_target = step_target
        self._patience = patience
        self._max_running = max_running
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

    def plan(self, now: float) -> list[Work]:
        """The next step, at the `perf_counter` time `now`.

        Empty only when nothing runs, or what runs has its answer and time to settle.
        """
        for generation in list(self.running):
            self._make_room(generation)
        work = [Work(each, each.pending, chooses=True) for each in self.running if each.phase is Phase.DECODE]
        due = [each for each in self.running if each.phase is Phase.PREFILL or self._settles_by(each, now)]
        work += self._chunks(due, self._prefill_budget(self._load(work).tokens))
        self._add_drafts(work)
        return work

    def plan_settling(self) -> list[Work]:
        """A step that computes what answers left to do, without patience; empty when there's nothing left."""
        for generation in list(self.running):
            if generation.phase is Phase.SETTLING:
                self._make_room(generation)
        return self._chunks([each for each in self.running if each.phase is Phase.SETTLING], self._cost.largest)

    def accepted(self, item: Work, chosen: Collection[int]) -> None:
        """Learn from the tokens that a step brought, those at positions `chosen` by the model."""
        generation = item.generation
        if item.looked_up and generation.sequence is not None:
            start = len(generation.request.prompt) + generation.counters.completion_tokens
            self._drafter.learn(generation.sequence, generation.request.tenant, min(chosen, default=start), chosen)

    def retire(self, generation: Generation) -> None:
        """Let a running generation go, and keep its KV for whoever comes next."""
        self.running.remove(generation)
        if generation.sequence is not None:
            if generation.constraint is not None:
                self._drafter.remember(generation.answer, generation.request.tenant)
            self._kv.cache(generation.sequence)
            generation.sequence = None

    def _settles_by(self, generation: Generation, now: float) -> bool:
        return generation.phase is Phase.SETTLING and self.settles_at(generation) <= now

    def _prefill_budget(self, decoding: int) -> int:
        if not decoding:
            return self._cost.largest
        past = max((each.sequence.computed for each in self.running if each.sequence is not None), default=0)
        return max(self._cost.largest_within(self._step_target, past) - decoding, self._cost.smallest)

    def _add_drafts(self, work: list[Work]) -> None:
        """Let generations bring drafts, as far as the step gains by it."""
        able = [item for item in work if item.chooses and item.generation.request.speculation]
        if not able or len(able) > _MAX_DRAFTING:
            return
        for item in able:
            item.draft, item.looked_up = self._propose(item.generation), True
        offers = [Offer(item.draft.chances, item.draft.guessed, item.past, item.count) for item in able]
        lengths = admit_drafts(offers, load=self._load(work), cost=self._cost)
        for item, length in zip(able, lengths, strict=True):
            item.draft = item.draft.cut(length)

    def _propose(self, generation: Generation) -> Draft:
        sequence, request = generation.sequence, generation.request
        assert sequence is not None
        draft = self._drafter.propose(sequence, generation.constraint, request.tenant, forced=generation.jumps_forward)
        room = generation.limit - 1 - len(sequence)  # nothing follows the last token that an answer may have
        draft = draft.cut(max(0, room if self._largest_draft is None else min(room, self._largest_draft)))
        fits = self._kv.grow_freely(sequence, len(sequence) + len(draft))  # nothing is evicted for a guess
        return draft if fits else Draft()

    def _open(self, generation: Generation) -> Sequence | None:
        """A sequence for a generation, at the cost of what others have yet to settle if there's no room without."""
        request = generation.request
        room = min(len(generation.tokens) + HEADROOM, generation.limit)
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
        while generation.sequence is not None and not self._kv.grow(generation.sequence, len(generation.sequence)):
            self._preempt(self.running[-1])

    def _preempt(self, generation: Generation) -> None:
        if generation.phase is Phase.SETTLING:  # it has its answer; its last tokens are left to whoever goes on
            generation.phase = Phase.DONE
            self.retire(generation)
            return
        self.preemptions += 1
        self.running.remove(generation)
        self._kv.cache(generation.suspend())
        self.waiting.appendleft(generation)

    def _chunks(self, generations: Iterable[Generation], budget: int) -> list[Work]:
        """What they have yet to compute, up to so many tokens."""
        work = []
        for generation in generations:
            if budget >= self._cost.chunk(1):
                count = min(generation.pending, budget)
                budget -= self._cost.chunk(count)
                last = count == generation.pending and generation.phase is Phase.PREFILL
                work.append(Work(generation, count, chooses=last))
        return work

    def _load(self, work: list[Work]) -> Load:
        """What a step has to compute, without drafts."""
        return self._cost.load((item.count, item.past) for item in work)
