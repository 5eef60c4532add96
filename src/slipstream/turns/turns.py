"""The start of a turn: its session, its prompt, the grammar of its answer; then the engine has it."""

import queue
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace

from slipstream import fields
from slipstream.chat import Conversations, Prompt, Schema, ToolUse
from slipstream.chat.answers import Dialect
from slipstream.chat.messages import Digest, digest
from slipstream.chat.schema import closed, closed_parameters, json_rule
from slipstream.engine import EngineCore, EngineRequest, Output, as_prompt
from slipstream.engine.grammar import UNSUPPORTED, Grammar, GrammarBrokenError, GrammarCompiler
from slipstream.errors import InvalidRequestError
from slipstream.sessions import SessionTurn, SessionTurns
from slipstream.turns.request import TurnRequest
from slipstream.turns.turn import Choice, Notify, Piece, Turn

_RECENT_GRAMMARS = 64

Ready = tuple[Choice, EngineRequest]
"""A choice, and what the engine is to generate for it."""


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
        self._grammars = grammars
        self._encode = encode
        self._lock = threading.Lock()
        self._recent: dict[Digest, str | None] = {}  # texts of grammars, oldest first

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
            return len(self._conversations.prompt(claimed.messages, claimed.setting, tenant=request.tenant).token_ids)
        finally:
            turn.cancel()

    def _claim(self, turn: Turn, request: TurnRequest) -> SessionTurn | None:
        """Claim the session of a request until it is answered."""
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
        return turn.hold(session_turn)

    def _prepare(self, request: TurnRequest, session_turn: SessionTurn | None) -> Iterator[Ready]:
        """Make the prompt and the grammar of a request, for each of its choices."""
        active = EngineRequest(
            prompt=as_prompt(self._encode(request.prompt) if isinstance(request.prompt, str) else ()),
            params=request.params,
            tenant=request.tenant,
            weight=request.weight,
            priority=request.priority,
            reuse=request.reuse,
            jump_forward=request.jump_forward,
            speculation=request.speculation,
            response_cache=request.response_cache,
        )
        setting, prompt = request.setting, None
        if session_turn is not None:
            setting = session_turn.setting
            prompt = self._conversations.prompt(session_turn.messages, setting, tenant=request.tenant)
            self._session_turns.prepare(session_turn, prompt, reuse=request.reuse)
            grammar = self._grammar(request.tenant, prompt, setting.tools, request.response_schema)
            shown = self._dialect.token_ids
            active = replace(active, prompt=prompt.token_ids, grammar=grammar, shown_tokens=shown)
        elif not isinstance(request.prompt, str | tuple):
            active = replace(active, prompt=as_prompt(request.prompt))
        opens_reasoning = prompt is not None and prompt.opens_reasoning
        for offset in range(request.choices):
            reader = self._dialect.reader(setting.tools, opens_reasoning=opens_reasoning)
            seed = request.params.seed
            params = request.params if seed is None else replace(request.params, seed=seed + offset)
            yield Choice(0, request, prompt, reader, session_turn), replace(active, params=params)

    def _grammar(self, tenant: str, prompt: Prompt, use: ToolUse, response_schema: Schema | None) -> Grammar | None:
        """The grammar of the answer to a prompt: calls of tools, JSON of a schema, or None for free text."""
        field = fields.TOOLS if use.callable else fields.RESPONSE_SCHEMA
        try:
            source = self._source(tenant, use, response_schema, opens_reasoning=prompt.opens_reasoning)
        except RecursionError:
            advice = " has a schema that is nested too deeply: flatten it, or use $ref"
            raise InvalidRequestError(field, advice, code="schema_too_complex") from None
        if source is None:
            return None
        try:
            return self._grammars.compile(source, param=field, tenant=tenant)
        except InvalidRequestError as error:
            self._blame(tenant, use, response_schema)
            if error.code == UNSUPPORTED:  # but each of its schemas is supported
                raise GrammarBrokenError from error
            raise

    def _source(
        self, tenant: str, use: ToolUse, response_schema: Schema | None, *, opens_reasoning: bool
    ) -> str | None:
        """The text of a grammar, as it was made for an earlier turn: making it takes some 0.2 ms for each tool."""
        key = digest(repr((tenant, use, response_schema, opens_reasoning)))
        with self._lock:
            if key in self._recent:
                return self._recent[key]
        source = self._dialect.grammar(use, response_schema, opens_reasoning=opens_reasoning)
        with self._lock:
            self._recent[key] = source
            if len(self._recent) > _RECENT_GRAMMARS:
                del self._recent[next(iter(self._recent))]
        return source

    def _blame(self, tenant: str, use: ToolUse, response_schema: Schema | None) -> None:
        """Raise the error of the one schema that can't be enforced, if it is one."""
        allowed = {tool.name for tool in use.callable}
        for index, tool in enumerate(use.tools):
            if tool.name in allowed:
                source = f"start: {json_rule(closed_parameters(tool.parameters))}"
                self._grammars.check(source, param=fields.TOOL_PARAMETERS.at(index), tenant=tenant)
        if response_schema is not None:
            source = f"start: {json_rule(closed(response_schema))}"
            self._grammars.check(source, param=fields.RESPONSE_SCHEMA, tenant=tenant)
