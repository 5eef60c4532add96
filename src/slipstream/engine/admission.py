"""How many draft tokens each generation may bring to a step."""

from collections.abc import Sequence

from slipstream.engine.step_cost import StepCost


def chances(guessed: Sequence[bool], acceptance: float) -> list[float]:
    """The chance of each token of a draft to come true; one that the grammar forces is as likely as the one before."""
    chance, result = 1.0, []
    for guess in guessed:
        chance *= acceptance if guess else 1.0
        result.append(chance)
    return result


def admit_drafts(
    drafts: Sequence[Sequence[float]], *, lone: Sequence[bool], tokens: int, cost: StepCost, last_size: int
) -> list[int]:
    """Draft lengths that let a step yield the most tokens a second.

    `drafts` are the chances of each generation's draft tokens, falling; `lone` marks those whose piece is one token
    and padded to two in any case; `tokens` is the size of the step without drafts. A step yields one token for each
    generation and those draft tokens that come true. For each step size that was measured, the likeliest tokens fill
    it; the best size wins. With many generations the base is large, drafts cost what they weigh, and few are let in.
    """
    lengths = [0] * len(drafts)
    best = lengths
    best_rate = len(drafts) / cost.transition(last_size, tokens)
    ranked = sorted(
        ((chance, -position, owner) for owner, draft in enumerate(drafts) for position, chance in enumerate(draft)),
        reverse=True,
    )
    gain, size = float(len(drafts)), tokens
    for rank, (chance, _, owner) in enumerate(ranked):
        size += not (lone[owner] and lengths[owner] == 0)
        if size > cost.largest:
            break  # a step that nobody has prepared
        lengths[owner] += 1
        gain += chance
        full = rank + 1 == len(ranked) or cost.rounded(size + 1) > cost.rounded(size)
        if full and (rate := gain / cost.transition(last_size, size)) > best_rate:
            best, best_rate = list(lengths), rate
    return best
