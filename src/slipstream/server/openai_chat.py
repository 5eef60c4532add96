"""OpenAI's chat completions: `POST /v1/chat/completions`."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from slipstream.chat import AnswerDelta, Setting
from slipstream.chat.setting import reasoning_kwargs
from slipstream.engine import Output, TokenLogprob
from slipstream.runtime import Runtime
from slipstream.server.errors import openai_event, unsupported
from slipstream.server.extension import TurnReport, in_session, session_hint
from slipstream.server.openai_common import (
    DONE,
    Alternatives,
    AtLeastOne,
    Head,
    SamplingFields,
    TextEvents,
    chat_finish_reason,
    check_model,
    event,
    new_head,
    usage_of,
)
from slipstream.server.openai_messages import ChatMessage, chat_messages
from slipstream.server.openai_tools import ResponseFormat, ToolChoice, ToolDefinition, response_schema, tool_use
from slipstream.server.openai_types import (
    ChatAnswer,
    ChatChoice,
    ChatCompletion,
    ChatLogprob,
    ChatLogprobs,
    Function,
    ToolCall,
    TopLogprob,
)
from slipstream.server.stream import EventStream, finish
from slipstream.server.turn import LiveTurn, TurnRunner
from slipstream.tokenizer import Tokenizer
from slipstream.turns import Choice, TurnRequest


class ChatRequest(SamplingFields):
    """The body of a request."""

    messages: list[ChatMessage]
    max_tokens: AtLeastOne | None = None
    max_completion_tokens: AtLeastOne | None = None
    logprobs: bool | None = None
    top_logprobs: Alternatives | None = None
    tools: list[ToolDefinition] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    functions: list[Any] | None = None
    function_call: Any = None
    response_format: ResponseFormat | None = None
    prompt_cache_key: str | None = None

    def turn(self, runtime: Runtime) -> TurnRequest:
        """What it asks for, in no protocol's terms; raises `InvalidRequestError` naming the field."""
        check_model(runtime, self.model)
        if self.functions or self.function_call not in (None, "none", "auto"):
            param = "functions" if self.functions else "function_call"
            raise unsupported(param, "is deprecated: send tools and tool_choice instead")
        if self.top_logprobs and not self.logprobs:
            raise unsupported("top_logprobs", "needs logprobs to be true")
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        tools = tool_use(self.tools, self.tool_choice, parallel=self.parallel_tool_calls is not False)
        return TurnRequest(
            prompt=chat_messages(self.messages),
            params=self.sampling_params(max_tokens=limit, logprobs=logprobs),
            setting=Setting(tools, reasoning_kwargs(self.reasoning_effort) | (self.chat_template_kwargs or {})),
            response_schema=response_schema(self.response_format),
            choices=self.n or 1,
            session_hint=session_hint(self.prompt_cache_key),
            **self.switches(),
        )


def router(runner: TurnRunner) -> APIRouter:
    """The routes of this protocol."""
    routes = APIRouter()
    runtime = runner.runtime

    @routes.post("/v1/chat/completions")
    async def chat_completions(http: Request, body: ChatRequest) -> Response:
        turn = await runner.start([in_session(body.turn(runtime), http)])
        head = new_head(runtime, "chatcmpl")
        if body.stream:
            writer = _ChunkWriter(head, runtime.tokenizer, include_usage=body.include_usage)
            return EventStream(turn, _stream(turn, writer), openai_event)
        await finish(http, turn)
        whole = _whole(turn, head, runtime.tokenizer)
        return Response(whole.model_dump_json(exclude_unset=True), media_type="application/json")

    return routes


def _whole(turn: LiveTurn, head: Head, tokenizer: Tokenizer) -> ChatCompletion:
    choices = []
    for choice in turn.choices:
        answer = choice.answer
        logprobs = _logprobs(answer.logprobs, tokenizer)
        reason = chat_finish_reason(answer.finish_reason, calls=choice.reader.calls_to_run)
        choices.append(
            ChatChoice(
                index=choice.index,
                message=_message(choice),
                finish_reason=reason,
                logprobs=ChatLogprobs(content=logprobs, refusal=None) if choice.wants_logprobs else None,
            )
        )
    report = TurnReport.of(turn)
    return ChatCompletion(**head, object="chat.completion", choices=choices, usage=usage_of(report), slipstream=report)


