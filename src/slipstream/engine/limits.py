"""What a request must keep to, checked before it is queued."""

from dataclasses import dataclass

import numpy as np

from slipstream import fields
from slipstream.engine.request import EngineRequest
from slipstream.errors import ContextLengthError, InvalidRequestError


@dataclass(frozen=True, slots=True)
class Limits:
    """Of a model and the memory that it was given."""

    vocab_size: int
    context_length: int
    """What the model was trained for, in tokens."""
    capacity: int
    """What the KV memory holds of one sequence, in tokens."""
    longest_token: int
    """Bytes of the longest token of the vocabulary."""

    @property
    def max_sequence(self) -> int:
        """Tokens of prompt and answer together; the KV memory may hold less than the context."""
        return min(self.context_length, self.capacity)

    def check_token_ids(self, request: EngineRequest) -> None:
        """Raise `InvalidRequestError` for ids that the model has no row for."""
        bias = request.params.logit_bias
        known = {
            fields.PROMPT: int(request.prompt.view(np.uint32).max(initial=0)) < self.vocab_size,  # negative: large
            fields.LOGIT_BIAS: min(bias, default=0) >= 0 and max(bias, default=0) < self.vocab_size,
        }
        for field, are_known in known.items():
            if not are_known:
                complaint = f" has token ids outside the vocabulary: they must be 0 to {self.vocab_size - 1}"
                raise InvalidRequestError(field, complaint)

    def check_characters(self, count: int) -> None:
        """Raise `ContextLengthError` for a text of so many characters that it can't fit, however it's tokenised."""
        if count > self.max_sequence * self.longest_token:
            raise self._too_long((f"a prompt of {count:,} characters",), -(-count // self.longest_token), 0)

    def sequence_limit(self, request: EngineRequest) -> int:
        """How long prompt and answer may get together, in tokens.

        Raises `InvalidRequestError` for an empty prompt, `ContextLengthError` for one that is too long.
        """
        prompt, wanted = len(request.prompt), request.params.max_tokens
        if prompt == 0:
            raise InvalidRequestError("the prompt is empty: it needs at least one token", param=fields.PROMPT)
        if prompt >= self.max_sequence or prompt + (wanted or 0) > self.max_sequence:
            asked = (" and ", fields.MAX_TOKENS, f" of {wanted:,}") if wanted else ()
            raise self._too_long((f"a prompt of {prompt:,} tokens", *asked), prompt, wanted or 0)
        return prompt + wanted if wanted else self.max_sequence

    def _too_long(self, asked: tuple[str, ...], prompt: int, wanted: int) -> ContextLengthError:
        cause = (
            (f"the model's context is {self.context_length:,} tokens",)
            if self.max_sequence == self.context_length
            else (f"the KV memory holds {self.max_sequence:,} tokens (", fields.KV_MEMORY, ")")
        )
        advice = ". Send a shorter prompt, or ask for fewer tokens."
        message = (*asked, " is too long: ", *cause, advice)
        return ContextLengthError(*message, prompt=prompt, wanted=wanted, limit=self.max_sequence)
