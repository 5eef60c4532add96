"""What the engine is asked, and what it answers."""

from collections.abc import Container
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from slipstream.engine.grammar import Grammar
from slipstream.sampling import SamplingParams, TokenLogprob
from slipstream.types import IntArray

FinishReason = Literal["stop", "length", "cancelled", "error"]
CacheUse = Literal["hit", "miss", "off"]


class Flow(NamedTuple):
    """Requests that are served in the order in which they come."""

    tenant: str
    priority: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    """Token ids in, tokens out. `prompt` is int32 [n], n >= 1; `tenant` bounds who shares KV with whom.

    The four switches change what an answer costs, never its tokens.
    """

    prompt: IntArray
    params: SamplingParams = field(default_factory=SamplingParams)
    grammar: Grammar | None = None
    """What the answer must fit; it ends where nothing more can follow."""
    shown_tokens: Container[int] = frozenset()
    """Special tokens that are part of the text: those that mark calls and reasoning."""
    tenant: str = ""
    weight: float = 1.0
    """The tenant's share of the machine when it's short, in proportion to the others'."""
    priority: int = 0
    """Higher ones go first among the tenant's requests; each has twice the share of the one below."""
    reuse: bool = True
    """Whether anything that is already in memory may be used; without it, all is computed afresh."""
    jump_forward: bool = True
    """Whether tokens that the grammar forces are taken without a forward pass of their own."""
    speculation: bool = True
    """Whether drafts may be verified along."""
    response_cache: bool = True
    """Whether the answer may come from memory, if the request is deterministic and was answered before."""


@dataclass(slots=True)
class TurnCounters:
    """What a turn cost. Token counts, forward passes, and milliseconds of wall time."""

    prompt_tokens: int = 0
    reused_tokens: int = 0
    completion_tokens: int = 0
    forced_tokens: int = 0
    """Of the completion: taken without being sampled, since the grammar left no choice."""
    drafted_tokens: int = 0
    """Guesses that were verified along."""
    accepted_tokens: int = 0
    """Guesses that were right."""
    forward_passes: int = 0
    queue_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    response_cache: CacheUse = "off"
    """Off for a request that has more than one answer, too."""

    @property
    def delta_tokens(self) -> int:
        """Prompt tokens whose KV had to be computed."""
        return self.prompt_tokens - self.reused_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """A piece of a request: new tokens and the text that they make certain.

    The last piece has `finish_reason` and `counters`; with reason "error" also `error`, and where a stop string ended
    the answer, `stop_string`. The stop token is not among the tokens; text of tokens may come with a later piece, when
    it's certain not to begin a stop string.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_string: str | None = None
    counters: TurnCounters | None = None
    error: Exception | None = None


def as_prompt(token_ids: object) -> IntArray:
    """Token ids as the int32 array that a request holds."""
    return np.asarray(token_ids, np.int32)
