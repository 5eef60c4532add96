"""A turn: from a request, whatever protocol it came by, to the pieces of its answer."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from slipstream.backend.base import IntArray
from slipstream.chat import NO_SETTING, AnswerDelta, AnswerReader, Message, Prompt, Schema, Setting
from slipstream.config import ServerConfig
from slipstream.embedded import Completion, Engine, collect
from slipstream.engine import Generation, GenerationRequest, Output, SamplingParams, TurnCounters
from slipstream.engine.generation import as_prompt
from slipstream.engine.grammar import Grammar
from slipstream.errors import EngineStoppedError, InvalidRequestError
from slipstream.fields import CHOICES
from slipstream.server.metrics import Metrics
from slipstream.sessions import SessionTurn

MAX_CHOICES = 128
"""Answers that one HTTP request may ask for, prompts times choices."""


TENANT = ""
"""There is one API key, so all clients are one."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TurnRequest:
    """One prompt and what is wanted of its answer; knows no protocol.

    `prompt` is a conversation that waits for the assistant, a plain text, or token ids, int32 [n]. With several
    `choices` and a seed, choice i is what the seed + i gives alone.
    """

    prompt: tuple[Message, ...] | str | IntArray
    params: SamplingParams
    setting: Setting = NO_SETTING
    response_schema: Schema | None = None
    """What an answer that is no call must fit."""
    choices: int = 1
    tenant: str = TENANT
    session_id: str | None = None
    """The session that it is a turn of, which has no other turn meanwhile; then the messages may be its next alone."""
    session_hint: str | None = None
    """What to call the session if it has no name; the messages are the whole conversation all the same."""
    continues: bool | None = None
    """Whether the messages are the session's next ones, or the whole conversation; None if they have to tell."""
    system: Message | None = None
    """The system message, where a protocol keeps it apart from the others."""
    reuse: bool = True
    speculation: bool = True
    jump_forward: bool = True
    response_cache: bool = True

    @property
    def session_name(self) -> str | None:
        """What the session is to be called."""
        return self.session_id or self.session_hint


@dataclass(slots=True, eq=False)
class Choice:
    """One answer in the making."""

    index: int
    request: TurnRequest
    conversation: Prompt | None
    """What the answer will extend; None after a plain prompt."""
    reader: AnswerReader
    session_turn: SessionTurn | None = None
    session_id: str | None = None
    """The session that the answer belongs to, once it's finished."""
    outputs: list[Output] = field(default_factory=list)
    generation: Generation | None = None
    """The engine's part in it, until it's finished."""

    @property
    def wants_logprobs(self) -> bool:
        """Whether its request asked for log-probabilities."""
        return self.request.params.logprobs is not None

    @property
    def answer(self) -> Completion:
        """All of it, once it's finished."""
        return collect(iter(self.outputs))

    @property
    def message(self) -> Message:
        """The answer as a message of its conversation, once it's finished."""
        return self.reader.message

    @property
    def counters(self) -> TurnCounters:
        """What it cost, once it's finished."""
        counters = self.outputs[-1].counters
        assert counters is not None
        return counters


class Arrival(NamedTuple):
    """A piece of a choice's answer: as the engine gave it, and what it says."""

    choice: Choice
    output: Output
    deltas: list[AnswerDelta]


