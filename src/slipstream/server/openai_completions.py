"""OpenAI's completions of plain text: `POST /v1/completions`."""

from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Request, Response
from pydantic import BeforeValidator

from slipstream.engine import Output, TokenLogprob
from slipstream.runtime import Runtime
from slipstream.server.errors import openai_event, unsupported
from slipstream.server.extension import TurnReport
from slipstream.server.openai_common import (
    DONE,
    Alternatives,
    AtLeastOne,
    Head,
    SamplingFields,
    TextEvents,
    check_model,
    event,
    finish_reason,
    new_head,
    usage_of,
)
from slipstream.server.openai_types import TextChoice, TextCompletion, TextLogprobs
from slipstream.server.stream import EventStream, finish
from slipstream.server.turn import LiveTurn, TurnRunner
from slipstream.tokenizer import Tokenizer
from slipstream.turns import Choice, TurnRequest

DEFAULT_MAX_TOKENS = 16
"""OpenAI's."""


def _as_prompts(value: object) -> list[object]:
    """Whatever form a prompt may have, as a list of texts and lists of token ids."""
    if isinstance(value, str) or _are_tokens(value):
        return [value]
    if isinstance(value, list) and value and all(isinstance(item, str) or _are_tokens(item) for item in value):
        return value
    raise ValueError("must be a text, a list of token ids, or a list of texts or of lists of token ids")


def _are_tokens(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int and 0 <= item < 2**31 for item in value)


class CompletionRequest(SamplingFields):
    """The body of a request. A `prompt` is text or token ids, and there may be a list of them."""

    prompt: Annotated[list[str | list[int]], BeforeValidator(_as_prompts)]
    max_tokens: AtLeastOne | None = None
    logprobs: Alternatives | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None

    def turns(self, runtime: Runtime) -> list[TurnRequest]:
        """What it asks for, prompt by prompt, in no protocol's terms; raises `InvalidRequestError`."""
        check_model(runtime, self.model)
        self._refuse_unsupported()
        limit = DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens
        params = self.sampling_params(max_tokens=limit, logprobs=self.logprobs)
        return [
            TurnRequest(
                prompt=prompt if isinstance(prompt, str) else np.asarray(prompt, np.int32),
                params=params,
                choices=self.n or 1,
                **self.switches(),
            )
            for prompt in self.prompt
        ]

    def _refuse_unsupported(self) -> None:
        if self.echo:
            raise unsupported("echo", "is not supported: leave it out and put the prompt before the answer")
        if self.suffix:
            raise unsupported("suffix", "is not supported: leave it out")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise unsupported("best_of", "is not supported: ask for as many with n and choose yourself")


def router(runner: TurnRunner) -> APIRouter:
    """The routes of this protocol."""
    routes = APIRouter()
    runtime = runner.runtime

    @routes.post("/v1/completions")
    async def completions(http: Request, body: CompletionRequest) -> Response:
        turn = await runner.start(body.turns(runtime))
        head = new_head(runtime, "cmpl")
        if body.stream:
            writer = _ChunkWriter(head, runtime.tokenizer, turn.choices, include_usage=body.include_usage)
            return EventStream(turn, _stream(turn, writer), openai_event)
        await finish(http, turn)
        whole = _whole(turn, head, runtime.tokenizer)
        return Response(whole.model_dump_json(exclude_unset=True), media_type="application/json")

    return routes


def _whole(turn: LiveTurn, head: Head, tokenizer: Tokenizer) -> TextCompletion:
    report = TurnReport.of(turn)
    choices: list[TextChoice] = []
    for choice in turn.choices:
        answer = choice.answer
        choices.append(
            TextChoice(
                index=choice.index,
                text=answer.text,
                finish_reason=finish_reason(answer.finish_reason),
                logprobs=_LogprobsWriter(tokenizer).write(answer.logprobs) if choice.wants_logprobs else None,
            )
        )
    return TextCompletion(**head, object="text_completion", choices=choices, usage=usage_of(report), slipstream=report)


async def _stream(turn: LiveTurn, writer: "_ChunkWriter") -> AsyncIterator[bytes]:
    """Each choice's text piece by piece, the last piece with its finish reason; at the end the usage, if wanted."""
    unfinished = len(turn.choices)
    async for batch in turn.batches():
        events = []
        for choice, output, _ in batch:
            if output.finish_reason is not None:
                unfinished -= 1
                report = None if unfinished or writer.include_usage else TurnReport.of(turn)
                events.append(writer.piece(choice, output, report))
            elif output.text or output.logprobs:
                events.append(writer.piece(choice, output))
        if events:
            yield b"".join(events)
    if writer.include_usage:
        yield writer.usage(TurnReport.of(turn))
    yield DONE


class _ChunkWriter:
    """Writes the chunks of one stream as events."""

    def __init__(self, head: Head, tokenizer: Tokenizer, choices: Sequence[Choice], *, include_usage: bool) -> None:
        self.include_usage = include_usage
        self._head = head
        samples = {choice: self._choice(choice, TextEvents.PLACEHOLDER) for choice in choices}
        self._text_events = {choice: TextEvents(self._chunk(sample)) for choice, sample in samples.items()}
        self._logprobs = {choice: _LogprobsWriter(tokenizer) for choice in choices}

    def piece(self, choice: Choice, output: Output, report: TurnReport | None = None) -> bytes:
        """A chunk with text; with a report it's the last of the stream."""
        if output.finish_reason is None and not output.logprobs:
            return self._text_events[choice](output.text)
        piece = self._choice(choice, output.text)
        if output.logprobs:
            piece.logprobs = self._logprobs[choice].write(output.logprobs)
        if output.finish_reason is not None:
            piece.finish_reason = finish_reason(output.finish_reason)
        return event(self._chunk(piece) if report is None else self._chunk(piece, slipstream=report))

    def usage(self, report: TurnReport) -> bytes:
        """The chunk for the usage alone."""
        return event(self._chunk(usage=usage_of(report), slipstream=report))

    def _choice(self, choice: Choice, text: str) -> TextChoice:
        return TextChoice(index=choice.index, text=text, finish_reason=None, logprobs=None)

    def _chunk(self, *choices: TextChoice, **last: Any) -> TextCompletion:
        if self.include_usage:
            last.setdefault("usage", None)
        return TextCompletion(**self._head, object="text_completion", choices=list(choices), **last)


class _LogprobsWriter:
    """Log-probabilities of one choice in this protocol's columns, with each token's place in the text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._offset = 0

    def write(self, logprobs: Sequence[TokenLogprob]) -> TextLogprobs:
        """The columns for the next tokens of the choice."""
        tokens = [self._text(entry.token_id) for entry in logprobs]
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(token)
        return TextLogprobs(
            tokens=tokens,
            token_logprobs=[entry.logprob for entry in logprobs],
            top_logprobs=[self._alternatives(entry) for entry in logprobs],
            text_offset=offsets,
        )

    def _alternatives(self, entry: TokenLogprob) -> dict[str, float]:
        """The likeliest tokens, and the chosen one in any case."""
        return {self._text(token): logprob for token, logprob in (*entry.top, (entry.token_id, entry.logprob))}

    def _text(self, token: int) -> str:
        return self._tokenizer.token_bytes(token).decode(errors="replace")
