"""How many draft tokens each request may bring to a step.

A token that comes true has to be computed some time anyway, so it costs nothing here. What a step costs besides, its
overhead, is shared by the free tokens that it brings: those that are sampled, and the guesses that come true. Tokens
that the grammar forces need no step of their own, with or without a draft.

On a model with recurrent states a step writes one after each token of a draft, so that what is rejected is taken back
at once. Where memory is too short for that, what came true of a rejected draft is computed again. Both are overhead.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from slipstream.backend import Load, StepCost


@dataclass(frozen=True, slots=True)
class Offer:
    """A draft that a request could bring to a step."""

    chances: Sequence[float]
    """Of each token to come true, falling."""
    guessed: Sequence[bool]
    """Whether a token was looked up, not forced by the grammar."""
    past: int
    """Tokens of the request that have their KV."""
    count: int
    """Tokens that it brings to the step in any case."""
    kept: bool = True
    """Whether the draft can be taken back to any of its tokens; if not, to before the step."""


def admit_drafts(offers: Sequence[Offer], *, load: Load, cost: StepCost) -> list[int]:
    """Draft lengths that are worth what they add to a step.

    `load` is the step without drafts. What a free token is worth is what the best step that only decodes pays for
    one: so a prompt that is computed in the same step, however long it takes, makes no draft look cheap.
    """
    lone = [replace(offer, count=1) for offer in offers]
    decoding = cost.load((offer.count, offer.past) for offer in lone)
    options = list(_options(lone, decoding, cost))
    worth = min(option.overhead / option.free for option in options)
    if load != decoding or lone != list(offers):
        options = list(_options(offers, load, cost))
    return max(options, key=lambda option: worth * option.free - option.overhead).lengths


@dataclass(frozen=True, slots=True)
class _Option:
    lengths: list[int]
    overhead: float
    """Seconds that the step takes beyond what tokens cost that are sure to be needed or will probably come true."""
    free: float
    """Tokens, expected, that would otherwise want steps of their own."""


def _options(offers: Sequence[Offer], load: Load, cost: StepCost) -> Iterator[_Option]:
    """For each step size that was measured, the likeliest tokens that fill it."""
    lengths = [0] * len(offers)
    free, useful, again = float(len(offers)), 0.0, 0.0
    yield _Option(list(lengths), cost.seconds(load), free)
    ranked = sorted(
        (
            (chance, -position, owner)
            for owner, offer in enumerate(offers)
            for position, chance in enumerate(offer.chances)
        ),
        reverse=True,
    )
    seconds = [cost.token(offer.past) for offer in offers]
    full, largest = cost.rounded(load.tokens), cost.largest
    for rank, (chance, position, owner) in enumerate(ranked):
        offer = offers[owner]
        before = offer.count + lengths[owner]
        load = cost.longer(load, before, offer.past, kept=offer.kept)
        if load.tokens > full:
            full = cost.rounded(load.tokens)
        if full > largest:
            return  # a step that nobody has prepared
        if not offer.kept:
            rejected = (offer.chances[lengths[owner] - 1] if lengths[owner] else 1.0) - chance
            again += rejected * before * seconds[owner]
        lengths[owner] += 1
        free += chance * offer.guessed[-position]
        useful += chance * seconds[owner]
        if rank + 1 == len(ranked) or load.tokens == full:
            yield _Option(list(lengths), cost.seconds(load) - useful + again, free)
