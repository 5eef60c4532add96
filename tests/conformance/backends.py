"""What any backend must keep to: the same rows however sequences are cut, forked, batched and rewound."""

import random
from typing import Any

import numpy as np

from slipstream.backend import Backend, Chunk
from slipstream.sampling import Row, Sampler, SamplingParams, TokenLogprob
from slipstream.types import IntArray

LIKELIEST = SamplingParams(temperature=0, logprobs=3)


def check_backend(backend: Backend, *, seed: int, longest: int, rounds: int = 12) -> None:
    """Assert that a backend, all of whose store is free, keeps to its contract."""
    rng = random.Random(seed)
    checked = _Checked(backend, rng, longest)
    for _ in range(rounds):
        checked.round()
    checked.end()


class _Checked:
    """Sequences that are computed at random, and what their rows are when they are computed in one go."""

    def __init__(self, backend: Backend, rng: random.Random, longest: int) -> None:
        self.backend = backend
        self.rng = rng
        self.longest = longest
        self.free = backend.store.free
        self.running: dict[Any, list[int]] = {}  # by state, all tokens that it is to have

    def round(self) -> None:
        """Open or fork sequences, run some steps of all of them, and compare what comes out."""
        rng, store = self.rng, self.backend.store
        for _ in range(rng.randint(1, 3)):
            if self.running and rng.random() < 0.5:
                source = rng.choice(list(self.running))
                length = rng.randint(0, source.length)
                state = store.fork(source, length, self.longest)
                assert state.length <= length
                tokens = self.running[source][: state.length]
            else:
                state, tokens = store.open(self.longest), []
            self.running[state] = [*tokens, *self._tokens(rng.randint(1, self.longest - len(tokens)))]
        while any(state.length < len(tokens) for state, tokens in self.running.items()):
            self._step()
        for state in rng.sample(list(self.running), len(self.running) // 2):
            store.release(state)
            del self.running[state]

    def end(self) -> None:
        """Release everything; nothing must be lost."""
        for state in self.running:
            self.backend.store.release(state)
        assert self.backend.store.free == self.free

    def _step(self) -> None:
        rng = self.rng
        chunks, expected = [], []
        for state, tokens in self.running.items():
            left = len(tokens) - state.length
            if left and (rng.random() < 0.8 or not chunks):
                count = rng.choice([1, min(left, rng.randint(1, 40)), left])
                rows = rng.randint(0, min(count, 3))
                chunks.append(Chunk(state, _ids(tokens[state.length : state.length + count]), rows))
                expected += [tokens[: state.length + count - rows + row + 1] for row in range(rows)]
        lengths = [(chunk.state, chunk.past + len(chunk.tokens)) for chunk in chunks]
        rows = [self._row(index, len(tokens)) for index, tokens in enumerate(expected)]
        ticket = self.backend.launch(chunks)
        assert not (ticket.queued and rows)
        if not ticket.queued:
            found = ticket.wait(rows)
        assert [(state, state.length) for state, _ in lengths] == lengths
        if ticket.queued:
            found = ticket.wait()
        assert [(state, state.length) for state, _ in lengths] == lengths
        assert ticket.choose(rows[::-1])[::-1] == found, "a ticket gives the same however it is asked"
        for choice, tokens in zip(found, expected, strict=True):
            assert choice.logprob is not None
            if self.backend.exact:
                assert choice.logprob == self._afresh(tokens), "a row depends on the tokens of its sequence alone"
        self._rewind()

    def _rewind(self) -> None:
        """Let a sequence take another way."""
        if self.rng.random() < 0.4:
            state = self.rng.choice(list(self.running))
            length = self.rng.randint(max(0, state.length - 8), state.length)
            reached = self.backend.store.rewind(state, length)
            assert reached == state.length <= length
            left = len(self.running[state]) - length
            self.running[state] = [*self.running[state][:length], *self._tokens(left)]

    def _afresh(self, tokens: list[int]) -> TokenLogprob | None:
        """The likeliest token after others, with log-probabilities, computed in one chunk and alone."""
        state = self.backend.store.open(len(tokens))
        ticket = self.backend.launch([Chunk(state, _ids(tokens), 1)])
        ticket.wait()
        (choice,) = ticket.choose([self._row(0, len(tokens))])
        self.backend.store.release(state)
        return choice.logprob

    def _row(self, index: int, position: int) -> Row:
        return Row(index, Sampler(LIKELIEST, 0, _ids([0]), self.backend.vocab_size), position)

    def _tokens(self, count: int) -> list[int]:
        return [self.rng.randrange(1, min(self.backend.vocab_size, 20_000)) for _ in range(count)]


def _ids(tokens: list[int]) -> IntArray:
    return np.array(tokens, np.int32)
