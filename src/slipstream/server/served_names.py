"""The names that the model goes by."""

from collections.abc import Sequence

from slipstream.errors import InvalidRequestError


class ServedNames:
    """The model's own name and its aliases, for clients that insist on a name; the first alias is shown before it."""

    def __init__(self, name: str, aliases: Sequence[str] = ()) -> None:
        self.all = tuple(dict.fromkeys((*aliases, name)))
        """All names, the one that requests without a name get first."""

    def check(self, asked: str | None) -> str:
        """The name for the answer to a request: the one that it asks for, by default the first.

        Raises `InvalidRequestError` for a model that isn't served.
        """
        if asked is None:
            return self.all[0]
        if asked not in self.all:
            served = ", ".join(map(repr, self.all))
            message = f"the model {asked!r} is not served here; served: {served}. --served-model-name adds names"
            raise InvalidRequestError(message, param="model", code="model_not_found")
        return asked
