"""A request to the engine, and its life there."""

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

import numpy as np

from slipstream.backend.base import FloatArray, IntArray
from slipstream.engine.params import SamplingParams
from slipstream.engine.sampling import Sampler, TokenLogprob
from slipstream.engine.text import TextStream
from slipstream.kv import Sequence
from slipstream.tokenizer import IncrementalDecoder, Tokenizer

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """Token ids in, tokens out. `prompt` is int32 [n], n >= 1; `tenant` bounds who shares KV with whom."""

    prompt: IntArray
    params: SamplingParams = field(default_factory=SamplingParams)
    tenant: str = ""
    reuse: bool = True
    """Whether KV that is already in memory may be used; the tokens generated are the same either way."""


@dataclass(slots=True)
class TurnCounters:
    """What a turn cost. Token counts, forward passes, and milliseconds of wall time."""

    prompt_tokens: int = 0
    reused_tokens: int = 0
    completion_tokens: int = 0
    forced_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    forward_passes: int = 0
    queue_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0

    @property
    def delta_tokens(self) -> int:
        """Prompt tokens whose KV had to be computed."""
        return self.prompt_tokens - self.reused_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """A piece of a generation: new tokens and the text that they make certain.

    The last piece has `finish_reason` and `counters`; with reason "error" also `error`. The stop token is not among
    the tokens; text of tokens may come with a later piece, when it's certain not to begin a stop string.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    counters: TurnCounters | None = None
    error: Exception | None = None


class Phase(Enum):
    """Where a generation stands."""

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    SETTLING = "settling"
    """Answered; the KV of its last token is computed in the next step, so that the next turn finds all of it."""
    DONE = "done"


class Generation:
    """The engine's view of one request. `sink` receives its outputs, on the engine's thread, and must not block."""

    def __init__(
        self,
        request: GenerationRequest,
        *,
        limit: int,
        vocab_size: int,
        tokenizer: Tokenizer,
        stop_token_ids: frozenset[int],
        sink: Callable[[Output], None],
    ) -> None:
        params = request.params
        seed = params.seed if params.seed is not None else secrets.randbits(63)
        self.request = request
        self.sink = sink
        self.phase = Phase.WAITING
        self.cancelled = False
        self.sequence: Sequence | None = None
        self.tokens = request.prompt
        """All tokens so far, while there is no sequence to hold them."""
        self.limit = limit
        """Prompt and generated tokens together never exceed this."""
        self.counters = TurnCounters(prompt_tokens=len(request.prompt))
        self._sampler = Sampler(params, seed, request.prompt, vocab_size)
        self._text = TextStream(IncrementalDecoder(tokenizer), params.stop)
        own_stops = frozenset(params.stop_token_ids)
        self._stop_token_ids = own_stops if params.ignore_eos else own_stops | stop_token_ids
        self._submitted = time.perf_counter()
        self._started = self._first_token = 0.0

    @property
    def pending(self) -> int:
        """Tokens that wait for their KV."""
        assert self.sequence is not None
        return len(self.sequence) - self.sequence.computed

    def start(self, sequence: Sequence) -> None:
        """Begin, or after a preemption go on, with a sequence that holds all tokens so far."""
        self.sequence = sequence
        if not self._started:
            self._started = time.perf_counter()
            self.counters.reused_tokens = sequence.computed
        self.phase = Phase.PREFILL

    def suspend(self) -> Sequence:
        """Give the sequence up, to start again later with the same tokens."""
        assert self.sequence is not None
        sequence, self.sequence = self.sequence, None
        self.tokens = sequence.tokens.copy()
        self.phase = Phase.WAITING
        return sequence

    def accept(self, logits: FloatArray) -> Output:
        """Choose the next token from its row of logits and add it to the sequence, unless it ends the answer."""
        assert self.sequence is not None
        if not self._first_token:
            self._first_token = time.perf_counter()
        self.phase = Phase.DECODE
        token = self._sampler.sample(logits, len(self.sequence))
        if token in self._stop_token_ids:
            return self._finish("stop", text=self._text.finish())
        self.sequence.extend((token,))
        self._sampler.accept(token)
        self.counters.completion_tokens += 1
        wanted = self.request.params.logprobs is not None
        logprobs = (self._sampler.logprob(logits, token),) if wanted else ()
        text = self._text.feed(token)
        reason: FinishReason | None = None
        if self._text.stopped:
            reason = "stop"
        elif len(self.sequence) >= self.limit:
            reason = "length"
            text += self._text.finish()
        if reason is None:
            return Output(text=text, token_ids=(token,), logprobs=logprobs)
        return self._finish(reason, text=text, token_ids=(token,), logprobs=logprobs)

    def abort(self, reason: FinishReason, error: Exception | None = None) -> Output:
        """End without another token."""
        output = self._finish(reason, text=self._text.finish(), error=error)
        self.phase = Phase.DONE
        return output

    def _finish(
        self,
        reason: FinishReason,
        *,
        text: str,
        token_ids: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprob, ...] = (),
        error: Exception | None = None,
    ) -> Output:
        now = time.perf_counter()
        started = self._started or now
        first_token = self._first_token or now
        self.counters.queue_ms = (started - self._submitted) * 1e3
        self.counters.prefill_ms = (first_token - started) * 1e3
        self.counters.decode_ms = (now - first_token) * 1e3
        self.phase = Phase.SETTLING if self.sequence is not None and self.pending else Phase.DONE
        return Output(
            text=text,
            token_ids=token_ids,
            logprobs=logprobs,
            finish_reason=reason,
            counters=self.counters,
            error=error,
        )


def as_prompt(token_ids: object) -> IntArray:
    """Token ids as the int32 array that a request holds."""
    return np.asarray(token_ids, np.int32)
