"""How requests share one engine: by flows, each of a tenant and a priority, in proportion to their weights.

A tenant's weight says how much of the machine is its share when it is short; its flows divide that by priority. Any
flow has a share, however small, so none starves. What a flow does not use, the others have.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Collection, Iterable, Iterator, Sequence, Set
from typing import TypeVar

from slipstream.backend import StepCost
from slipstream.engine.active import ActiveRequest
from slipstream.engine.request import Flow
from slipstream.recent import Recent

_PER_LEVEL = 2.0
"""How much more of its tenant's share a priority has than the one below."""
_REMEMBERED = 4096
"""Flows whose times are kept while they have nothing to do."""
_COMPUTING = 0.8
"""How much of a flow's share its steps may take. The rest goes to the step that was under way when it came, and to what
the machine does between steps."""

T = TypeVar("T")


class VirtualTimes:
    """How much each flow has had, by its weight: the one that had least is next (start-time fair queuing).

    Who had nothing to do for a while does not make up for it: it begins where the others are.
    """

    def __init__(self) -> None:
        self._times: Recent[Flow, float] = Recent(_REMEMBERED)
        self._latest = 0.0

    def arrive(self, flow: Flow, others: Collection[Flow], ahead: float = 0.0) -> None:
        """A flow has something to do again, beside others that have; it begins so much ahead of the last of these."""
        self._times[flow] = max(self._times.pop(flow, 0.0), self.least(others) + ahead)

    def least(self, flows: Iterable[Flow]) -> float:
        """What the one of these flows had that had least; of none, what the one of all had that had most."""
        return min(map(self.__getitem__, flows), default=self._latest)

    def charge(self, flow: Flow, amount: float) -> None:
        """A flow had so much, divided by its weight."""
        self._times[flow] = self._times.pop(flow, 0.0) + amount  # the last to be forgotten
        self._latest = max(self._latest, self._times[flow])

    def __getitem__(self, flow: Flow) -> float:
        return self._times.get(flow, 0.0)


