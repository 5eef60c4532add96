"""Answers under way: read piece by piece, and remembered when they are finished."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from slipstream.chat import NO_TOOLS, AnswerDelta, AnswerReader, Conversations, Prompt, ToolUse
from slipstream.chat.schema import Loss
from slipstream.engine import (
    ActiveRequest,
    EngineCore,
    EngineRequest,
    FinishReason,
    Output,
    TokenLogprob,
    TurnCounters,
)
from slipstream.errors import EngineStoppedError
from slipstream.sessions import SessionTurn, SessionTurns
from slipstream.turns.checks import misfits, warnings_of
from slipstream.turns.request import TurnRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A finished answer."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason
    counters: TurnCounters
    warnings: tuple[str, ...] = ()
    """What of the request was left out or loosened, and whether a call or an answer fits nevertheless."""


@dataclass(slots=True, eq=False)
class Choice:
    """One answer in the making."""

    index: int
    request: TurnRequest
    conversation: Prompt | None
    """What the answer will extend; None after a plain prompt."""
    reader: AnswerReader
    session_turn: SessionTurn | None = None
    """Whose end the answer is, if it comes after a conversation."""
    losses: tuple[Loss, ...] = ()
    """Keywords of schemas that the answer's grammar leaves out."""
    tools: ToolUse = NO_TOOLS
    """The tools that it may call."""
    misfits: tuple[str, ...] = ()
    """What of it, once it's finished, does not fit a schema that was loosened."""
    session_id: str | None = None
    """The session that the answer belongs to, once it's finished."""
    outputs: list[Output] = field(default_factory=list)
    """What the engine gave so far, read or not."""
    active: ActiveRequest | None = None
    """The engine's part in it; None if the answer was known."""

    @property
    def wants_logprobs(self) -> bool:
        """Whether its request asked for log-probabilities."""
        return self.request.params.logprobs is not None

    @property
    def warnings(self) -> tuple[str, ...]:
        """What of its request was left out or loosened, and what came of that."""
        return (*self.request.warnings, *warnings_of(self.losses), *self.misfits)

    @property
    def answer(self) -> Completion:
        """All of it, once it's finished."""
        last = self.outputs[-1]
        assert last.finish_reason is not None
        assert last.counters is not None
        return Completion(
            text="".join(piece.text for piece in self.outputs),
            token_ids=tuple(token for piece in self.outputs for token in piece.token_ids),
            logprobs=tuple(logprob for piece in self.outputs for logprob in piece.logprobs),
            finish_reason=last.finish_reason,
            counters=last.counters,
            warnings=self.warnings,
        )

    @property
    def counters(self) -> TurnCounters:
        """What it has cost so far; there must be a first piece."""
        if (counters := self.outputs[-1].counters) is not None:
            return counters
        assert self.active is not None
        return self.active.counters


class Piece(NamedTuple):
    """A piece of a choice's answer: as the engine gave it, and what it says."""

    choice: Choice
    output: Output
    deltas: list[AnswerDelta]


Notify = Callable[[Choice, Output], None]


class Turn:
    """Answers under way. One thread at a time may `read`; any may `cancel`, who must if nobody waits any more."""

    def __init__(self, core: EngineCore, session_turns: SessionTurns, conversations: Conversations) -> None:
        self.choices: list[Choice] = []
        """In the order of the requests, those of one request together."""
        self.unread = 0
        """How many choices have a last piece that nobody has read yet."""
        self._core = core
        self._session_turns = session_turns
        self._conversations = conversations
        self.held: list[SessionTurn] = []
        """The turns of sessions that are let go when this one is over."""

    def submit(self, choice: Choice, request: EngineRequest, notify: Notify) -> None:
        """Have the engine generate a choice; raises what `EngineCore.submit` raises."""

        def sink(output: Output) -> None:  # on the engine's thread
            choice.outputs.append(output)
            notify(choice, output)

        choice.index = len(self.choices)
        self.choices.append(choice)
        self.unread += 1
        choice.active = self._core.submit(request, sink)

    def read(self, choice: Choice, output: Output) -> Piece:
        """Take a piece apart; by the time that the last one is, the next turn will find the conversation, on disk too.

        Pieces of a choice come in order; the last may take a while. Raises the error that ended the request.
        """
        last = output.finish_reason is not None
        self.unread -= last
        if output.error is not None:
            raise output.error
        if output.finish_reason == "cancelled":
            raise EngineStoppedError("the request was cancelled")
        session_turn, schema = choice.session_turn, choice.request.response_schema
        if session_turn is None or choice.conversation is None:
            return Piece(choice, output, [])
        if not choice.request.answers:
            if last:
                self._session_turns.release(session_turn)
            return Piece(choice, output, [])
        deltas = choice.reader.feed(output.text, last=last)
        if last:
            if choice.reader.calls_to_run or output.finish_reason == "stop":  # what was cut off need not fit
                choice.misfits = tuple(misfits(choice.reader.message, choice.losses, choice.tools, schema))
            whole = choice.answer
            answer = choice.conversation, choice.reader.message, whole.token_ids, whole.text
            if choice.index == 0:
                choice.session_id = self._session_turns.answered(session_turn, *answer, whole.counters)
            else:  # known if the client goes on with it, but not what the session is now
                self._conversations.record(*answer)
        return Piece(choice, output, deltas)

    def cancel(self) -> None:
        """Stop what is unfinished before the engine's next step; harmless when nothing is."""
        for session_turn in self.held:
            self._session_turns.release(session_turn)
        for choice in self.choices:
            finished = choice.outputs and choice.outputs[-1].finish_reason is not None
            if choice.active is not None and not finished:
                self._core.cancel(choice.active)
