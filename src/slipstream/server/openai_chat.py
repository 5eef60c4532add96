"""OpenAI's chat completions: `POST /v1/chat/completions`."""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request, Response

from slipstream.chat import AnswerDelta, Setting, ToolCall
from slipstream.chat.setting import reasoning_kwargs
from slipstream.engine import TokenLogprob
from slipstream.server.custom_tools import InputReader
from slipstream.server.errors import unsupported
from slipstream.server.extension import in_session, session_hint
from slipstream.server.openai_common import (
    Alternatives,
    AtLeastOne,
    CompletionAnswer,
    SamplingFields,
    finish_reason,
)
from slipstream.server.openai_messages import ChatMessage, chat_messages
from slipstream.server.openai_tools import (
    ResponseFormat,
    ToolChoice,
    ToolDefinition,
    call_objects,
    chat_tools,
    response_schema,
    tool_use,
)
from slipstream.server.openapi import WHOLE_OR_STREAM
from slipstream.server.stream import respond
from slipstream.server.turn import LiveTurn, TurnRunner
from slipstream.turns import Choice, Piece, TurnRequest


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

    def turn(self) -> TurnRequest:
        """What it asks for, in no protocol's terms; raises `InvalidRequestError` naming the field."""
        if self.functions or self.function_call not in (None, "none", "auto"):
            param = "functions" if self.functions else "function_call"
            raise unsupported(param, "is deprecated: send tools and tool_choice instead")
        if self.top_logprobs and not self.logprobs:
            raise unsupported("top_logprobs", "needs logprobs to be true")
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        tools = tool_use(chat_tools(self.tools), self.tool_choice, parallel=self.parallel_tool_calls is not False)
        wanted = self.response_format
        return TurnRequest(
            prompt=chat_messages(self.messages),
            params=self.sampling_params(max_tokens=limit, logprobs=logprobs),
            setting=Setting(tools, reasoning_kwargs(self.reasoning_effort) | (self.chat_template_kwargs or {})),
            response_schema=response_schema(wanted.type, wanted.json_schema) if wanted else None,
            response_strict=bool(wanted and wanted.json_schema and wanted.json_schema.strict),
            choices=self.n or 1,
            session_hint=session_hint(self.prompt_cache_key),
            **self.switches(),
        )


def add_routes(app: FastAPI, runner: TurnRunner) -> None:
    """Add the routes of this protocol."""

    @app.post("/v1/chat/completions", responses=WHOLE_OR_STREAM)
    async def chat_completions(http: Request, body: ChatRequest) -> Response:
        model = runner.names.check(body.model)
        turn = await runner.start(lambda: [in_session(body.turn(), http)], http)
        return await respond(http, ChatAnswer(turn, model, body), stream=body.stream)


class ChatAnswer(CompletionAnswer):
    """Chat completions. In a stream a choice has its role first, and its finish reason last."""

    id_prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, turn: LiveTurn, model: str, body: SamplingFields) -> None:
        super().__init__(turn, model, body)
        self._begun: set[int] = set()
        """The choices whose role was told."""
        self._inputs: dict[tuple[int, int], InputReader] = {}
        """Of calls of custom tools, by their choices and places in these."""

    def choice(self, choice: Choice) -> dict[str, Any]:
        """The answer as a message; its `content` is null where there are calls alone."""
        text, calls = choice.reader.message.text, choice.reader.message.tool_calls
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if calls and not text else text,
            "refusal": None,
        }
        if choice.reader.reasoning:
            message["reasoning_content"] = choice.reader.reasoning
        if calls:
            message["tool_calls"] = call_objects(calls, choice.tools.tools)
        logprobs = self._logprobs(choice.answer.logprobs) if choice.wants_logprobs else None
        return {"index": choice.index, "message": message, "finish_reason": finish_reason(choice), "logprobs": logprobs}

    def pieces(self, piece: Piece) -> list[dict[str, Any]]:
        """Its role, text, reasoning, the name of a function or a piece of its arguments, and finish reason."""
        choice, output, deltas = piece
        pieces = [_piece(choice, said) for delta in deltas if (said := self._said(choice, delta))]
        if output.logprobs:
            pieces = pieces or [_piece(choice, {})]
            pieces[0]["logprobs"] = self._logprobs(output.logprobs)
        last = output.finish_reason is not None
        if choice.index not in self._begun and (pieces or last):
            self._begun.add(choice.index)
            # What begins with a call has no text: some clients would keep an empty one, and send it back.
            first = deltas[0] if deltas else AnswerDelta()
            content = None if first.id is not None or first.reasoning else ""
            pieces.insert(0, _piece(choice, {"role": "assistant", "content": content}))
        if last:
            pieces.append(_piece(choice, {}) | {"finish_reason": finish_reason(choice)})
        return pieces

    def _said(self, choice: Choice, delta: AnswerDelta) -> dict[str, Any]:
        """The delta of a piece; empty if it's one of a custom tool's arguments that says nothing of its input."""
        if delta.text:
            return {"content": delta.text}
        if delta.reasoning:
            return {"reasoning_content": delta.reasoning}
        place = choice.index, delta.index
        if delta.id is not None:
            (call,) = call_objects([ToolCall(delta.id, delta.name or "", "")], choice.tools.tools)
            if call["type"] == "custom":
                self._inputs[place] = InputReader()
        elif place in self._inputs:
            input = self._inputs[place].feed(delta.arguments)
            if not input:
                return {}
            call = {"custom": {"input": input}}
        else:
            call = {"function": {"arguments": delta.arguments}}
        return {"tool_calls": [{"index": delta.index, **call}]}

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        content = [
            self._token(entry.token_id, entry.logprob)
            | {"top_logprobs": [self._token(token, logprob) for token, logprob in entry.top]}
            for entry in logprobs
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        spelled = list(self.tokenizer.token_bytes(token))
        return {"token": self.token_text(token), "logprob": logprob, "bytes": spelled}


def _piece(choice: Choice, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": choice.index, "delta": delta, "finish_reason": None}
