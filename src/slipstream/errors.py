"""Every error that Slipstream raises on purpose, as one small hierarchy."""


class SlipstreamError(Exception):
    """Base of all errors raised by Slipstream."""


class InvalidRequestError(SlipstreamError):
    """The request can't be served as it stands; `param` names the field, the message says the way out."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class ContextLengthError(InvalidRequestError):
    """Prompt, or prompt and `max_tokens` together, exceed the model's context or the KV memory."""

    def __init__(self, message: str, *, param: str = "messages") -> None:
        super().__init__(message, param=param, code="context_length_exceeded")


class OverloadedError(SlipstreamError):
    """The waiting queue is full; try again after `retry_after` seconds."""

    def __init__(self, message: str, *, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineStoppedError(SlipstreamError):
    """The engine was shut down, or failed, before this request was finished."""


class ModelError(SlipstreamError):
    """A model can't be found, fetched, imported or loaded."""


class UnsupportedModelError(ModelError):
    """The model is intact but of a kind that Slipstream can't run; the message names the kind."""


class SessionNotFoundError(InvalidRequestError):
    """There is no session of that name."""

    def __init__(self, name: str) -> None:
        message = f"there is no session {name!r}: it was never begun, was deleted, or nobody used it for too long"
        super().__init__(message, param="session_id", code="session_not_found")


class SessionConflictError(SlipstreamError):
    """The session is in use by another request, or its name is taken; waiting helps if there is `retry_after`."""

    def __init__(self, message: str, *, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class StateError(SlipstreamError):
    """The folder for saved state can't be used."""
