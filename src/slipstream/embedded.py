"""The engine in your own process: the same model, memory and scheduling as the server's, without HTTP."""

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from slipstream.chat import NO_TOOLS, Message, Schema, Setting, ToolUse
from slipstream.config import EngineConfig
from slipstream.engine import Output, SamplingParams, as_prompt
from slipstream.errors import SessionNotFoundError
from slipstream.models import DEFAULT_MODEL, Model, ModelStore
from slipstream.runtime import Progress, Runtime
from slipstream.sessions import SessionInfo
from slipstream.turns import Choice, Completion, Piece, TurnRequest


class Stream(Iterator[Output]):
    """An answer as it comes, piece by piece. Close it, or use it in a `with` statement, to cancel what is left."""

    def __init__(self, pieces: Generator[Piece, None, None]) -> None:
        self._pieces = pieces
        self._finished: Choice | None = None
        """The answer, once it was read to its end."""

    def __next__(self) -> Output:
        choice, output, _ = next(self._pieces)
        if output.finish_reason is not None:
            self._finished = choice
        return output

    @property
    def completion(self) -> Completion:
        """All of the answer, with its warnings, once it was read to its end; raises `RuntimeError` before."""
        if self._finished is None:
            raise RuntimeError("the answer is not finished: read the stream to its end first")
        return self._finished.answer

    @property
    def warnings(self) -> tuple[str, ...]:
        """The warnings of the `completion`."""
        return self.completion.warnings

    def close(self) -> None:
        """Cancel what is left; harmless when nothing is."""
        self._pieces.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Engine(Runtime):
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
        on_warm_up: Progress | None = None,
    ) -> None:
        model = model if isinstance(model, Model) else ModelStore().ensure(str(model))
        super().__init__(model, config or EngineConfig(), on_warm_up=on_warm_up)

    def generate(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None, *, reuse: bool = True
    ) -> Completion:
        """Continue a text, or token ids; returns when the answer is finished."""
        (completion,) = self.answer(_plain(prompt, params, reuse=reuse))
        return completion

    def stream(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None, *, reuse: bool = True
    ) -> Stream:
        """Continue a text, or token ids, piece by piece."""
        return self.outputs(_plain(prompt, params, reuse=reuse))

    def answer(self, request: TurnRequest) -> list[Completion]:
        """The answers to a request, as many as its `choices`: all that a turn can be, see `TurnRequest`."""
        choices = {piece.choice: None for piece in self.turns.stream(request)}
        return [choice.answer for choice in sorted(choices, key=lambda choice: choice.index)]

    def outputs(self, request: TurnRequest) -> Stream:
        """The answer to a request for one, piece by piece."""
        return Stream(self.turns.stream(request))

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
        return Session(self, state.id, tools if tools.tools else replace(tools, tools=state.setting.tools.tools))


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
        self,
        *new: str | Message,
        params: SamplingParams | None = None,
        tools: ToolUse | None = None,
        response_schema: Schema | None = None,
    ) -> Completion:
        """Say something, or hand over the results of calls, and wait for the answer.

        Its `warnings` name what the grammar can't hold of a schema, and what doesn't fit in the end.
        """
        stream = self.stream(*new, params=params, tools=tools, response_schema=response_schema)
        for _ in stream:
            pass
        return stream.completion

    def stream(
        self,
        *new: str | Message,
        params: SamplingParams | None = None,
        tools: ToolUse | None = None,
        response_schema: Schema | None = None,
        reuse: bool = True,
    ) -> Stream:
        """The same, but read the answer as it comes; it joins the conversation when it's finished.

        A string is a user's message. `tools` are the session's own, unless this turn has others. What is no call fits
        the `response_schema`, if there is one. Without `reuse` all of it is computed afresh, for comparison.
        """
        request = TurnRequest(
            prompt=_messages(new),
            params=params or SamplingParams(),
            setting=Setting(self.tools if tools is None else tools),
            response_schema=response_schema,
            session_id=self.id,
            continues=True,
            reuse=reuse,
        )
        return self._engine.outputs(request)

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


def _messages(new: Iterable[str | Message]) -> tuple[Message, ...]:
    return tuple(Message("user", text) if isinstance(text, str) else text for text in new)


def _plain(prompt: str | Sequence[int], params: SamplingParams | None, *, reuse: bool) -> TurnRequest:
    given = prompt if isinstance(prompt, str) else as_prompt(prompt)
    return TurnRequest(prompt=given, params=params or SamplingParams(), reuse=reuse)
