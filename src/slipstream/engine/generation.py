"""A request to the engine, and its life there."""

import secrets
import time
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal, NamedTuple

import numpy as np

from slipstream.backend.base import FloatArray, IntArray
from slipstream.engine.closing import Closer
from slipstream.engine.drafting import Draft
from slipstream.engine.grammar import Grammar
from slipstream.engine.params import SamplingParams
from slipstream.engine.sampling import Sampler, TokenLogprob
from slipstream.engine.text import TextStream
from slipstream.kv import Sequence
from slipstream.tokenizer import IncrementalDecoder, Tokenizer

FinishReason = Literal["stop", "length", "cancelled", "error"]
CacheUse = Literal["hit", "miss", "off"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """Token ids in, tokens out. `prompt` is int32 [n], n >= 1; `tenant` bounds who shares KV with whom.

    The four switches change what an answer costs, never its tokens.
    """

    prompt: IntArray
    params: SamplingParams = field(default_factory=SamplingParams)
    grammar: Grammar | None = None
    """What the answer must fit; it ends where nothing more can follow."""
    shown_tokens: Container[int] = frozenset()
    """Special tokens that are part of the text: those that mark calls and reasoning."""
    tenant: str = ""
    reuse: bool = True
    """Whether anything that is already in memory may be used; without it, all is computed afresh."""
    jump_forward: bool = True
    """Whether tokens that the grammar forces are taken without a forward pass of their own."""
    speculation: bool = True
    """Whether drafts may be verified along."""
    response_cache: bool = True
    """Whether the answer may come from memory, if the request is deterministic and was answered before."""


@dataclass(slots=True)
class TurnCounters:
    """What a turn cost. Token counts, forward passes, and milliseconds of wall time."""

    prompt_tokens: int = 0
    reused_tokens: int = 0
    completion_tokens: int = 0
    forced_tokens: int = 0
    """Of the completion: taken without being sampled, since the grammar left no choice."""
    drafted_tokens: int = 0
    """Guesses that were verified along."""
    accepted_tokens: int = 0
    """Guesses that were right."""
    forward_passes: int = 0
    queue_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    response_cache: CacheUse = "off"
    """Off for a request that has more than one answer, too."""

    @property
    def delta_tokens(self) -> int:
        """Prompt tokens whose KV had to be computed."""
        return self.prompt_tokens - self.reused_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """A piece of a generation: new tokens and the text that they make certain.

    The last piece has `finish_reason` and `counters`; with reason "error" also `error`, and where a stop string ended
    the answer, `stop_string`. The stop token is not among the tokens; text of tokens may come with a later piece, when
    it's certain not to begin a stop string.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_string: str | None = None
    counters: TurnCounters | None = None
    error: Exception | None = None


class Phase(Enum):
    """Where a generation stands."""

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    SETTLING = "settling"
    """Answered, but its last tokens have no KV yet. The next turn computes them along with its own tokens if it comes
    at once; else they are computed alone, so that it finds all of them."""
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
        self.constraint = request.grammar.begin() if request.grammar is not None else None
        self._closer = Closer(limit)
        self.counters = TurnCounters(prompt_tokens=len(request.prompt))
        self._sampler = Sampler(params, seed, request.prompt, vocab_size)
        decoder = IncrementalDecoder(tokenizer, shown=request.shown_tokens)
        self._text = TextStream(decoder, params.stop)
        own_stops = frozenset(params.stop_token_ids)
        self._stop_token_ids = own_stops if params.ignore_eos else own_stops | stop_token_ids
        self._submitted = time.perf_counter()
        self._started = self._first_token = 0.0
        self.answered_at = 0.0
        """When its last output was made, a `perf_counter` time."""

    @property
    def pending(self) -> int:
        """Tokens that wait for their KV."""
        assert self.sequence is not None
        return len(self.sequence) - self.sequence.computed

    @property
    def jumps_forward(self) -> bool:
        """Whether forced tokens are taken as they come; not if somebody wants to know how likely they were."""
        return self.constraint is not None and self.request.jump_forward and self.request.params.logprobs is None

    @property
    def answer(self) -> IntArray:
        """The tokens generated so far, int32 [n]."""
        tokens = self.sequence.tokens if self.sequence is not None else self.tokens
        return tokens[len(self.request.prompt) :]

    def start(self, sequence: Sequence, *, owed: int = 0) -> None:
        """Begin, or after a preemption go on, with a sequence that holds all tokens so far.

        The first `owed` of its pending tokens are the last ones of the turn before, which had yet to compute them: they
        count for that turn, so what a turn counts doesn't depend on how soon it comes.
        """
        self.sequence = sequence
        self.phase = Phase.PREFILL
        if not self._started:
            self._started = time.perf_counter()
            self.counters.reused_tokens = sequence.computed + owed

    def opening(self) -> Output | None:
        """What is certain before anything is computed: the tokens that the grammar forces at the start."""
        if self.counters.completion_tokens:
            return None
        harvest = _Harvest()
        self._push_forced(harvest)
        return self._output(harvest) if harvest.tokens else None

    def suspend(self) -> Sequence:
        """Give the sequence up, to start again later with the same tokens."""
        assert self.sequence is not None
        sequence, self.sequence = self.sequence, None
        self.tokens = sequence.tokens.copy()
        self.phase = Phase.WAITING
        return sequence

    def accept(self, logits: FloatArray, draft: Draft) -> "Accepted":
        """Choose the next tokens and add them to the sequence, up to where the answer ends.

        `logits` float32 [len(draft) + 1, vocab] follow the sequence's last token and each token of the draft. Tokens
        are chosen one by one as if there were no draft, for as long as the draft foresaw the ones before: only then
        is there a row that says what follows.
        """
        self._first_token = self._first_token or time.perf_counter()
        self.phase = Phase.DECODE
        assert self.sequence is not None
        harvest = _Harvest()
        confirmed = 0
        chosen = []
        while harvest.reason is None and confirmed == len(harvest.tokens):
            chosen.append(len(self.sequence))
            self._sample(logits[confirmed], harvest)
            self._push_forced(harvest)
            while (
                confirmed < min(len(draft), len(harvest.tokens))
                and draft.tokens[confirmed] == harvest.tokens[confirmed]
            ):
                confirmed += 1
        self.counters.drafted_tokens += sum(draft.guessed)
        self.counters.accepted_tokens += sum(draft.guessed[:confirmed])
        return Accepted(self._output(harvest), confirmed, chosen)

    def conclude(self) -> None:
        """Note that the last output is out: what is left to do is the KV of its last tokens, if anything."""
        self.phase = Phase.SETTLING if self.pending else Phase.DONE
        self.answered_at = time.perf_counter()

    def abort(self, reason: FinishReason, error: Exception | None = None) -> Output:
        """End without another token."""
        self.phase = Phase.DONE
        return self._output(_Harvest(reason=reason), error)

    def _sample(self, logits: FloatArray, harvest: "_Harvest") -> None:
        """Choose the token that follows the sequence."""
        assert self.sequence is not None
        position = len(self.sequence)
        token = self._sample_allowed(logits, position)
        if token in self._stop_token_ids:
            harvest.reason = "stop"
            return
        if self.constraint is not None and (self.jumps_forward or not self.constraint.forced()):
            in_time = self._closer.choose(self.constraint, token, position)
            if in_time is None:
                harvest.reason = "length"
                return
            token = in_time
        if self.request.params.logprobs is not None:
            harvest.logprobs.append(self._sampler.logprob(logits, token))
        self._push(token, harvest)

    def _sample_allowed(self, logits: FloatArray, position: int) -> int:
        """Sample among what the grammar allows."""
        if self.constraint is None:
            return self._sampler.sample(logits, position)
        if not self.jumps_forward and (forced := self.constraint.forced()):
            return forced[0]
        if self.request.params.greedy:  # the likeliest of all mostly fits: asking takes a tenth of the time of a mask
            likeliest = self._sampler.sample(logits, position)
            if self.constraint.valid_prefix((likeliest,)):
                return likeliest
        return self._sampler.sample(self.constraint.mask(logits), position)

    def _push_forced(self, harvest: "_Harvest") -> None:
        """Add the tokens that the grammar forces."""
        if self.constraint is None or not self.jumps_forward or harvest.reason is not None:
            return
        while forced := self.constraint.forced():
            if forced[0] in self._stop_token_ids:
                harvest.reason = "stop"
                return
            self.counters.forced_tokens += 1
            self._push(forced[0], harvest)
            if harvest.reason is not None:
                return

    def _push(self, token: int, harvest: "_Harvest") -> None:
        """Add a token to the answer, and see whether it ends it."""
        assert self.sequence is not None
        self.sequence.extend((token,))
        self._sampler.accept(token)
        self.counters.completion_tokens += 1
        harvest.tokens.append(token)
        harvest.text += self._text.feed(token)
        if self.constraint is not None:
            self.constraint.accept((token,))
        if self._text.stopped or (self.constraint is not None and self.constraint.finished):
            harvest.reason = "stop"
        elif len(self.sequence) >= self.limit:
            harvest.reason = "length"

    def _output(self, harvest: "_Harvest", error: Exception | None = None) -> Output:
        if harvest.reason is not None:
            harvest.text += self._text.finish()
            now = time.perf_counter()
            started = self._started or now
            first_token = self._first_token or now
            self.counters.queue_ms = (started - self._submitted) * 1e3
            self.counters.prefill_ms = (first_token - started) * 1e3
            self.counters.decode_ms = (now - first_token) * 1e3
        return Output(
            text=harvest.text,
            token_ids=tuple(harvest.tokens),
            logprobs=tuple(harvest.logprobs),
            finish_reason=harvest.reason,
            stop_string=self._text.stop_string,
            counters=self.counters if harvest.reason is not None else None,
            error=error,
        )


class Accepted(NamedTuple):
    """What a step brought a generation."""

    output: Output
    confirmed: int
    """How many tokens of its draft came true."""
    chosen: list[int]
    """The positions in the sequence at which the model chose, not the grammar."""


@dataclass(slots=True)
class _Harvest:
    """What a step brings a generation."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    reason: FinishReason | None = None


def as_prompt(token_ids: object) -> IntArray:
    """Token ids as the int32 array that a request holds."""
    return np.asarray(token_ids, np.int32)
