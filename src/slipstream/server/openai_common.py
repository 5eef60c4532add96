"""What OpenAI's chat and completion requests and responses have in common."""

import secrets
import time
from abc import abstractmethod
from dataclasses import fields
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field
from pydantic_core import to_json

from slipstream.engine import SamplingParams
from slipstream.server.extension import SlipstreamOptions, report_of
from slipstream.server.stream import Answer, event
from slipstream.server.turn import LiveTurn
from slipstream.turns import Choice, Piece

_DONE = b"data: [DONE]\n\n"

_TIERS = {"flex": -2, "priority": 2}
"""Priorities of OpenAI's service tiers; all others are the default."""

AtLeastOne = Annotated[int, Field(ge=1)]
Alternatives = Annotated[int, Field(ge=0, le=20)]
StopStrings = Annotated[tuple[str, ...], BeforeValidator(lambda stop: [stop] if isinstance(stop, str) else stop)]

_SAMPLING = {field.name for field in fields(SamplingParams)} - {"max_tokens", "logprobs"}


class StreamOptions(BaseModel):
    """`stream_options`."""

    include_usage: bool | None = None


class SamplingFields(BaseModel):
    """Fields of a request that mean the same for both. What isn't known is ignored, as other servers do.

    A null is as good as nothing. `top_k` -1 is off, as vLLM's clients send it.
    """

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Annotated[int | None, AfterValidator(lambda count: 0 if count == -1 else count)] = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    stop: StopStrings | None = None
    stop_token_ids: tuple[int, ...] | None = None
    ignore_eos: bool | None = None
    n: Annotated[int | None, Field(ge=1)] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    service_tier: str | None = None
    slipstream: SlipstreamOptions | None = None

    def sampling_params(self, *, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """These fields, and two that the protocols spell differently, with the defaults for what is null."""
        given = self.model_dump(include=_SAMPLING, exclude_none=True)
        return SamplingParams(**given, max_tokens=max_tokens, logprobs=logprobs)

    def switches(self) -> dict[str, Any]:
        """The `slipstream` object's part of a `TurnRequest`; the service tier stands in for a priority."""
        given = self.slipstream or SlipstreamOptions()
        switches = given.model_dump()
        if "priority" not in given.model_fields_set and self.service_tier is not None:
            switches["priority"] = _TIERS.get(self.service_tier, 0)
        return switches


def finish_reason(choice: Choice) -> Literal["stop", "length", "tool_calls"]:
    """OpenAI's word for the end of a finished answer."""
    if choice.outputs[-1].finish_reason == "length":
        return "length"
    return "tool_calls" if choice.reader.calls_to_run else "stop"


class CompletionAnswer(Answer):
    """A completion of either protocol: an object with all choices, or chunks with one piece of a choice each.

    `id_prefix` begins the id, `kind` and `chunk_kind` say in `object` what it is.
    """

    id_prefix: ClassVar[str]
    kind: ClassVar[str]
    chunk_kind: ClassVar[str]

    def __init__(self, turn: LiveTurn, model: str, body: SamplingFields) -> None:
        super().__init__(turn)
        runtime = turn.runner.runtime
        self.tokenizer = runtime.tokenizer
        self._include_usage = bool(body.stream_options and body.stream_options.include_usage)
        """Whether a stream ends with a chunk for the usage alone."""
        self._unfinished = len(turn.choices)
        self._head = {
            "id": f"{self.id_prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": f"fp_{runtime.model.fingerprint[:12]}",
        }

    @abstractmethod
    def choice(self, choice: Choice) -> dict[str, Any]:
        """A finished answer."""

    @abstractmethod
    def pieces(self, piece: Piece) -> list[dict[str, Any]]:
        """A piece of an answer, as one or more in the protocol's form; the last of an answer has its finish reason."""

    async def whole(self) -> bytes:
        """All choices, and what they cost."""
        choices = [self.choice(choice) for choice in self.turn.choices]
        return to_json(self._head | self._cost() | {"object": self.kind, "choices": choices}, inf_nan_mode="null")

    def events(self, piece: Piece) -> list[bytes]:
        """A chunk for each piece. The last of a stream has the report, unless one for the usage follows."""
        pieces, cost = self.pieces(piece), {}
        if piece.output.finish_reason is not None:
            self._unfinished -= 1
            if not self._unfinished and not self._include_usage:
                cost = {"slipstream": report_of(self.turn)}
        return [event(self._chunk(each, **(cost if each is pieces[-1] else {}))) for each in pieces]

    def alive(self) -> bytes:
        """A comment, or a chunk without choices if the request wants to see the progress."""
        progress = self.progress()
        return event(self._chunk(**progress)) if progress else super().alive()

    async def end(self) -> bytes:
        """The chunk for the usage alone, if it's wanted, and the mark of the end."""
        return event(self._chunk(**self._cost())) + _DONE if self._include_usage else _DONE

    def token_text(self, token_id: int) -> str:
        """The text of a token; bytes that are no text alone are replaced."""
        return self.tokenizer.token_bytes(token_id).decode(errors="replace")

    def _cost(self) -> dict[str, Any]:
        """The usage, and the report. What was computed counts as written to the cache, unless nothing is kept."""
        report = report_of(self.turn)
        prompt, completion = report["prompt_tokens"], report["completion_tokens"]
        usage = {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {
                "cached_tokens": report["reused_tokens"],
                "cache_write_tokens": report["delta_tokens"] if self.turn.choices[0].request.reuse else 0,
            },
        }
        return {"usage": usage, "slipstream": report}

    def _chunk(self, *choices: dict[str, Any], **cost: Any) -> dict[str, Any]:
        usage = {"usage": None} if self._include_usage else {}
        return self._head | usage | cost | {"object": self.chunk_kind, "choices": choices}
