"""The seam between Slipstream and whatever computes a model's steps."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from slipstream.backend.step_cost import StepCost
from slipstream.backend.store import SequenceState, Store
from slipstream.sampling import Choice, Row
from slipstream.types import IntArray


@dataclass(slots=True)
class Chunk:
    """The part of one sequence that a step computes.

    `tokens` int32 [n], n >= 1, follow those whose state is held; memory for them is reserved. The last `rows` of them,
    0 <= rows <= n, give a row each, from which the token after it may be chosen.
    """

    state: SequenceState
    tokens: IntArray
    rows: int
    marks: tuple[int, ...] = ()
    """Lengths of the sequence, within the chunk, at which others are likely to part from it: worth a checkpoint."""

    @property
    def past(self) -> int:
        """How many tokens come before."""
        return self.state.length


class Ticket(Protocol):
    """A step that was launched. The host may do other work until it asks for what came of it."""

    queued: bool
    """Whether it gives no rows, on a device that does one thing after the other: from the launch on its states hold
    their tokens, and before it's waited for memory may be used, and one more step be launched; which fails if it does.
    """

    def wait(self, rows: Sequence[Row] = ()) -> list[Choice]:
        """Return when the step is done; from then on the chunks' states hold their tokens, wanted or not.

        Returns the choice for some rows, as `choose` does: a device need not wait for the host to begin with them.
        Raises `ModelError` if the step failed; then no state has changed.
        """
        ...

    def choose(self, rows: Sequence[Row]) -> list[Choice]:
        """Choose the tokens that follow some rows of the step, which count through its chunks in order.

        May be asked several times, after `wait` and until the next step is launched. The choice is that of
        `Row.choose`.
        """
        ...


class Backend(Protocol):
    """A loaded model with its memory.

    If it is `exact`, a row depends on the tokens of its sequence up to it and on nothing else, neither on how they were
    cut into chunks nor on what else a step computes.
    """

    vocab_size: int
    fingerprint: str
    """Equal for backends that compute the same bits from the same weights, and store them alike."""
    exact: bool
    """Whether rows were found to be the same to the bit in every step; the server reports it if not."""
    largest_draft: int | None
    """Tokens of a draft that one step can verify; None if there's no limit."""
    cost: StepCost
    """The step sizes that there are, and what a load costs; the backend keeps it up to date."""

    @property
    def store(self) -> Store[Any]:
        """What it keeps of sequences."""
        ...

    def launch(self, chunks: Sequence[Chunk]) -> Ticket:
        """Start a step of chunks of different sequences; one at a time, or two if the first is `queued`."""
        ...
