"""OpenAI's completions of plain text: `POST /v1/completions`."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, Request, Response
from pydantic import BeforeValidator

from slipstream.engine import TokenLogprob
from slipstream.server.errors import unsupported
from slipstream.server.openai_common import (
    Alternatives,
    AtLeastOne,
    CompletionAnswer,
    SamplingFields,
    finish_reason,
)
from slipstream.server.openapi import WHOLE_OR_STREAM
from slipstream.server.stream import respond
from slipstream.server.turn import LiveTurn, TurnRunner
from slipstream.turns import Choice, Piece, TurnRequest

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

    def turns(self) -> list[TurnRequest]:
        """What it asks for, prompt by prompt, in no protocol's terms; raises `InvalidRequestError`."""
        if self.echo:
            raise unsupported("echo", "is not supported: leave it out and put the prompt before the answer")
        if self.suffix:
            raise unsupported("suffix", "is not supported: leave it out")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise unsupported("best_of", "is not supported: ask for as many with n and choose yourself")
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


def add_routes(app: FastAPI, runner: TurnRunner) -> None:
    """Add the routes of this protocol."""

    @app.post("/v1/completions", responses=WHOLE_OR_STREAM)
    async def completions(http: Request, body: CompletionRequest) -> Response:
        model = runner.names.check(body.model)
        turn = await runner.start(body.turns, http)
        return await respond(http, TextAnswer(turn, model, body), stream=body.stream)


class TextAnswer(CompletionAnswer):
    """Completions of plain prompts. In a stream a choice's last piece of text has its finish reason."""

    id_prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, turn: LiveTurn, model: str, body: SamplingFields) -> None:
        super().__init__(turn, model, body)
        self._lengths = [0] * len(turn.choices)
        """How many characters the tokens of each choice have so far."""

    def choice(self, choice: Choice) -> dict[str, Any]:
        """The text, and if they are wanted, log-probabilities."""
        answer = choice.answer
        logprobs = self._logprobs(choice, answer.logprobs) if choice.wants_logprobs else None
        return _piece(choice, answer.text, logprobs) | {"finish_reason": finish_reason(choice)}

    def pieces(self, piece: Piece) -> list[dict[str, Any]]:
        """The text, if there is any."""
        choice, output, _ = piece
        text = _piece(choice, output.text, self._logprobs(choice, output.logprobs) if output.logprobs else None)
        if output.finish_reason is not None:
            return [text | {"finish_reason": finish_reason(choice)}]
        return [text] if output.text or output.logprobs else []

    def _logprobs(self, choice: Choice, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        """Log-probabilities of the next tokens of a choice in columns, with each token's place in the text."""
        tokens = [self.token_text(entry.token_id) for entry in logprobs]
        *offsets, self._lengths[choice.index] = accumulate(map(len, tokens), initial=self._lengths[choice.index])
        return {
            "tokens": tokens,
            "token_logprobs": [entry.logprob for entry in logprobs],
            "top_logprobs": [self._alternatives(entry) for entry in logprobs],
            "text_offset": offsets,
        }

    def _alternatives(self, entry: TokenLogprob) -> dict[str, float]:
        """The likeliest tokens, and the chosen one in any case."""
        likely = (*entry.top, (entry.token_id, entry.logprob))
        return {self.token_text(token): logprob for token, logprob in likely}


def _piece(choice: Choice, text: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
    return {"index": choice.index, "text": text, "finish_reason": None, "logprobs": logprobs}
