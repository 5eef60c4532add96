"""How requests share one engine: by flows, each of a tenant and a priority, in proportion to their weights.

A tenant's weight says how much of the machine is its share when it is short; its flows divide that by priority. Any
flow has a share, however small, so none starves. What a flow does not use, the others have.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple, TypeVar

from slipstream.backend import StepCost
from slipstream.engine.active import ActiveRequest

_PER_LEVEL = 2.0
"""How much more of its tenant's share a priority has than the one below."""
_REMEMBERED = 4096
"""Flows whose times are kept while they have nothing to do."""

T = TypeVar("T")


class Flow(NamedTuple):
    """Requests that are served in the order in which they come."""

    tenant: str
    priority: int


def flow_of(active: ActiveRequest) -> Flow:
    """The flow that a request belongs to."""
    return Flow(active.request.tenant, active.request.priority)


class VirtualTimes:
    """How much each flow has had, by its weight: the one that had least is next (start-time fair queuing).

    Who had nothing to do for a while does not make up for it: it begins where the others are.
    """

    def __init__(self) -> None:
        self._times: dict[Flow, float] = {}

    def arrive(self, flow: Flow, others: Collection[Flow]) -> None:
        """A flow has something to do again, beside others that have."""
        now = min((self._times.get(other, 0.0) for other in others), default=0.0)
        self._times[flow] = max(self._times.pop(flow, 0.0), now)
        if len(self._times) > _REMEMBERED:
            del self._times[next(iter(self._times))]

    def charge(self, flow: Flow, amount: float) -> None:
        """A flow had so much, divided by its weight."""
        self._times[flow] = self._times.get(flow, 0.0) + amount

    def __getitem__(self, flow: Flow) -> float:
        return self._times.get(flow, 0.0)


class Shares:
    """The shares of the flows that have requests, as of the requests given each time."""

    def __init__(self) -> None:
        self._weights: dict[str, float] = {}
        self.starts = VirtualTimes()
        """By the tokens of requests that were started."""
        self.prefills = VirtualTimes()
        """By the tokens of prompts that were computed."""

    def arrive(self, active: ActiveRequest, others: Iterable[ActiveRequest]) -> None:
        """A request came, beside others that have something to compute."""
        flow, flows = flow_of(active), set(map(flow_of, others))
        if active.request.tenant not in self._weights and len(self._weights) > _REMEMBERED:
            self._weights.clear()
        self._weights[active.request.tenant] = active.request.weight
        if flow not in flows:
            self.starts.arrive(flow, flows)
            self.prefills.arrive(flow, flows)

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

    def next_start(self, waiting: Sequence[ActiveRequest]) -> ActiveRequest:
        """Which of the waiting requests to start first: the oldest of the flow that had least."""
        heads: dict[Flow, ActiveRequest] = {}
        for active in waiting:
            heads.setdefault(flow_of(active), active)
        return heads[min(heads, key=lambda flow: self.starts[flow])] if len(heads) > 1 else waiting[0]

    def started(self, active: ActiveRequest, tokens: int, present: Iterable[ActiveRequest]) -> None:
        """A request of so many tokens was started, of those that are present."""
        flow = flow_of(active)
        self.starts.charge(flow, tokens / self.weights([flow, *map(flow_of, present)])[flow])

    def youngest_of_largest(self, running: Sequence[ActiveRequest]) -> ActiveRequest:
        """The request to set back first: the youngest of the flow that has most requests for its weight."""
        counts = Counter(map(flow_of, running))
        if len(counts) == 1:
            return running[-1]
        weights = self.weights(counts)
        load = {flow: count / weights[flow] for flow, count in counts.items()}
        return max(reversed(running), key=lambda active: load[flow_of(active)])  # the first of several largest

    def to_set_back_for(self, active: ActiveRequest, running: Sequence[ActiveRequest]) -> ActiveRequest | None:
        """A running request whose flow still has no less than its share without it, when `active` runs in its place."""
        counts = Counter(map(flow_of, running))
        own = flow_of(active)
        if not counts or set(counts) == {own}:
            return None
        weights = self.weights([own, *counts])
        victim = self.youngest_of_largest(running)
        other = flow_of(victim)
        fair = other != own and (counts[own] + 1) / weights[own] <= (counts[other] - 1) / weights[other]
        return victim if fair else None

    def seconds_for(self, chunks: Iterable[tuple[Flow, int, int]], cost: StepCost) -> float:
        """How long a step may take so that it costs no flow more than its share: what its chunks take alone, by that.

        Each of the chunks is of a flow, has so many tokens, and comes after so many computed ones.
        """
        of_flow: dict[Flow, list[tuple[int, int]]] = {}
        for flow, count, past in chunks:
            of_flow.setdefault(flow, []).append((count, past))
        weights = self.weights(of_flow)
        total = sum(weights.values())
        return min(cost.seconds(cost.load(each), again=True) * total / weights[flow] for flow, each in of_flow.items())

    def in_turn(self, items: Sequence[T], flows: Sequence[Flow]) -> list[T]:
        """Items of flows, one of each flow after the other, in proportion to the weights."""
        weights = self.weights(flows)
        taken: Counter[Flow] = Counter()
        places = []
        for number, flow in enumerate(flows):
            taken[flow] += 1
            places.append((taken[flow] / weights[flow], number))
        return [items[number] for _, number in sorted(places)]