class Turn:
    """Answers under way. Belongs to the event loop that it was made on; `cancel` it when nobody waits for them."""

    def __init__(self, engine: Engine, metrics: Metrics) -> None:
        self.choices: list[Choice] = []
        """In the order of the requests, those of one request together."""
        self._engine = engine
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        self._started = time.perf_counter()
        self._arrived: list[tuple[Choice, Output]] = []
        self._wake = asyncio.Event()
        self._session_turns: list[SessionTurn] = []

    @property
    def exact(self) -> bool:
        """Whether the engine gives the same tokens to the same request, whatever happens around it."""
        return self._engine.exact

    def begin(self, request: TurnRequest) -> SessionTurn | None:
        """Claim the session of a request until it's answered; raises `SessionConflictError`."""
        if not isinstance(request.prompt, tuple):
            return None
        session_turn = self._engine.sessions.begin(
            request.tenant,
            request.session_name,
            request.prompt,
            request.setting,
            alone=request.session_id is not None,
            system=request.system,
            continues=request.continues,
        )
        self._session_turns.append(session_turn)
        return session_turn

    async def batches(self) -> AsyncIterator[list[Arrival]]:
        """The pieces of all answers as they come, those that came together in one list.

        By the time an answer's last piece is seen, the conversation's next turn will find it. Raises the error that
        ended a generation; whatever ends the iteration, what is unfinished then is cancelled.
        """
        unfinished = len(self.choices)
        try:
            while unfinished:
                await self._wake.wait()
                self._wake.clear()
                arrived, self._arrived = self._arrived, []
                batch = [self._read(choice, output) for choice, output in arrived]
                unfinished -= sum(output.finish_reason is not None for _, output in arrived)
                yield batch
        finally:
            self.cancel()

    async def finish(self) -> None:
        """Wait until all choices have their answers."""
        async for _ in self.batches():
            pass

    def cancel(self) -> None:
        """Stop what is unfinished before the engine's next step; harmless when nothing is."""
        for session_turn in self._session_turns:
            self._engine.sessions.release(session_turn)
        for choice in self.choices:
            if choice.generation is not None:
                self._engine.core.cancel(choice.generation)

    def submit(self, request: TurnRequest, prepared: "_Prepared") -> None:
        """Hand a request to the engine, with its prompt made; raises what `EngineCore.submit` raises."""
        opens_reasoning = prepared.conversation is not None and prepared.conversation.opens_reasoning
        for offset in range(request.choices):
            setting = prepared.session_turn.setting if prepared.session_turn is not None else request.setting
            reader = self._engine.dialect.reader(setting.tools, opens_reasoning=opens_reasoning)
            choice = Choice(len(self.choices), request, prepared.conversation, reader, prepared.session_turn)
            generation = GenerationRequest(
                prompt=prepared.token_ids,
                grammar=prepared.grammar,
                shown_tokens=self._engine.dialect.token_ids if prepared.conversation is not None else frozenset(),
                params=_for_choice(request.params, offset),
                tenant=request.tenant,
                reuse=request.reuse,
                jump_forward=request.jump_forward,
                speculation=request.speculation,
                response_cache=request.response_cache,
            )
            choice.generation = self._engine.core.submit(generation, self._sink(choice))
            self.choices.append(choice)

    def _sink(self, choice: Choice) -> Callable[[Output], None]:
        def sink(output: Output) -> None:  # on the engine's thread
            self._loop.call_soon_threadsafe(self._deliver, choice, output)

        return sink

    def _deliver(self, choice: Choice, output: Output) -> None:
        """Take a piece from the engine, also when nobody reads any more, for the metrics."""
        if not choice.outputs:
            self._metrics.first_piece(time.perf_counter() - self._started)
        choice.outputs.append(output)
        if output.finish_reason is not None:
            choice.generation = None
            self._metrics.finished(output.finish_reason, choice.counters)
        self._arrived.append((choice, output))
        self._wake.set()

    def _read(self, choice: Choice, output: Output) -> Arrival:
        """Take a piece apart; after the last one, the conversation knows the answer."""
        last = output.finish_reason is not None
        if output.error is not None:
            raise output.error
        if output.finish_reason == "cancelled":
            raise EngineStoppedError("the request was cancelled")
        if choice.conversation is None:
            return Arrival(choice, output, [])
        deltas = choice.reader.feed(output.text, last=last)
        if last and choice.session_turn is not None:
            whole = choice.answer
            answer = choice.conversation, choice.message, whole.token_ids, whole.text
            if choice.index == 0:
                choice.session_id = self._engine.sessions.answered(choice.session_turn, *answer, whole.counters)
            else:  # known if the client goes on with it, but not what the session is now
                self._engine.conversations.record(*answer)
        return Arrival(choice, output, deltas)


class _Prepared(NamedTuple):
    """What a request asks of the engine."""

    token_ids: IntArray
    conversation: Prompt | None = None
    session_turn: SessionTurn | None = None
    grammar: Grammar | None = None


class TurnRunner:
    """Starts turns on an engine. What the configuration switches off, no turn gets, whatever it asks for."""

    def __init__(self, engine: Engine, metrics: Metrics, config: ServerConfig) -> None:
        self.engine = engine
        self._metrics = metrics
        self._config = config

    async def start(self, requests: Sequence[TurnRequest]) -> Turn:
        """Make the prompts and grammars, off the event loop, and submit them all, or none.

        Raises `InvalidRequestError`, `OverloadedError` and `EngineStoppedError`.
        """
        asked = sum(request.choices for request in requests)
        if asked > MAX_CHOICES:
            raise InvalidRequestError(
                f"{asked} answers are too many for one request: ask for at most {MAX_CHOICES}", param=CHOICES
            )
        requests = [self._allowed(request) for request in requests]
        turn = Turn(self.engine, self._metrics)
        try:
            begun = [(request, turn.begin(request)) for request in requests]
            prepared = await asyncio.to_thread(lambda: [self._prepare(*each) for each in begun])
            for request, preparation in zip(requests, prepared, strict=True):
                turn.submit(request, preparation)
        except BaseException:
            turn.cancel()
            raise
        return turn

    def _allowed(self, request: TurnRequest) -> TurnRequest:
        switches = ("reuse", "jump_forward", "speculation", "response_cache")
        return replace(request, **{name: getattr(request, name) and getattr(self._config, name) for name in switches})

    def _prepare(self, request: TurnRequest, session_turn: SessionTurn | None) -> _Prepared:
        if session_turn is not None:
            setting = session_turn.setting
            prompt = self.engine.conversations.prompt(session_turn.messages, setting, tenant=request.tenant)
            if request.reuse:
                self.engine.sessions.fetch(request.tenant, prompt)
            grammar = self.engine.grammar(prompt, setting.tools, request.response_schema)
            return _Prepared(prompt.token_ids, prompt, session_turn, grammar)
        return _Prepared(
            as_prompt(self.engine.encode(request.prompt) if isinstance(request.prompt, str) else request.prompt)
        )


def _for_choice(params: SamplingParams, offset: int) -> SamplingParams:
    return params if params.seed is None else replace(params, seed=params.seed + offset)
