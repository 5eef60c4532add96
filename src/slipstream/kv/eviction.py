"""Which cached sequence is given up first: by likelihood of return, and among equals the least recently used.

It's GreedyDual (Young, 1994), of which least-recently-used is the case of equal worth: a sequence that is used gets a
value, its worth above the *level*, which is the value of what was evicted last; the least value goes first. So what is
worth more outlives what is worth less, but not for ever: the level rises past whatever never comes back.

The cost of computing again, which per token grows with the context, is left out: long conversations kept for it push
out more short ones, and more is computed again: see docs/measurements.md.
"""

from collections.abc import Iterator
from itertools import chain

from slipstream.kv.sequence import Sequence

AWAITED = 4.0
"""The worth of a conversation whose tools are running; one that waits for a person, or for nobody, has 1.

With 16, a little less is computed again, but conversations that were abandoned are kept longer."""


class Cached:
    """Cached sequences, and which of them goes first.

    Those of one worth stand in the order in which they were used. The level only rises, so that's the order of their
    values too, and the least of all is first among its like: nothing looks through them.
    """

    def __init__(self) -> None:
        self._level = 0.0
        self._others: dict[Sequence, float] = {}
        self._awaited: dict[Sequence, float] = {}

    def __len__(self) -> int:
        return len(self._others) + len(self._awaited)

    def __contains__(self, sequence: object) -> bool:
        return sequence in self._others or sequence in self._awaited

    def __iter__(self) -> Iterator[Sequence]:
        return chain(self._others, self._awaited)

    def use(self, sequence: Sequence) -> None:
        """Count a sequence, cached or about to be, as used now."""
        self.discard(sequence)
        queue, worth = (self._awaited, AWAITED) if sequence.awaited else (self._others, 1.0)
        queue[sequence] = self._level + worth

    def discard(self, sequence: Sequence) -> None:
        """Have a sequence here no more, if it is."""
        self._others.pop(sequence, None)
        self._awaited.pop(sequence, None)

    def take_least(self, spare: Sequence | None = None) -> Sequence | None:
        """Take out what is to be evicted: the sequence of least value, but not `spare`; None if there's no other."""
        queues = self._others, self._awaited
        first = [next((each for each in queue.items() if each[0] is not spare), None) for queue in queues]
        found = min(filter(None, first), key=lambda each: each[1], default=None)
        if found is None:
            return None
        victim, value = found
        self._level = max(self._level, value)
        self.discard(victim)
        return victim
