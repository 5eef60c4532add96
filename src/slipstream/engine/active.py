"""A request's life in the engine."""

import math
import secrets
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from enum import Enum

from slipstream.engine.closing import Closer
from slipstream.engine.drafting import Draft
from slipstream.engine.grammar import Constraint
from slipstream.engine.request import EngineRequest, FinishReason, Flow, Output, TurnCounters
from slipstream.engine.text import TextStream
from slipstream.errors import LogitsError
from slipstream.kv import Sequence
from slipstream.sampling import NO_TOKEN, Choice, Row, Sampler, TokenLogprob
from slipstream.tokenizer import IncrementalDecoder, Tokenizer


class Phase(Enum):
    """Where a request stands."""

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    SETTLING = "settling"
    """Answered, but its last tokens have no KV yet. The next turn computes them along with its own tokens if it comes
    at once; else they are computed alone, so that it finds all of them."""
    DONE = "done"


class ActiveRequest:
    """The engine's view of one request. `sink` receives its outputs, on the engine's thread, and must not block."""

    def __init__(
        self,
        request: EngineRequest,
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
        self.flow = Flow(request.tenant, request.priority)
        self.sink = sink
        self.phase = Phase.WAITING
        self.cancelled = False
        self.failure: Exception | None = None
        """What it's to end with, if something went wrong with it alone."""
        self.last_step = 0
        """The number of the last step that it had part in."""
        self.sequence: Sequence | None = None
        self.tokens = request.prompt
        """All tokens so far, while there is no sequence to hold them."""
        self.limit = limit
        """Prompt and generated tokens together never exceed this."""
        self.constraint = request.grammar.constraint() if request.grammar is not None else None
        self._closer = Closer(limit)
        self.counters = TurnCounters(prompt_tokens=len(request.prompt))
        self._sampler = Sampler(params, seed, request.prompt, vocab_size)
        self.jumps_forward = self.constraint is not None and request.jump_forward and params.logprobs is None
        """Whether forced tokens are taken as they come; not if somebody wants to know how likely they were."""
        decoder = IncrementalDecoder(tokenizer, shown=request.shown_tokens)
        self._text = TextStream(decoder, params.stop)
        self._is_control = tokenizer.is_control
        own_stops = frozenset(params.stop_token_ids)
        self._stop_token_ids = own_stops if params.ignore_eos else own_stops | stop_token_ids
        self._submitted = time.perf_counter()
        self._started = self._first_token = 0.0
        self.answered_at = 0.0
        """When its last output was made, a `perf_counter` time."""

    def message_ends(self, start: int, end: int) -> list[int]:
        """Lengths of the prompt from `start` to `end` at which something is over: a control token follows there."""
        tokens = self.request.prompt[start:end].tolist()
        return [start + place for place, token in enumerate(tokens) if self._is_control(token)]

    @property
    def pending(self) -> int:
        """Tokens that wait for their KV."""
        assert self.sequence is not None
        return self.sequence.pending

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
        found = Found()
        if self.jumps_forward:
            self._push_forced(found)
        return self.output(found) if found.tokens else None

    def suspend(self) -> Sequence:
        """Give the sequence up, to start again later with the same tokens."""
        assert self.sequence is not None
        sequence, self.sequence = self.sequence, None
        self.tokens = sequence.tokens.copy()
        self.phase = Phase.WAITING
        return sequence

    def early_rows(self, draft: Draft, first: int) -> list[Row]:
        """The rows whose choice needs nothing but the draft to be right up to there.

        `first` is the step's row that follows the sequence's last token. Under a grammar, greedy rows come without a
        mask: the likeliest of all tokens mostly fits, and to ask takes a tenth of the time of a mask. Rows that do need
        a mask, or penalties for the tokens before, are chosen one by one, but for the first.
        """
        assert self.sequence is not None
        constraint, params = self.constraint, self.request.params
        position = len(self.sequence)
        if constraint is not None and not params.greedy:
            forced = not self.jumps_forward and constraint.forced()
            return [] if forced else [Row(first, self._sampler, position, constraint.mask())]
        if params.penalised or not draft.tokens:
            return [Row(first, self._sampler, position)]
        chosen = [place for place, guessed in enumerate(draft.guessed) if guessed]  # the grammar decides the others
        return [Row(first + place, self._sampler, position + place) for place in (*chosen, len(draft))]

    def accept(self, draft: Draft, first: int, early: Mapping[int, Choice]) -> Generator[Row, Choice, "Found"]:
        """Take the next tokens into the sequence, up to where the answer ends; asks for the rows it needs besides.

        The step's rows from `first` on follow the sequence's last token and each token of the draft. Tokens are chosen
        one by one as if there were no draft, as long as the draft foresaw the ones before: only then is there a row
        that says what follows. `early` has the choices from `early_rows`, by row.
        """
        self._first_token = self._first_token or time.perf_counter()
        self.phase = Phase.DECODE
        assert self.sequence is not None
        found = Found()
        drafted, tokens, confirmed = draft.tokens, found.tokens, 0
        while found.reason is None and confirmed == len(tokens):
            index, position = first + confirmed, len(self.sequence)
            found.chosen.append(position)
            if self.constraint is None:
                self._take(_possible(early.get(index) or (yield Row(index, self._sampler, position))), found)
            else:
                yield from self._choose(self.constraint, index, early.get(index), found)
            if self.jumps_forward:
                self._push_forced(found)
            while confirmed < len(tokens) and confirmed < len(drafted) and drafted[confirmed] == tokens[confirmed]:
                confirmed += 1
        if drafted:
            self.counters.drafted_tokens += sum(draft.guessed)
            self.counters.accepted_tokens += sum(draft.guessed[:confirmed])
        found.confirmed = confirmed
        if found.reason is not None:
            found.last = self.output(found)
        return found

    def conclude(self) -> None:
        """Note that the last output is out: what is left to do is the KV of its last tokens, if anything."""
        self.phase = Phase.SETTLING if self.pending else Phase.DONE
        self.answered_at = time.perf_counter()

    def abort(self, reason: FinishReason, error: Exception | None = None) -> Output:
        """End without another token."""
        self.phase = Phase.DONE
        return self.output(Found(reason=reason), error)

    def _take(self, choice: Choice, found: "Found") -> None:
        """Add a token that no grammar has a say in, unless it ends the answer."""
        if choice.token in self._stop_token_ids:
            found.reason = "stop"
            return
        if choice.logprob is not None:
            found.logprobs.append(choice.logprob)
        self._push(choice.token, found)

    def _choose(
        self, constraint: Constraint, index: int, early: Choice | None, found: "Found"
    ) -> Generator[Row, Choice, None]:
        """Add the token that follows under a grammar, chosen from the step's row of that index."""
        assert self.sequence is not None
        params = self.request.params
        position = len(self.sequence)
        if not self.jumps_forward and (forced := constraint.forced()):
            choice = Choice(forced[0])
        else:
            mask = None if params.greedy else constraint.mask
            choice = _possible(early or (yield Row(index, self._sampler, position, mask and mask())))
            if params.greedy and not constraint.valid_prefix((choice.token,)):
                choice = _possible((yield Row(index, self._sampler, position, constraint.mask())))
        token = choice.token
        if token in self._stop_token_ids:
            found.reason = "stop"
            return
        if self.jumps_forward or not constraint.forced():
            in_time = self._closer.choose(constraint, token, position)
            if in_time is None:
                found.reason = "length"
                return
            token = in_time
        if params.logprobs is not None:
            if choice.logprob is None or choice.token != token:
                choice = _possible((yield Row(index, self._sampler, position, token=token)))
            assert choice.logprob is not None
            found.logprobs.append(choice.logprob)
        self._push(token, found)

    def _push_forced(self, found: "Found") -> None:
        assert self.constraint is not None
        while found.reason is None and (forced := self.constraint.forced()):
            if forced[0] in self._stop_token_ids:
                found.reason = "stop"
                return
            self.counters.forced_tokens += 1
            self._push(forced[0], found)

    def _push(self, token: int, found: "Found") -> None:
        """Add a token to the answer, and see whether it ends it."""
        sequence, constraint = self.sequence, self.constraint
        assert sequence is not None
        sequence.append(token)
        self._sampler.accept(token)
        self.counters.completion_tokens += 1
        found.tokens.append(token)
        if constraint is not None:
            constraint.accept((token,))
            if constraint.finished:
                found.reason = "stop"
        if self._text.watchful:
            found.text += self._text.feed((token,))
            if self._text.stopped:
                found.reason = "stop"
        if found.reason is None and len(sequence) >= self.limit:
            found.reason = "length"

    def output(self, found: "Found", error: Exception | None = None) -> Output:
        """What the sink is to have of what was found; to be made in order."""
        if found.tokens and not self._text.watchful:
            found.text = self._text.feed(found.tokens)
        if found.reason is not None:
            if self.failure is None:  # which may have been the text's
                found.text += self._text.finish()
            now = time.perf_counter()
            started = self._started or now
            first_token = self._first_token or now
            self.counters.queue_ms = (started - self._submitted) * 1e3
            self.counters.prefill_ms = (first_token - started) * 1e3
            self.counters.decode_ms = (now - first_token) * 1e3
        return Output(
            text=found.text,
            token_ids=tuple(found.tokens),
            logprobs=tuple(found.logprobs),
            finish_reason=found.reason,
            stop_string=self._text.stop_string,
            counters=self.counters if found.reason is not None else None,
            error=error,
        )


def _possible(choice: Choice) -> Choice:
    """The choice, unless nothing could be chosen; raises `LogitsError` then."""
    if choice.token == NO_TOKEN or (choice.logprob is not None and math.isnan(choice.logprob.logprob)):
        raise LogitsError
    return choice


@dataclass(slots=True)
class Found:
    """What a step has brought a request so far."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    reason: FinishReason | None = None
    last: Output | None = None
    """The output of it if it ends the answer; others are made when the next step is under way."""
    confirmed: int = 0
    """How many tokens of the step's draft came true."""
    chosen: list[int] = field(default_factory=list)
    """The positions in the sequence at which the model chose, not the grammar."""
