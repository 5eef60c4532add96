"""The interface of a store: what a backend keeps of sequences, by sequence and length."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt

from slipstream.errors import SlipstreamError

Blob = npt.NDArray[np.uint16]
"""Exported state. Its first axis can be cut and joined as `Span` says; the rest is the store's own business."""


@dataclass(frozen=True, slots=True)
class Exported:
    """A blob of state as it was when it was exported; it may still be on its way to the host."""

    nbytes: int
    wait: Callable[[], Blob]
    """Returns it once it's there; on any thread, and as often as you like. Raises `ModelError` if it can't be had."""

    @classmethod
    def here(cls, blob: Blob) -> Self:
        """One that is on the host already."""
        return cls(blob.nbytes, lambda: blob)

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Several, one behind the other."""
        if len(parts) == 1:
            return parts[0]
        return cls(sum(part.nbytes for part in parts), lambda: np.concatenate([part.wait() for part in parts]))


class OutOfMemoryError(SlipstreamError):
    """A store has less memory left than was asked for."""


class SequenceState:
    """What a store holds of one sequence; opaque above the backend."""

    __slots__ = ("__weakref__", "length", "room")

    length: int
    """The tokens of the sequence, from its start, whose state is held."""
    room: int
    """The tokens, in all, that memory is reserved for."""


class Span(NamedTuple):
    """Tokens `start` to `end` of a sequence, whose state takes `rows` rows of a blob."""

    start: int
    end: int
    rows: int


State = TypeVar("State", bound=SequenceState)


class Store(Protocol[State]):
    """The memory of a backend: keys and values of a transformer, or recurrent states.

    Memory is counted in tokens, in units of the store's own. A state that is *evictable* belongs to nobody; it may
    share memory with others, and what evictable states alone hold is `evictable`. Methods that take memory raise
    `OutOfMemoryError`, and then nothing has changed.

    A store of states that can't be cut anywhere keeps checkpoints. So the length that `fork` and `rewind` reach may be
    shorter than the one asked for.
    """

    capacity: int
    """Tokens that one sequence can have at most."""
    bytes_per_token: int

    @property
    def free(self) -> int:
        """Memory that nothing holds."""
        ...

    @property
    def evictable(self) -> int:
        """Memory that evictable states alone hold."""
        ...

    def open(self, room: int) -> State:
        """A state of no tokens, with memory reserved for `room` tokens."""
        ...

    def fork(self, state: State, length: int, room: int) -> State:
        """A state of at most the first `length` tokens of another, with memory reserved for `room` tokens in all."""
        ...

    def reserve(self, state: State, room: int) -> None:
        """Reserve memory for `room` tokens in all."""
        ...

    def reach(self, state: State, length: int) -> int:
        """The longest length, at most `length`, that `fork` and `rewind` of a state reach now, if there's memory."""
        ...

    def keeps_draft(self, state: State, count: int, draft: int, marks: Sequence[int]) -> bool:
        """Whether a rewind reaches any token of a draft, if the next step computes `count` tokens and a draft of so
        many (see `Chunk`). If not, it goes back to before the step, and what came true is computed again.
        """
        ...

    def rewind(self, state: State, length: int) -> int:
        """Forget all tokens after at most the first `length`, and keep what is reserved; returns the length reached."""
        ...

    def trim(self, state: State) -> None:
        """Give back the memory that is reserved beyond the state's length."""
        ...

    def release(self, state: State) -> None:
        """Give back all memory; the state must not be used again."""
        ...

    def set_evictable(self, state: State, evictable: bool) -> None:
        """Declare whether a state belongs to nobody."""
        ...

    def open_cost(self, room: int) -> int:
        """Memory that `open` takes."""
        ...

    def fork_cost(self, state: State, length: int, room: int) -> int:
        """Memory that `fork` takes."""
        ...

    def reserve_cost(self, state: State, room: int) -> int:
        """Memory that `reserve` takes."""
        ...

    def cut_cost(self, state: State, length: int, room: int) -> int:
        """Memory that rewinding, trimming and reserving take together, less what they free; may be negative."""
        ...

    def held(self, states: Iterable[State]) -> int:
        """Memory that states hold together."""
        ...

    def spans(self, start: int, end: int) -> Iterator[Span]:
        """The tokens from `start` to `end` in spans small enough to be copied between two steps; for any thread."""
        ...

    def aligned(self, start: int) -> int:
        """The token at which an export from `start` begins; not after `start`."""
        ...

    def export(self, state: State, start: int, end: int) -> Exported:
        """A copy of the state of a span's tokens, from `aligned(start)` to `end`; the state may change at once."""
        ...

    def install(self, state: State, end: int, blob: Blob) -> None:
        """Extend a state whose length is `aligned(start)` by what was exported of the span from `start` to `end`."""
        ...

    def check(self, states: Iterable[State]) -> None:
        """Assert that these are all states there are, and that none holds what it shouldn't (for tests)."""
        ...
