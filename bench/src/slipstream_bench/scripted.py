"""A backend that computes every step as it is, and then says what a script has it say.

Models with random weights are as slow as real ones, but write nonsense, of which no draft comes true. With a script the
answers are those of a real agent: masks, forced tokens, drafts and their verification cost what they cost in service.
"""

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from slipstream.backend import Backend, Chunk, SequenceState, Store, Ticket
from slipstream.chat import Template
from slipstream.errors import ModelError
from slipstream.sampling import Choice, Row
from slipstream.tokenizer import Tokenizer
from slipstream.types import IntArray

Script = Callable[[str], str | None]
"""From the text of a prompt to the answer; None if the script has none."""

_LONGEST_PROMPT_END = 4096
"""Tokens of a prompt that a script gets to see, counted from its end."""


class ScriptedBackend:
    """`backend`, but tokens are chosen so that answers become the texts of a script.

    A token is a pure function of those before it, as it is with a model: the first token of what the script has left
    to say. Where the script has no answer, or the answer has left it, the backend chooses. `opening` are the tokens
    with which the chat template opens an answer; they tell where the prompt ends. States that come from disk have no
    tokens, so the script says nothing after them.
    """

    def __init__(
        self, backend: Backend, script: Script, tokenizer: Tokenizer, opening: IntArray, stop_token: int
    ) -> None:
        self.vocab_size = backend.vocab_size
        self.fingerprint = f"{backend.fingerprint}; scripted"
        self.exact = backend.exact
        self.largest_draft = backend.largest_draft
        self.cost = backend.cost
        self._backend = backend
        self._script = script
        self._tokenizer = tokenizer
        self._opening = opening
        self._stop_token = stop_token
        self._history: WeakKeyDictionary[SequenceState, IntArray] = WeakKeyDictionary()
        self._answers: dict[bytes, str | None] = {}
        self._next: dict[tuple[str, str], int | None] = {}
        self.store: Store[Any] = _Remembering(backend.store, self._history)

    def launch(self, chunks: Sequence[Chunk]) -> "ScriptedTicket":
        """Start the step; see `Backend.launch`."""
        places: list[IntArray] = []
        for chunk in chunks:
            tokens = np.concatenate([self._history[chunk.state][: chunk.past], chunk.tokens])
            self._history[chunk.state] = tokens
            places += [tokens[: len(tokens) - after] for after in reversed(range(chunk.rows))]
        return ScriptedTicket(self, self._backend.launch(chunks), places)

    def token_after(self, tokens: IntArray) -> int | None:
        """What the script says after these tokens, int32 [n]; None if it says nothing."""
        start = self._answer_start(tokens)
        if start is None:
            return None
        prompt = tokens[max(0, start - _LONGEST_PROMPT_END) : start]
        key = prompt.tobytes()
        if key not in self._answers:
            self._answers[key] = self._script(self._tokenizer.decode(prompt.tolist()))
        answer = self._answers[key]
        if answer is None:
            return None
        said = self._tokenizer.decode(tokens[start:].tolist())
        if (answer, said) not in self._next:
            self._next[answer, said] = self._continue(answer, said)
        return self._next[answer, said]

    def _continue(self, answer: str, said: str) -> int | None:
        if not answer.startswith(said):
            return None
        rest = answer[len(said) :]
        return self._tokenizer.encode(rest, begins=False)[0] if rest else self._stop_token

    def _answer_start(self, tokens: IntArray) -> int | None:
        """The place after the last opening of an answer."""
        opening = self._opening
        for place in np.flatnonzero(tokens == opening[0])[::-1].tolist():
            if np.array_equal(tokens[place : place + len(opening)], opening):
                return int(place) + len(opening)
        return None


def opening_of(template: Template | None, tokenizer: Tokenizer) -> IntArray:
    """The tokens with which a chat template opens an answer, from its last control token on.

    Raises `ModelError` if there is no template, or it opens answers without a control token.
    """
    if template is None:
        raise ModelError("a model without a chat template can't follow a script")
    tokens = tokenizer.encode(template.render([{"role": "user", "content": "Begin."}]))
    for place in reversed(range(len(tokens))):
        if tokenizer.is_control(tokens[place]):
            return np.array(tokens[place:], np.int32)
    raise ModelError("a chat template that opens answers without a control token can't follow a script")


class ScriptedTicket:
    """A step under way."""

    def __init__(self, backend: ScriptedBackend, ticket: Ticket, places: list[IntArray]) -> None:
        self._backend = backend
        self._ticket = ticket
        self._places = places
        self.queued = ticket.queued

    def wait(self, rows: Sequence[Row] = ()) -> list[Choice]:
        """Return when the step is done; see `Ticket.wait`."""
        return self._say(rows, self._ticket.wait(rows))

    def choose(self, rows: Sequence[Row]) -> list[Choice]:
        """Let the backend choose, which takes the time that it takes, then say what the script says."""
        return self._say(rows, self._ticket.choose(rows))

    def _say(self, rows: Sequence[Row], choices: list[Choice]) -> list[Choice]:
        return [
            self._scripted(row, choice) if row.token is None else choice
            for row, choice in zip(rows, choices, strict=True)
        ]

    def _scripted(self, row: Row, choice: Choice) -> Choice:
        token = self._backend.token_after(self._places[row.index])
        if token is None or (row.mask is not None and not _allowed(row.mask, token)):
            return choice
        return Choice(token, choice.logprob)


class _Remembering:
    """A store that also remembers the tokens of its states; see `Store`."""

    def __init__(self, store: Store[Any], history: WeakKeyDictionary[SequenceState, IntArray]) -> None:
        self._store = store
        self._history = history

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def open(self, room: int) -> SequenceState:
        """See `Store.open`."""
        state: SequenceState = self._store.open(room)
        self._history[state] = np.empty(0, np.int32)
        return state

    def fork(self, state: SequenceState, length: int, room: int) -> SequenceState:
        """See `Store.fork`."""
        forked: SequenceState = self._store.fork(state, length, room)
        self._history[forked] = self._history[state][: forked.length]
        return forked

    def install(self, state: SequenceState, end: int, blob: Any) -> None:
        """See `Store.install`. What came in has no tokens: the script finds no opening in it."""
        self._store.install(state, end, blob)
        unknown = np.full(state.length - len(self._history[state]), -1, np.int32)
        self._history[state] = np.concatenate([self._history[state], unknown])


def _allowed(mask: IntArray, token: int) -> bool:
    return bool(int(mask[token // 32]) >> (token % 32) & 1)