def _message(choice: Choice) -> ChatAnswer:
    """The answer; `content` is null where there are calls alone."""
    message = choice.message
    result = ChatAnswer(
        role="assistant", content=None if message.tool_calls and not message.text else message.text, refusal=None
    )
    if message.tool_calls:
        result.tool_calls = [
            ToolCall(id=call.id, type="function", function=Function(name=call.name, arguments=call.arguments))
            for call in message.tool_calls
        ]
    if choice.reader.reasoning:
        result.reasoning_content = choice.reader.reasoning
    return result


async def _stream(turn: LiveTurn, writer: "_ChunkWriter") -> AsyncIterator[bytes]:
    """For each choice its role, its text piece by piece, and its finish reason; at the end the usage, if wanted."""
    unfinished = len(turn.choices)
    async for batch in turn.batches():
        events = []
        for choice, output, deltas in batch:
            if output is choice.outputs[0]:
                events.append(writer.role_chunk(choice))
            logprobs = output.logprobs
            for delta in deltas or ([AnswerDelta()] if logprobs else []):
                events.append(writer.piece(choice, delta, logprobs))
                logprobs = ()
            if output.finish_reason is not None:
                unfinished -= 1
                report = None if unfinished or writer.include_usage else TurnReport.of(turn)
                events.append(writer.end(choice, output, report))
        if events:
            yield b"".join(events)
    if writer.include_usage:
        yield writer.usage(TurnReport.of(turn))
    yield DONE


class _ChunkWriter:
    """Writes the chunks of one stream as events."""

    def __init__(self, head: Head, tokenizer: Tokenizer, *, include_usage: bool) -> None:
        self.include_usage = include_usage
        self._head = head
        self._tokenizer = tokenizer
        self._text_events: dict[Choice, TextEvents] = {}

    def role_chunk(self, choice: Choice) -> bytes:
        """The chunk with the role."""
        sample = self._delta(choice, ChatAnswer(content=TextEvents.PLACEHOLDER))
        self._text_events[choice] = TextEvents(self._chunk(sample))
        return event(self._chunk(self._delta(choice, ChatAnswer(role="assistant", content=""))))

    def piece(self, choice: Choice, piece: AnswerDelta, logprobs: Sequence[TokenLogprob]) -> bytes:
        """A chunk with text, reasoning, the name of a function or a piece of its arguments."""
        if piece.text and not logprobs:
            return self._text_events[choice](piece.text)
        delta = self._delta(choice, self._said(piece))
        if logprobs:
            delta.logprobs = ChatLogprobs(content=_logprobs(logprobs, self._tokenizer), refusal=None)
        return event(self._chunk(delta))

    @staticmethod
    def _said(piece: AnswerDelta) -> ChatAnswer:
        if piece.text:
            return ChatAnswer(content=piece.text)
        if piece.reasoning:
            return ChatAnswer(reasoning_content=piece.reasoning)
        if piece == AnswerDelta():
            return ChatAnswer()
        call = ToolCall(index=piece.index, function=Function(arguments=piece.arguments))
        if piece.id is not None:
            function = Function(name=piece.name, arguments="")
            call = ToolCall(index=piece.index, id=piece.id, type="function", function=function)
        return ChatAnswer(tool_calls=[call])

    def end(self, choice: Choice, output: Output, report: TurnReport | None) -> bytes:
        """The chunk with the finish reason; with a report it's the last of the stream."""
        delta = self._delta(choice, ChatAnswer())
        delta.finish_reason = chat_finish_reason(output.finish_reason, calls=choice.reader.calls_to_run)
        return event(self._chunk(delta) if report is None else self._chunk(delta, slipstream=report))

    def usage(self, report: TurnReport) -> bytes:
        """The chunk for the usage alone."""
        return event(self._chunk(usage=usage_of(report), slipstream=report))

    def _delta(self, choice: Choice, delta: ChatAnswer) -> ChatChoice:
        return ChatChoice(index=choice.index, delta=delta, finish_reason=None)

    def _chunk(self, *choices: ChatChoice, **last: Any) -> ChatCompletion:
        if self.include_usage:
            last.setdefault("usage", None)
        return ChatCompletion(**self._head, object="chat.completion.chunk", choices=list(choices), **last)


def _logprobs(logprobs: Sequence[TokenLogprob], tokenizer: Tokenizer) -> list[ChatLogprob]:
    return [
        ChatLogprob(
            **_token(entry.token_id, entry.logprob, tokenizer),
            top_logprobs=[TopLogprob(**_token(token, logprob, tokenizer)) for token, logprob in entry.top],
        )
        for entry in logprobs
    ]


def _token(token: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    spelled = tokenizer.token_bytes(token)
    return {"token": spelled.decode(errors="replace"), "logprob": logprob, "bytes": list(spelled)}
