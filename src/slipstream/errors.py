"""Every error that Slipstream raises on purpose, as one small hierarchy."""

from collections.abc import Mapping

from slipstream.fields import PROMPT, SESSION_ID, Field, Option


class SlipstreamError(Exception):
    """Base of all errors raised by Slipstream. A `Field` among the pieces of the message can be renamed.

    `retry_after` is after how many seconds another try may succeed, None if waiting doesn't help.
    """

    def __init__(self, *message: str, retry_after: int | None = None) -> None:
        super().__init__("".join(message))
        self.retry_after = retry_after
        self._message = message

    def worded(self, names: Mapping[str, str]) -> str:
        """The message with the names of a table in place of Python's."""
        return "".join(piece.named(names) if isinstance(piece, Field) else piece for piece in self._message)


class InvalidRequestError(SlipstreamError):
    """The request can't be served as it stands; the message says the way out.

    `param` is the field at fault, by default the first in the message: a `Field`, or a protocol's own name for one.
    """

    def __init__(self, *message: str, param: str | None = None, code: str = "invalid_value") -> None:
        super().__init__(*message)
        self.param = param or next((piece for piece in message if type(piece) is Field), None)
        self.code = code


class ContextLengthError(InvalidRequestError):
    """Prompt, or prompt and `max_tokens` together, exceed the model's context or the KV memory.

    `prompt`, `wanted` and `limit` are tokens: of the prompt, of the answer as asked for (0 if it wasn't), and the most
    that both may have together. Protocols have words of their own for them, by which clients recover.
    """

    def __init__(self, *message: str, prompt: int, wanted: int, limit: int) -> None:
        super().__init__(*message, param=PROMPT, code="context_length_exceeded")
        self.prompt = prompt
        self.wanted = wanted
        self.limit = limit


class LimitError(InvalidRequestError):
    """A request wants more than an option of the server lets it have: `count` of `unit`, where `most` are allowed.

    `param` is the field at fault, None for the whole body.
    """

    def __init__(
        self, param: str | None, count: int, unit: str, limit: Option, most: int, *, code: str = "limit_exceeded"
    ) -> None:
        subject = "the body" if param is None else param
        message = f" has {count:,} {unit}; the limit is {most:,} ("
        super().__init__(subject, message, limit, ")", param=param, code=code)
        self.limit: str = limit


class OverloadedError(SlipstreamError):
    """The waiting queue is full; `limit` is the option that says when."""

    def __init__(self, *message: str, retry_after: int, limit: str = "max_waiting") -> None:
        super().__init__(*message, retry_after=retry_after)
        self.limit = limit


class EngineStoppedError(SlipstreamError):
    """The engine was shut down, or failed, before this request was finished."""


class ModelError(SlipstreamError):
    """A model can't be found, fetched, imported or loaded."""


class UnsupportedModelError(ModelError):
    """The model is intact but of a kind that Slipstream can't run; the message names the kind."""


class LogitsError(SlipstreamError):
    """A model's logits are infinite or no numbers somewhere, so that no token can be chosen."""

    def __init__(self) -> None:
        super().__init__(
            "the model's logits are infinite or no numbers, so no token can be chosen. The usual cause are sums that "
            "float16 can't hold: weights in bfloat16 have more room"
        )


class SessionNotFoundError(InvalidRequestError):
    """There is no session of that name."""

    def __init__(self, name: str) -> None:
        message = f"there is no session {name!r}: it was never begun, was deleted, or nobody used it for too long"
        super().__init__(message, param=SESSION_ID, code="session_not_found")


class SessionConflictError(SlipstreamError):
    """The session is in use by another request, or its name is taken."""


class StorageError(SlipstreamError):
    """The disk, full or read-only, doesn't let go of something; nothing of it was deleted."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what} can't be deleted on disk, so nothing of it was: the disk must be writable and have room"
        )


class StateError(SlipstreamError):
    """The folder for saved state can't be used."""
