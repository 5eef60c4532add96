"""The engine in your own process: the same model, memory and scheduling as the server's, without HTTP."""

import queue
import sys
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from slipstream.backend.openvino import OpenVINOBackend
from slipstream.chat import NO_TOOLS, AnswerReader, ChatTemplate, Conversations, Message, Prompt, Schema, ToolUse
from slipstream.chat.answers import answer_grammar
from slipstream.chat.formats import choose_format
from slipstream.chat.schema import closed, closed_parameters, json_rule, literal
from slipstream.config import EngineConfig
from slipstream.engine import (
    EngineCore,
    FinishReason,
    GenerationRequest,
    Output,
    SamplingParams,
    TokenLogprob,
    TurnCounters,
)
from slipstream.engine.generation import as_prompt
from slipstream.engine.grammar import Grammar, GrammarCompiler
from slipstream.errors import InvalidRequestError
from slipstream.models import DEFAULT_MODEL, Model, ModelStore
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
        self.tokenizer = Tokenizer.from_file(self.model.tokenizer_path)
        template = _chat_template(self.model, self.tokenizer)
        source = template.source if template is not None else ""
        self.tool_format = choose_format(source, config.tool_format)
        self._reasons = "<think>" in source
        self.conversations = Conversations(template, self.tokenizer, self.tool_format)
        self.grammars = GrammarCompiler(
            self.model.tokenizer_path, vocab_size=manifest.vocab_size, stop_token_ids=manifest.stop_token_ids
        )
        backend = OpenVINOBackend(self.model.ir_path, kv_memory=config.kv_memory, threads=config.threads)
        sys.setswitchinterval(min(sys.getswitchinterval(), _GIL_SWITCH_SECONDS))
        self.core = EngineCore(
            backend,
            self.tokenizer,
            context_length=manifest.context_length,
            stop_token_ids=frozenset(manifest.stop_token_ids),
            measurements=backend.warm_up(on_warm_up),
            step_target=config.step_target_ms / 1e3,
            max_running=config.max_running,
            max_waiting=config.max_waiting,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self, *, drain_seconds: float = 0.0) -> None:
        """Let running requests finish for so long, abort the rest, and end the engine."""
        self.core.shutdown(drain_seconds=drain_seconds)

    def encode(self, text: str) -> list[int]:
        """Token ids of a plain prompt, with the beginning-of-text token if the model wants one."""
        ids = self.tokenizer.encode(text)
        bos = self.model.manifest.bos_token_id
        return [bos, *ids] if self.model.manifest.add_bos and bos is not None and ids[:1] != [bos] else ids

    def grammar(self, prompt: Prompt, use: ToolUse, response_schema: Schema | None = None) -> Grammar | None:
        """The grammar of the answer to a prompt: calls of tools, JSON of a schema, or None for free text.

        Raises `InvalidRequestError` for a schema that can't be enforced. May take a while; any thread will do.
        """
        param = "response_format" if use.mode == "none" else "tools"
        try:
            source = answer_grammar(
                self.tool_format,
                use,
                response_schema,
                self._mark,
                reasons=self._reasons,
                opens_reasoning=prompt.opens_reasoning,
            )
        except RecursionError:
            message = f"{param} has a schema that is nested too deeply: flatten it, or use $ref"
            raise InvalidRequestError(message, param=param, code="schema_too_complex") from None
        if source is None:
            return None
        try:
            return self.grammars.compile(source, param=param)
        except InvalidRequestError:
            self._blame(use, response_schema)
            raise

    def _blame(self, use: ToolUse, response_schema: Schema | None) -> None:
        """Raise the error of the one schema that can't be enforced, if it is one."""
        for index, tool in enumerate(use.tools):
            if tool in use.callable:
                source = f"start: {json_rule(closed_parameters(tool.parameters))}"
                self.grammars.compile(source, param=f"tools[{index}].function.parameters")
        if response_schema is not None:
            source = f"start: {json_rule(closed(response_schema))}"
            self.grammars.compile(source, param="response_format.json_schema.schema")

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

    def session(self, system: str | None = None, tools: ToolUse = NO_TOOLS) -> "Session":
        """A new conversation, with a system message and tools if they are given."""
        return Session(self, [Message("system", system)] if system is not None else [], tools)

    def _mark(self, text: str) -> str:
        """The Lark expression of a text that may be a special token, which no other text can spell."""
        token = self.tokenizer.token_id(text)
        return f"<[{token}]>" if token is not None and self.tokenizer.is_special(token) else literal(text)

    def _outputs(self, request: GenerationRequest) -> Generator[Output, None, None]:
        outputs: queue.SimpleQueue[Output] = queue.SimpleQueue()
        generation = self.core.submit(request, outputs.put)
        return self._drain(outputs, lambda: self.core.cancel(generation))

    @staticmethod
    def _drain(outputs: "queue.SimpleQueue[Output]", cancel: Callable[[], None]) -> Generator[Output, None, None]:
        finished = False
        try:
            while not finished:
                output = outputs.get()
                finished = output.finish_reason is not None
                if output.error is not None:
                    raise output.error
                yield output
        finally:
            if not finished:
                cancel()


@dataclass(slots=True)
class Session:
    """A conversation with the model; each turn costs its new messages only.

    `messages` holds all of it; after a turn the last one is the answer, with its text and calls.
    """

    engine: Engine
    messages: list[Message] = field(default_factory=list)
    tools: ToolUse = NO_TOOLS

    def send(
        self, *new: str | Message, params: SamplingParams | None = None, tools: ToolUse | None = None
    ) -> Completion:
        """Say something, or hand over the results of calls, and wait for the answer."""
        return collect(self.stream(*new, params=params, tools=tools))

    def stream(
        self, *new: str | Message, params: SamplingParams | None = None, tools: ToolUse | None = None
    ) -> Generator[Output, None, None]:
        """The same, but read the answer as it comes; it joins the conversation when it's finished.

        A string is a user's message. `tools` are the session's own, unless this turn has others.
        """
        asked = [*self.messages, *(Message("user", text) if isinstance(text, str) else text for text in new)]
        use = self.tools if tools is None else tools
        prompt = self.engine.conversations.prompt(asked, use)
        request = GenerationRequest(
            prompt=prompt.token_ids,
            params=params or SamplingParams(),
            grammar=self.engine.grammar(prompt, use),
        )
        reader = AnswerReader(self.engine.tool_format, use, opens_reasoning=prompt.opens_reasoning)
        token_ids: list[int] = []
        for output in self.engine._outputs(request):
            token_ids += output.token_ids
            reader.feed(output.text, last=output.finish_reason is not None)
            if output.finish_reason is not None:
                self.engine.conversations.record(prompt, reader.message, token_ids, reader.generated)
                self.messages = [*asked, reader.message]
            yield output

    def fork(self) -> "Session":
        """Another conversation that begins like this one; they share the memory of what they share."""
        return Session(self.engine, list(self.messages), self.tools)


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
