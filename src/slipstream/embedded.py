"""The engine in your own process: the same model, memory and scheduling as the server's, without HTTP."""

import queue
import sqlite3
import sys
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from slipstream import fields
from slipstream.backend.openvino import OpenVINOBackend
from slipstream.backend.paged_model import PagedModel
from slipstream.chat import NO_TOOLS, ChatTemplate, Conversations, Message, Prompt, Schema, Setting, ToolUse
from slipstream.chat.answers import Dialect
from slipstream.chat.schema import closed, closed_parameters, json_rule
from slipstream.config import EngineConfig
from slipstream.engine import (
    EngineCore,
    FinishReason,
    Generation,
    GenerationRequest,
    Output,
    SamplingParams,
    TokenLogprob,
    TurnCounters,
)
from slipstream.engine.generation import as_prompt
from slipstream.engine.grammar import UNSUPPORTED, Grammar, GrammarBrokenError, GrammarCompiler
from slipstream.engine.response_cache import ResponseCache
from slipstream.errors import InvalidRequestError, SessionNotFoundError, StateError
from slipstream.models import DEFAULT_MODEL, Model, ModelStore
from slipstream.sessions import Database, SavedKV, Saver, SessionInfo, Sessions
from slipstream.tokenizer import Tokenizer

_GIL_SWITCH_SECONDS = 0.0005
"""The engine thread wants the interpreter back right after each forward pass; Python's default lets it wait 5 ms."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A finished answer."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason
    counters: TurnCounters


class Engine:
    """A model, ready to generate; close it, or use it in a `with` statement.

    `model` is a name, a path or a hub repository, as for `slipstream pull`, and is fetched if it's missing; or a
    `Model` from a `ModelStore`. `on_warm_up` is called with the fraction of the start-up work done.

    Raises `ModelError` if the model can't be had or loaded. All methods may be called from any thread.
    """

    def __init__(
        self,
        model: str | Path | Model = DEFAULT_MODEL,
        config: EngineConfig | None = None,
        *,
        on_warm_up: Callable[[float], None] | None = None,
    ) -> None:
        config = config or EngineConfig()
        self.model = model if isinstance(model, Model) else ModelStore().ensure(str(model))
        manifest = self.model.manifest
        pool = ThreadPoolExecutor(1)
        paged = pool.submit(PagedModel, self.model.ir_path, threads=config.threads)  # compiles while the rest loads
        pool.shutdown(wait=False)
        self.tokenizer = Tokenizer.from_file(self.model.tokenizer_path)
        template = _chat_template(self.model, self.tokenizer)
        self.dialect = Dialect(template.shown if template is not None else "", self.tokenizer, config.tool_format)
        """How the model writes its answers."""
        self.conversations = Conversations(template, self.tokenizer, self.dialect)
        self.grammars = GrammarCompiler(
            self.tokenizer,
            vocab_size=manifest.vocab_size,
            stop_token_ids=manifest.stop_token_ids,
            ends=self.dialect.ends,
        )
        self.database = self._open_database(config)
        """Where what outlives the process is kept, if anything is."""
        self.backend = OpenVINOBackend(
            paged.result(), kv_memory=config.kv_memory, progress=on_warm_up or (lambda _: None)
        )
        sys.setswitchinterval(min(sys.getswitchinterval(), _GIL_SWITCH_SECONDS))
        self.core = EngineCore(
            self.backend,
            self.tokenizer,
            context_length=manifest.context_length,
            stop_token_ids=frozenset(manifest.stop_token_ids),
            step_target=config.step_target_ms / 1e3,
            max_running=config.max_running,
            max_waiting=config.max_waiting,
            response_cache=(
                ResponseCache(config.response_cache_memory, self.model.fingerprint) if self.backend.exact else None
            ),
        )
        self.sessions = Sessions(
            self.core,
            self.conversations,
            ttl=config.session_ttl,
            database=self.database,
            saver=self._open_saver(config, self.database) if self.database is not None else None,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def exact(self) -> bool:
        """Whether the same request gives the same tokens here, whatever was cached, batched, drafted or evicted."""
        return self.backend.exact

    def close(self, *, drain_seconds: float = 0.0) -> None:
        """Let running requests finish for so long, abort the rest, and end the engine."""
        self.core.shutdown(drain_seconds=drain_seconds)
        self.sessions.close()

    def encode(self, text: str) -> list[int]:
        """Token ids of a plain prompt, with the beginning-of-text token if the model wants one."""
        ids = self.tokenizer.encode(text)
        bos = self.model.manifest.bos_token_id
        return [bos, *ids] if self.model.manifest.add_bos and bos is not None and ids[:1] != [bos] else ids

    def grammar(self, prompt: Prompt, use: ToolUse, response_schema: Schema | None = None) -> Grammar | None:
        """The grammar of the answer to a prompt: calls of tools, JSON of a schema, or None for free text.

        Raises `InvalidRequestError` for a schema that can't be enforced. May take a while; any thread will do.
        """
        param = fields.TOOLS if use.callable else fields.RESPONSE_SCHEMA
        try:
            source = self.dialect.grammar(use, response_schema, opens_reasoning=prompt.opens_reasoning)
        except RecursionError:
            advice = " has a schema that is nested too deeply: flatten it, or use $ref"
            raise InvalidRequestError(param, advice, code="schema_too_complex") from None
        if source is None:
            return None
        try:
            return self.grammars.compile(source, param=param)
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
                self.grammars.compile(source, param=fields.TOOL_PARAMETERS.at(index))
        if response_schema is not None:
            source = f"start: {json_rule(closed(response_schema))}"
            self.grammars.compile(source, param=fields.RESPONSE_SCHEMA)

    def generate(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None, *, reuse: bool = True
    ) -> Completion:
        """Continue a text, or token ids; returns when the answer is finished."""
        return collect(self.stream(prompt, params, reuse=reuse))

    def stream(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None, *, reuse: bool = True
    ) -> Generator[Output, None, None]:
        """Continue a text, or token ids, piece by piece; closing the iterator cancels the rest."""
        ids = self.encode(prompt) if isinstance(prompt, str) else prompt
        request = GenerationRequest(prompt=as_prompt(ids), params=params or SamplingParams(), reuse=reuse)
        return self._outputs(request)

    def session(
        self,
        system: str | None = None,
        tools: ToolUse = NO_TOOLS,
        *,
        id: str | None = None,
        pinned: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> "Session":
        """A new conversation, with a system message, tools and variables of the chat template if they are given.

        With an `id` that there is a session of, that session goes on instead; `tools` are then what it may call next.
        """
        try:
            state = self.sessions.get("", id or "")
        except SessionNotFoundError:
            messages = [Message("system", system)] if system is not None else []
            state = self.sessions.create("", id, messages, Setting(tools, template_kwargs or {}), pinned=pinned)
        return Session(self, state.id, tools if tools.tools else replace(tools, tools=state.tools))

    def _open_database(self, config: EngineConfig) -> Database | None:
        if config.state_dir is None:
            return None
        try:
            config.state_dir.mkdir(parents=True, exist_ok=True)
            return Database(config.state_dir / "state.db", self.model.fingerprint)
        except (OSError, sqlite3.Error) as error:
            message = f"{config.state_dir} can't keep state: {error}; choose another "
            raise StateError(message, fields.STATE_DIR) from error

    def _open_saver(self, config: EngineConfig, database: Database) -> Saver:
        assert config.state_dir is not None
        saved = SavedKV(
            config.state_dir / "kv", f"{self.model.fingerprint}; {self.backend.fingerprint}", config.state_disk
        )
        saved.keep(database.prune())
        return Saver(self.core, self.conversations, saved, config.state_bandwidth)

    def _outputs(self, request: GenerationRequest) -> Generator[Output, None, None]:
        outputs: queue.SimpleQueue[Output] = queue.SimpleQueue()
        generation = self.core.submit(request, outputs.put)
        return self._drain(outputs, generation)

    def _drain(
        self, outputs: "queue.SimpleQueue[Output]", generation: Generation | None
    ) -> Generator[Output, None, None]:
        finished = False
        try:
            while not finished:
                output = outputs.get()
                finished = output.finish_reason is not None
                if output.error is not None:
                    raise output.error
                yield output
        finally:
            if not finished and generation is not None:
                self.core.cancel(generation)


class Session:
    """A conversation with the model, by its `id`; each turn costs its new messages only.

    `tools` may be called in its turns. One turn at a time: a second one meanwhile raises `SessionConflictError`.
    """

    def __init__(self, engine: Engine, id: str, tools: ToolUse = NO_TOOLS) -> None:
        self.id = id
        self.tools = tools
        self._engine = engine
        self._sessions = engine.sessions

    @property
    def messages(self) -> tuple[Message, ...]:
        """All of the conversation; after a turn the last one is the answer, with its text and calls."""
        return self._sessions.get("", self.id).messages

    def info(self) -> SessionInfo:
        """How old and large it is, and what it takes."""
        return self._sessions.infos([self._sessions.get("", self.id)])[0]

    def send(
        self, *new: str | Message, params: SamplingParams | None = None, tools: ToolUse | None = None
    ) -> Completion:
        """Say something, or hand over the results of calls, and wait for the answer."""
        return collect(self.stream(*new, params=params, tools=tools))

    def stream(
        self,
        *new: str | Message,
        params: SamplingParams | None = None,
        tools: ToolUse | None = None,
        reuse: bool = True,
    ) -> Generator[Output, None, None]:
        """The same, but read the answer as it comes; it joins the conversation when it's finished.

        A string is a user's message. `tools` are the session's own, unless this turn has others. Without `reuse` all of
        it is computed afresh, for comparison.
        """
        engine, use = self._engine, self.tools if tools is None else tools
        turn = self._sessions.begin("", self.id, _messages(new), Setting(use), continues=True)
        try:
            prompt = engine.conversations.prompt(turn.messages, turn.setting)
            if reuse:
                self._sessions.fetch("", prompt)
            request = GenerationRequest(
                prompt=prompt.token_ids,
                params=params or SamplingParams(),
                grammar=engine.grammar(prompt, turn.setting.tools),
                shown_tokens=engine.dialect.token_ids,
                reuse=reuse,
            )
            reader = engine.dialect.reader(turn.setting.tools, opens_reasoning=prompt.opens_reasoning)
            token_ids: list[int] = []
            for output in engine._outputs(request):
                token_ids += output.token_ids
                reader.feed(output.text, last=output.finish_reason is not None)
                if output.counters is not None:
                    answer = reader.message, token_ids, reader.generated
                    self._sessions.answered(turn, prompt, *answer, output.counters)
                yield output
        finally:
            self._sessions.release(turn)

    def append(self, *new: str | Message) -> None:
        """Extend the conversation without an answer; what is new is computed while nothing else is."""
        self._sessions.append("", self.id, _messages(new))

    def fork(self, keep: int | None = None, *, id: str | None = None) -> "Session":
        """Another conversation that begins with the first `keep` messages, or all; they share the memory of those."""
        return Session(self._engine, self._sessions.fork("", self.id, keep=keep, new_name=id).id, self.tools)

    def rollback(self, keep: int) -> None:
        """Go back to the first `keep` messages."""
        self._sessions.rollback("", self.id, keep=keep)

    def pin(self) -> None:
        """Keep it, and its KV in memory, until it is unpinned."""
        self._sessions.pin("", self.id)

    def unpin(self) -> None:
        """Let it age like others, and its KV be evicted."""
        self._sessions.unpin("", self.id)

    def save(self) -> None:
        """Write its KV to disk before returning; needs an engine with a `state_dir`."""
        self._sessions.save("", self.id)

    def load(self) -> None:
        """Read its KV from disk before returning; needs an engine with a `state_dir`."""
        self._sessions.load("", self.id)

    def delete(self) -> None:
        """Forget it, and free what it alone holds."""
        self._sessions.delete("", self.id)


def _messages(new: Iterable[str | Message]) -> list[Message]:
    return [Message("user", text) if isinstance(text, str) else text for text in new]


def collect(outputs: Iterable[Output]) -> Completion:
    """Join the pieces of an answer."""
    pieces = list(outputs)
    last = pieces[-1]
    assert last.finish_reason is not None
    assert last.counters is not None
    return Completion(
        text="".join(piece.text for piece in pieces),
        token_ids=tuple(token for piece in pieces for token in piece.token_ids),
        logprobs=tuple(logprob for piece in pieces for logprob in piece.logprobs),
        finish_reason=last.finish_reason,
        counters=last.counters,
    )


def _chat_template(model: Model, tokenizer: Tokenizer) -> ChatTemplate | None:
    if (source := model.chat_template) is None:
        return None
    tokens = {"bos_token": model.manifest.bos_token_id, "eos_token": model.manifest.eos_token_id}
    texts = {name: tokenizer.token_bytes(id).decode() for name, id in tokens.items() if id is not None}
    return ChatTemplate(source, texts)
