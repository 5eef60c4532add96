"""Which cached sequence is given up first: by likelihood of return, and among equals the least recently used.

It's GreedyDual (Young, 1994), of which least-recently-used is the case of equal worth: a sequence that is used gets a
value, its worth above the *level*, which is the value of what was evicted last; the least value goes first. So what is
worth more outlives what is worth less, but not for ever: the level rises past whatever never comes back.

The cost of computing again, which per token grows with the context, is left out: long conversations kept for it push
out more short ones, and more is computed again: see docs/measurements.md.
"""

AWAITED = 4.0
"""The worth of a conversation whose tools are running; one that waits for a person, or for nobody, has 1.

With 16, a little less is computed again, but conversations that were abandoned are kept longer."""


def value_of(level: float, *, awaited: bool) -> float:
    """The value of a sequence that is used when whatever was evicted last had the value `level`."""
    return level + (AWAITED if awaited else 1.0)
