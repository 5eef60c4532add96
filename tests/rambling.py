"""A model that says anything: the engine itself over logits that are random, held by grammars alone."""

import queue
import random
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from slipstream.chat.answers import AnswerReader, Dialect
from slipstream.chat.messages import Message
from slipstream.chat.setting import Schema, ToolUse
from slipstream.engine import EngineCore, EngineRequest, Output, SamplingParams, as_prompt
from slipstream.engine.grammar import Grammar, GrammarCompiler
from slipstream.tokenizer import Tokenizer
from slipstream.tokenizer.provenance import content
from slipstream.types import FloatArray
from tests.unit.toy_backend import ToyBackend, ToyChunk
from tests.waiting import HANG


class RandomLogits(ToyBackend):
    """Logits that are random, the same for the same token at the same place; some tokens are more `welcome`.

    Each row is a stretch of the same noise from another place on, for noise of its own would take most of the time.
    """

    def __init__(self, vocab_size: int, welcome: Sequence[int] = ()) -> None:
        super().__init__(num_blocks=256, block_size=16)
        self.vocab_size = vocab_size
        self._welcome = list(welcome)
        self._noise = _noise(2 * vocab_size)

    def compute(self, chunks: Sequence[ToyChunk]) -> FloatArray:
        rows = [
            self._row(int(chunk.tokens[at]), chunk.past + at)
            for chunk in chunks
            for at in range(len(chunk.tokens) - chunk.rows, len(chunk.tokens))
        ]
        for chunk in chunks:
            chunk.state.length += len(chunk.tokens)
        return np.array(rows, np.float32).reshape(len(rows), self.vocab_size)

    def _row(self, token: int, position: int) -> FloatArray:
        start = random.Random(token << 20 | position).randrange(self.vocab_size)
        logits = self._noise[start : start + self.vocab_size].copy()
        logits[self._welcome] += 3
        return logits


@cache
def _noise(size: int) -> FloatArray:
    return np.random.default_rng(0).standard_normal(size, np.float32)


class Rambler:
    """An engine over random logits that answers in the dialect of one family; close it."""

    def __init__(
        self, tokenizer: Tokenizer, dialect: Dialect, compiler: GrammarCompiler, stop_token_ids: Sequence[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._dialect = dialect
        self._compiler = compiler
        # Ends are welcome, so that answers that may be long are not.
        ends = [*stop_token_ids, *(token for end in dialect.ends for token in tokenizer.encode(end)[-1:])]
        quote = tokenizer.encode('"')
        self._core = EngineCore(
            RandomLogits(tokenizer.vocab_size, [*ends, *quote]),
            tokenizer,
            context_length=2000,
            stop_token_ids=frozenset(stop_token_ids),
        )

    def close(self) -> None:
        """End the engine."""
        self._core.shutdown(drain_seconds=0)

    def grammar(self, use: ToolUse, schema: Schema | None = None, *, opened: bool = False) -> Grammar | None:
        """The grammar of an answer; one that is no call fits the `schema` if there is one."""
        written = self._dialect.grammar(use, schema, opens_reasoning=opened)
        return None if written is None else self._compiler.compile(written.source, param="tools")

    def answer(
        self, use: ToolUse, schema: Schema | None = None, *, opened: bool = False, seed: int = 0, **params: Any
    ) -> "Answer":
        """An answer, read as it comes and as a whole."""
        given: queue.SimpleQueue[Output] = queue.SimpleQueue()
        request = EngineRequest(
            prompt=as_prompt(self._tokenizer.encode(f"{seed} {'weather ' * 3}")),
            params=SamplingParams(**({"temperature": 0.0, "max_tokens": 250} | params)),
            grammar=self.grammar(use, schema, opened=opened),
            shown_tokens=self._dialect.token_ids,
            speculation=False,  # drafts find nothing in noise
            response_cache=False,
        )
        self._core.submit(request, given.put)
        answer = Answer(self._dialect, use, opened)
        while answer.reason is None:
            answer.take(given.get(timeout=HANG))
        return answer


class Answer:
    """An answer that was read as it came, and whole."""

    def __init__(self, dialect: Dialect, use: ToolUse, opened: bool) -> None:
        self._readers = [AnswerReader(dialect, use, opens_reasoning=opened) for _ in range(2)]
        self._text = content("")
        self.reason: str | None = None
        self.tokens: list[int] = []

    def take(self, output: Output) -> None:
        """Read a piece; both ways of reading have to come to the same."""
        assert output.error is None, output.error
        streamed, whole = self._readers
        self.tokens += output.token_ids
        self._text += content(output.text)
        self.reason = output.finish_reason
        streamed.feed(output.text, last=self.reason is not None)
        if self.reason is not None:
            whole.feed(self._text, last=True)
            assert said(streamed.message) == said(whole.message)
            assert streamed.reasoning == whole.reasoning

    @property
    def message(self) -> Message:
        """The answer as a message."""
        return self._readers[0].message

    @property
    def complete(self) -> bool:
        """Whether it ends in calls, of which none is cut off."""
        return self._readers[0].calls_to_run

    @property
    def reasoning(self) -> str:
        """What it thought."""
        return self._readers[0].reasoning

    @property
    def text(self) -> str:
        """All of it, as it was generated."""
        return str.__str__(self._text)


def said(message: Message) -> object:
    """What a message says, whatever ids its calls have."""
    return message.text, [(call.name, call.arguments) for call in message.tool_calls]
