"""What a turn needs before the engine can have it: its session, its prompt, and the grammar of its answer."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from slipstream.chat import AnswerReader, Conversations, Prompt, Schema, ToolUse
from slipstream.chat.answers import Dialect
from slipstream.chat.schema import closed, closed_parameters, json_rule
from slipstream.engine import GenerationRequest, SamplingParams
from slipstream.engine.generation import as_prompt
from slipstream.engine.grammar import UNSUPPORTED, Grammar, GrammarBrokenError, GrammarCompiler
from slipstream.errors import InvalidRequestError
from slipstream.sessions import SessionTurn, SessionTurns
from slipstream.turns.request import TurnRequest


class Prepared(NamedTuple):
    """A request that the engine can have, once for each choice."""

    request: TurnRequest
    generation: GenerationRequest
    session_turn: SessionTurn | None
    conversation: Prompt | None
    """What the answer will extend; None after a plain prompt."""

    def choice(self, offset: int) -> GenerationRequest:
        """What the engine is to generate for one of the choices."""
        return replace(self.generation, params=_for_choice(self.generation.params, offset))


class Preparation:
    """Makes prompts and grammars; both may take a while. `encode` gives the token ids of a plain prompt."""

    def __init__(
        self,
        session_turns: SessionTurns,
        conversations: Conversations,
        dialect: Dialect,
        grammars: GrammarCompiler,
        encode: Callable[[str], Sequence[int]],
    ) -> None:
        self._session_turns = session_turns
        self._conversations = conversations
        self._dialect = dialect
        self._grammars = grammars
        self._encode = encode

    def begin(self, request: TurnRequest) -> SessionTurn | None:
        """Claim the session of a request until it is answered; raises `SessionConflictError`."""
        if not isinstance(request.prompt, tuple):
            return None
        return self._session_turns.begin(
            request.tenant,
            request.session_name,
            request.prompt,
            request.setting,
            alone=request.session_id is not None,
            system=request.system,
            continues=request.continues,
        )

    def prepare(self, request: TurnRequest, session_turn: SessionTurn | None) -> Prepared:
        """Make the prompt and the grammar of a request; raises `InvalidRequestError`."""
        generation = GenerationRequest(
            prompt=as_prompt(()),
            params=request.params,
            tenant=request.tenant,
            reuse=request.reuse,
            jump_forward=request.jump_forward,
            speculation=request.speculation,
            response_cache=request.response_cache,
        )
        if session_turn is None:
            assert not isinstance(request.prompt, tuple)
            ids = self._encode(request.prompt) if isinstance(request.prompt, str) else request.prompt
            return Prepared(request, replace(generation, prompt=as_prompt(ids)), None, None)
        setting = session_turn.setting
        prompt = self._conversations.prompt(session_turn.messages, setting, tenant=request.tenant)
        if request.reuse:
            self._session_turns.fetch(request.tenant, prompt)
        generation = replace(
            generation,
            prompt=prompt.token_ids,
            grammar=self._grammar(prompt, setting.tools, request.response_schema),
            shown_tokens=self._dialect.token_ids,
        )
        return Prepared(request, generation, session_turn, prompt)

    def reader(self, prepared: Prepared) -> AnswerReader:
        """What takes an answer apart."""
        opens_reasoning = prepared.conversation is not None and prepared.conversation.opens_reasoning
        setting = (prepared.session_turn or prepared.request).setting
        return self._dialect.reader(setting.tools, opens_reasoning=opens_reasoning)

    def _grammar(self, prompt: Prompt, use: ToolUse, response_schema: Schema | None) -> Grammar | None:
        """The grammar of the answer to a prompt: calls of tools, JSON of a schema, or None for free text."""
        param = "response_format" if use.mode == "none" else "tools"
        try:
            source = self._dialect.grammar(use, response_schema, opens_reasoning=prompt.opens_reasoning)
        except RecursionError:
            message = f"{param} has a schema that is nested too deeply: flatten it, or use $ref"
            raise InvalidRequestError(message, param=param, code="schema_too_complex") from None
        if source is None:
            return None
        try:
            return self._grammars.compile(source, param=param)
        except InvalidRequestError as error:
            self._blame(use, response_schema)
            if error.code == UNSUPPORTED:  # but each of its schemas is supported
                raise GrammarBrokenError from error
            raise

    def _blame(self, use: ToolUse, response_schema: Schema | None) -> None:
        """Raise the error of the one schema that can't be enforced, if it is one."""
        for index, tool in enumerate(use.tools):
            if tool in use.callable:
                source = f"start: {json_rule(closed_parameters(tool.parameters))}"
                self._grammars.compile(source, param=f"tools[{index}].function.parameters")
        if response_schema is not None:
            source = f"start: {json_rule(closed(response_schema))}"
            self._grammars.compile(source, param="response_format.json_schema.schema")


def _for_choice(params: SamplingParams, offset: int) -> SamplingParams:
    return params if params.seed is None else replace(params, seed=params.seed + offset)
