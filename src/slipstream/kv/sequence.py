"""A sequence: token ids, and what the store holds of them."""

from collections.abc import Sequence as ListLike
from weakref import ref

import numpy as np
import numpy.typing as npt

from slipstream.backend import Chunk, SequenceState
from slipstream.types import IntArray


class Sequence:
    """Token ids, the first `computed` of which have their state in the store.

    It begins with the array that it is made of, which is copied when more comes or if anybody could write to it.
    """

    __slots__ = ("__weakref__", "_length", "_tokens", "awaited", "forked_from", "indexed", "state")

    def __init__(self, state: SequenceState, tokens: npt.ArrayLike = (), forked_from: "Sequence | None" = None) -> None:
        self.state = state
        self.forked_from = ref(forked_from) if forked_from is not None else None
        """The sequence that had its first tokens, as long as somebody has that."""
        tokens = np.asarray(tokens, np.int32)
        self._tokens = tokens.copy() if tokens.flags.writeable else tokens
        self._length = len(self._tokens)
        self.indexed = 0
        """How many tokens the prefix index knows."""
        self.awaited = False
        """Whether the conversation will go on soon."""

    def __len__(self) -> int:
        return self._length

    @property
    def tokens(self) -> IntArray:
        """All token ids, int32 [len]; a view, valid until the sequence changes."""
        return self._tokens[: self._length]

    @property
    def computed(self) -> int:
        """How many tokens have their state."""
        return self.state.length

    @property
    def pending(self) -> int:
        """How many tokens are yet to be computed."""
        return self._length - self.state.length

    def begins(self, tokens: IntArray) -> bool:
        """Whether other tokens begin with all of its own, computed or not."""
        return np.array_equal(self.tokens, tokens[: self._length])

    def append(self, token: int) -> None:
        """Append a token id, which is yet to be computed."""
        self._make_room(self._length + 1)
        self._tokens[self._length] = token
        self._length += 1

    def extend(self, tokens: IntArray) -> None:
        """Append token ids, which are yet to be computed."""
        if len(tokens):
            end = self._length + len(tokens)
            self._make_room(end)
            self._tokens[self._length : end] = tokens
            self._length = end

    def cut(self) -> None:
        """Drop the tokens that are not computed."""
        self._length = self.state.length

    def chunk(self, count: int, rows: int, draft: ListLike[int] = (), marks: tuple[int, ...] = ()) -> Chunk:
        """The next `count` tokens and a draft of what follows them, as work for the backend; memory is reserved."""
        start = self.state.length
        tokens = self._tokens[start : start + count]
        if draft:
            tokens = np.concatenate((tokens, np.asarray(draft, np.int32)))
        return Chunk(self.state, tokens, rows, marks)

    def _make_room(self, size: int) -> None:
        """Have room for so many tokens in an array of its own."""
        if size > len(self._tokens) or not self._tokens.flags.writeable:
            larger = np.empty(size + size // 4 + 64, np.int32)
            larger[: self._length] = self._tokens[: self._length]
            self._tokens = larger
