"""The start of a turn: its session, its prompt, the grammar of its answer; then the engine has it."""

import queue
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace

from slipstream.chat import AnswerReader, Conversations
from slipstream.chat.answers import Dialect
from slipstream.engine import EngineCore, EngineRequest, Output, as_prompt
from slipstream.engine.grammar import GrammarCompiler
from slipstream.sessions import SessionTurn, SessionTurns
from slipstream.turns.demands import Demand, Demands, Wanted
from slipstream.turns.request import TurnRequest
from slipstream.turns.turn import Choice, Notify, Piece, Turn


class Turns:
    """Starts turns. Thread-safe. `encode` gives the token ids of a plain prompt."""

    def __init__(
        self,
        core: EngineCore,
        session_turns: SessionTurns,
        conversations: Conversations,
        dialect: Dialect,
        grammars: GrammarCompiler,
        encode: Callable[[str], Sequence[int]],
    ) -> None:
        self._core = core
        self._session_turns = session_turns
        self._conversations = conversations
        self._dialect = dialect
        self._demands = Demands(dialect, grammars)
        self._encode = encode

    def start(self, requests: Sequence[TurnRequest], notify: Notify) -> Turn:
        """Make the prompts and grammars and submit them all, or none; takes as long as that.

        `notify` is called with each piece of an answer, for `Turn.read`. It is on the engine's thread, and must not
        block. Raises `InvalidRequestError`, `SessionConflictError`, `OverloadedError` and `EngineStoppedError`.
        """
        turn = Turn(self._core, self._session_turns, self._conversations)
        try:
            begun = [(request, self._claim(turn, request)) for request in requests]
            ready = [each for request, session_turn in begun for each in self._prepare(request, session_turn)]
            for choice, active in ready:
                turn.submit(choice, active, notify)
        except BaseException:
            turn.cancel()
            raise
        return turn

    def stream(self, request: TurnRequest) -> Generator[Piece, None, None]:
        """The pieces of the answers to a request as they come; closing the iterator cancels the rest."""
        arrived: queue.SimpleQueue[tuple[Choice, Output]] = queue.SimpleQueue()
        turn = self.start([request], lambda *piece: arrived.put(piece))
        try:
            while turn.unread:
                yield turn.read(*arrived.get())
        finally:
            turn.cancel()

    def count(self, request: TurnRequest) -> int:
        """The tokens of the prompt that a request for an answer to messages would have; computes nothing.

        Raises `InvalidRequestError` and `SessionConflictError`.
        """
        turn = Turn(self._core, self._session_turns, self._conversations)
        try:
            claimed = self._claim(turn, request)
            assert claimed is not None
            return len(self._conversations.prompt(claimed.messages, claimed.setting, tenant=request.tenant).tokens)
        finally:
            turn.cancel()

    def _claim(self, turn: Turn, request: TurnRequest) -> SessionTurn | None:
        if not isinstance(request.prompt, tuple):
            return None
        session_turn = self._session_turns.claim(
            request.tenant,
            request.session_id or request.session_hint,
            request.prompt,
            request.setting,
            alone=request.session_id is not None,
            system=request.system,
            continues=request.continues,
        )
        turn.held.append(session_turn)
        return session_turn

    def _prepare(
        self, request: TurnRequest, session_turn: SessionTurn | None
    ) -> Iterator[tuple[Choice, EngineRequest]]:
        """Make the prompt and the grammar of a request; for each of its choices, what the engine is to generate."""
        setting, prompt, demand, shown = request.setting, None, Demand(), frozenset[int]()
        if isinstance(request.prompt, str):
            self._core.limits.check_characters(len(request.prompt))
            token_ids = as_prompt(self._encode(request.prompt))
        elif session_turn is None:
            token_ids = as_prompt(request.prompt)
        else:
            setting = session_turn.setting
            prompt = self._conversations.prompt(session_turn.messages, setting, tenant=request.tenant)
            self._session_turns.prepare(session_turn, prompt, reuse=request.reuse)
            schema, strict = request.response_schema, request.response_strict
            demand = self._demands.demand(Wanted(request.tenant, setting.tools, schema, prompt.opens_reasoning, strict))
            token_ids, shown = prompt.tokens.ids, self._dialect.token_ids
        opens_reasoning = prompt is not None and prompt.opens_reasoning
        for offset in range(request.choices):
            reader = AnswerReader(self._dialect, setting.tools, opens_reasoning=opens_reasoning)
            seed = request.params.seed
            active = EngineRequest(
                prompt=token_ids,
                params=request.params if seed is None else replace(request.params, seed=seed + offset),
                grammar=demand.grammar,
                shown_tokens=shown,
                tenant=request.tenant,
                weight=request.weight,
                priority=request.priority,
                reuse=request.reuse,
                jump_forward=request.jump_forward,
                speculation=request.speculation,
                response_cache=request.response_cache,
            )
            yield Choice(0, request, prompt, reader, session_turn, demand.losses, setting.tools), active