class Shares:
    """The shares of the flows that have requests, as of the requests given each time."""

    def __init__(self, largest: int = 512) -> None:
        self._largest = largest
        """Tokens of the largest step."""
        self._weights: dict[str, float] = {}
        self._starts = VirtualTimes()
        """By the tokens of requests that were started."""
        self._computed = VirtualTimes()
        """By the tokens that steps computed."""
        self._present: dict[Flow, float] = {}
        """The flows that the next step is planned for, and their weights."""
        self._total = 1.0
        """Of these weights."""
        self._fair = 0.0
        """What each would have of `_computed` if every step were divided by the weights."""
        self._prefilling: Set[Flow] = set()
        """The flows that had prompts to compute in the last step."""

    def arrive(self, active: ActiveRequest, waiting: Iterable[ActiveRequest]) -> None:
        """A request came, and waits for its start beside others."""
        flow = active.flow
        if active.request.tenant not in self._weights and len(self._weights) > _REMEMBERED:
            self._weights.clear()
        self._weights[active.request.tenant] = active.request.weight
        others = {other.flow for other in waiting}
        if flow not in others:
            self._starts.arrive(flow, others)

    def weights(self, flows: Iterable[Flow]) -> dict[Flow, float]:
        """What each of these flows has a right to, in proportion."""
        present = set(flows)
        levels: defaultdict[str, float] = defaultdict(float)
        for flow in present:
            levels[flow.tenant] += _PER_LEVEL**flow.priority
        return {
            flow: self._weights.get(flow.tenant, 1.0) * _PER_LEVEL**flow.priority / levels[flow.tenant]
            for flow in present
        }

    def ratio(self, flows: Set[Flow], others: Set[Flow]) -> float:
        """How much these flows have a right to for each piece of others; 0 if there are no others."""
        weights = self.weights(flows | others)
        return sum(weights[each] for each in flows) / sum(weights[each] for each in others) if others else 0.0

    def turns(self, flow: Flow) -> float:
        """In one of how many steps a flow has a part at least, if the flows of each tenant have one together."""
        tenants = {each.tenant for each in self._present}
        return self._weights.get(flow.tenant, 1.0) / self._present[flow] if len(tenants) > 1 else 1.0

    def next_start(self, waiting: Sequence[ActiveRequest]) -> ActiveRequest:
        """Which of the waiting requests to start first: the oldest of the flow that had least."""
        heads: dict[Flow, ActiveRequest] = {}
        for active in waiting:
            heads.setdefault(active.flow, active)
        return heads[min(heads, key=lambda flow: self._starts[flow])] if len(heads) > 1 else waiting[0]

    def started(self, active: ActiveRequest, tokens: int, present: Iterable[ActiveRequest]) -> None:
        """A request of so many tokens was started, of those that are present."""
        flow = active.flow
        self._starts.charge(flow, tokens / self.weights([flow, *(other.flow for other in present)])[flow])

    def plan_for(self, flows: Set[Flow]) -> None:
        """A step is planned for requests of these flows."""
        if flows != self._present.keys():
            self._present = self.weights(flows)
            self._total = sum(self._present.values())

    def computed(self, flow: Flow, tokens: int) -> None:
        """So many tokens of a flow are in the next step."""
        self._computed.charge(flow, tokens / self._present.get(flow, 1.0))
        self._fair += tokens / self._total

    def prompts_in_turn(self, prefilling: Iterable[ActiveRequest]) -> Iterator[ActiveRequest]:
        """Requests with prompts to compute, oldest first in a flow; what goes into the step is to be said each time.

        The flow that has least to compute is first: so it has its share of a step whose time it determines. Only if it
        had a whole step more than it has a right to beside another one it's not. One that comes, and had little so far,
        begins up to half a step ahead of those that had less than their share: else these would wait for ever while
        new ones come.
        """
        queues: defaultdict[Flow, deque[ActiveRequest]] = defaultdict(deque)
        left: Counter[Flow] = Counter()
        for active in prefilling:
            queues[active.flow].append(active)
            left[active.flow] += active.pending
        before = queues.keys() & self._prefilling
        least = self._computed.least(before)
        self._fair = max(self._fair, least)
        for flow in queues.keys() - before:
            self._computed.arrive(flow, before, min(self._fair - least, self._step(flow) / 2))
        self._prefilling = set(queues)

        def place(flow: Flow) -> tuple[bool, float, float]:
            ahead = self._computed[flow] - least
            return ahead >= self._step(flow), min(left[flow], self._largest) / self._present[flow], ahead

        while queues:
            least = self._computed.least(queues)
            flow = min(queues, key=place)
            active = queues[flow].popleft()
            left[flow] -= active.pending
            yield active
            if not queues[flow]:
                del queues[flow]

    def _step(self, flow: Flow) -> float:
        """The tokens of the largest step, by the weight of a flow's tenant."""
        return self._largest / self._weights.get(flow.tenant, 1.0)

    def youngest_of_largest(self, running: Sequence[ActiveRequest]) -> ActiveRequest:
        """The request to set back first: the youngest of the flow that has most requests for its weight."""
        counts = Counter(each.flow for each in running)
        if len(counts) == 1:
            return running[-1]
        weights = self.weights(counts)
        load = {flow: count / weights[flow] for flow, count in counts.items()}
        return max(reversed(running), key=lambda active: load[active.flow])  # the first of several largest

    def to_set_back_for(self, active: ActiveRequest, running: Sequence[ActiveRequest]) -> ActiveRequest | None:
        """A running request whose flow still has no less than its share without it, when `active` runs in its place."""
        counts = Counter(each.flow for each in running)
        own = active.flow
        if not counts or set(counts) == {own}:
            return None
        weights = self.weights([own, *counts])
        victim = self.youngest_of_largest(running)
        other = victim.flow
        fair = other != own and (counts[own] + 1) / weights[own] <= (counts[other] - 1) / weights[other]
        return victim if fair else None

    def seconds_for(self, chunks: Iterable[tuple[Flow, int, int]], cost: StepCost) -> float:
        """How long a step may take so that it costs no flow more than its share: what its chunks take alone, by that.

        All chunks of one flow may be in it: to leave some out for a small share of another would cost it more.
        Each of the chunks is of a flow, has so many tokens, and comes after so many computed ones.
        """
        of_flow: dict[Flow, list[tuple[int, int]]] = {}
        for flow, count, past in chunks:
            of_flow.setdefault(flow, []).append((count, past))
        weights = self.weights(of_flow)
        total = _COMPUTING * sum(weights.values())
        return min(
            cost.seconds(cost.load(each), again=True) * max(1.0, total / weights[flow])
            for flow, each in of_flow.items()
        )

    def in_turn(self, items: Sequence[T], flows: Sequence[Flow]) -> list[T]:
        """Items of flows, one of each flow after the other, in proportion to the weights."""
        weights = self.weights(flows)
        taken: Counter[Flow] = Counter()
        places = []
        for number, flow in enumerate(flows):
            taken[flow] += 1
            places.append((taken[flow] / weights[flow], number))
        return [items[number] for _, number in sorted(places)]
