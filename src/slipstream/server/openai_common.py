"""What OpenAI's chat and completion requests and responses have in common."""

import json
import secrets
import time
from dataclasses import fields
from typing import Annotated, Any, Literal, TypedDict

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field

from slipstream.engine import FinishReason, SamplingParams
from slipstream.errors import InvalidRequestError
from slipstream.runtime import Runtime
from slipstream.server.extension import SlipstreamOptions, TurnReport
from slipstream.server.openai_types import PromptTokensDetails, Usage
from slipstream.server.turn import MAX_CHOICES

DONE = b"data: [DONE]\n\n"

AtLeastOne = Annotated[int, Field(ge=1)]
Alternatives = Annotated[int, Field(ge=0, le=20)]

_SAMPLING = {field.name for field in fields(SamplingParams)} - {"max_tokens", "logprobs"}


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


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
    stop: Annotated[tuple[str, ...] | None, BeforeValidator(_as_list)] = None
    stop_token_ids: tuple[int, ...] | None = None
    ignore_eos: bool | None = None
    n: Annotated[int | None, Field(ge=1, le=MAX_CHOICES)] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    slipstream: SlipstreamOptions | None = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk for the usage alone."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling_params(self, *, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """These fields, and two that the protocols spell differently, with the defaults for what is null."""
        given = self.model_dump(include=_SAMPLING, exclude_none=True)
        return SamplingParams(**given, max_tokens=max_tokens, logprobs=logprobs)

    def switches(self) -> dict[str, Any]:
        """The `slipstream` object's part of a `TurnRequest`."""
        return (self.slipstream or SlipstreamOptions()).model_dump()


class Head(TypedDict):
    """The fields that a response shares with all chunks of its stream."""

    id: str
    created: int
    model: str
    system_fingerprint: str


def new_head(runtime: Runtime, prefix: str) -> Head:
    """The head of a new response; its id begins with the prefix."""
    return {
        "id": f"{prefix}-{secrets.token_hex(12)}",
        "created": int(time.time()),
        "model": runtime.model.name,
        "system_fingerprint": f"fp_{runtime.model.fingerprint[:12]}",
    }


def check_model(runtime: Runtime, asked: str | None) -> None:
    """Raise `InvalidRequestError` if a request asks for a model that isn't served; None takes what there is."""
    if asked is not None and asked != runtime.model.name:
        message = f"the model {asked!r} is not served here; served: {runtime.model.name!r}"
        raise InvalidRequestError(message, param="model", code="model_not_found")


def usage_of(report: TurnReport) -> Usage:
    """OpenAI's `usage`."""
    return Usage(
        prompt_tokens=report.prompt_tokens,
        completion_tokens=report.completion_tokens,
        total_tokens=report.prompt_tokens + report.completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=report.reused_tokens),
    )


def finish_reason(reason: FinishReason | None) -> Literal["stop", "length"]:
    """OpenAI's word for the end of an answer that has come to one."""
    return "length" if reason == "length" else "stop"


def chat_finish_reason(reason: FinishReason | None, *, calls: bool) -> Literal["stop", "length", "tool_calls"]:
    """The same for an answer that may end in `calls` to run."""
    plain = finish_reason(reason)
    return "tool_calls" if calls and plain == "stop" else plain


def event(chunk: BaseModel) -> bytes:
    """The server-sent event of a chunk; fields that were never set are left out."""
    return b"data: %b\n\n" % chunk.model_dump_json(exclude_unset=True).encode()


class TextEvents:
    """Events of chunks that differ in one text alone.

    Between two steps of the model, making such a chunk as an object and writing it out takes the server about 150 us
    (it is 10 us in a loop, but here no cache is warm), filling a text in takes 10. `sample` has `PLACEHOLDER` for it.
    """

    PLACEHOLDER = "{slipstream text}"

    def __init__(self, sample: BaseModel) -> None:
        self._before, self._after = event(sample).split(json.dumps(self.PLACEHOLDER).encode())

    def __call__(self, text: str) -> bytes:
        """The event with that text."""
        return b"%b%b%b" % (self._before, json.dumps(text).encode(), self._after)
