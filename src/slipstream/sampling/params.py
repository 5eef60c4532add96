"""What a request may ask of decoding."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from slipstream.errors import InvalidRequestError
from slipstream.fields import Field


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when to stop; validated on construction.

    `temperature` 0 is greedy. `max_tokens` None means as many as context and memory allow. `top_k` 0 is off; `top_p` 0
    leaves the likeliest token alone. Presence
    and frequency penalties count generated tokens (OpenAI); `repetition_penalty` divides positive and multiplies
    negative logits of all tokens seen (CTRL, arXiv 1909.05858). `min_p` drops tokens less likely than that share of the
    likeliest (arXiv 2407.01082). `seed` None draws one. `logprobs` is how many alternatives to report for each
    token, 0 for the chosen one alone, None for no log-probabilities.

    Raises `InvalidRequestError` naming the parameter that is out of range.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    """Neither stop at an end-of-turn token nor forbid it; for benchmarks."""
    logprobs: int | None = None

    def __post_init__(self) -> None:
        _require(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", "must be at least 1")
        _require(0.0 <= self.temperature <= 100.0, "temperature", "must be between 0 and 100")
        _require(0.0 <= self.top_p <= 1.0, "top_p", "must be between 0 and 1")
        _require(self.top_k >= 0, "top_k", "must be 0 (off) or more")
        _require(0.0 <= self.min_p <= 1.0, "min_p", "must be between 0 and 1")
        _require(-2.0 <= self.presence_penalty <= 2.0, "presence_penalty", "must be between -2 and 2")
        _require(-2.0 <= self.frequency_penalty <= 2.0, "frequency_penalty", "must be between -2 and 2")
        _require(0.01 <= self.repetition_penalty <= 10.0, "repetition_penalty", "must be between 0.01 and 10")
        _require(all(-100 <= v <= 100 for v in self.logit_bias.values()), "logit_bias", "values must be in -100..100")
        _require(len(self.stop) <= 16, "stop", "takes at most 16 strings")
        _require(all(self.stop), "stop", "must not hold an empty string")
        _require(self.logprobs is None or 0 <= self.logprobs <= 20, "logprobs", "must be between 0 and 20")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0.0

    @property
    def penalised(self) -> bool:
        """Whether the choice depends on which tokens came before, beyond the logits."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0)


def _require(condition: bool, param: str, requirement: str) -> None:
    if not condition:
        raise InvalidRequestError(Field(param), f" {requirement}")
