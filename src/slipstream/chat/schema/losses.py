"""What of a schema no grammar can hold."""

from dataclasses import dataclass


class UnsupportedError(Exception):
    """A keyword, or what it says, can't be put into a grammar."""


@dataclass(frozen=True, slots=True)
class Loss:
    """A keyword that the grammar of an answer leaves out, and whose schema has it."""

    keyword: str
    tool: str | None = None
    """None where it's the schema of the answer itself."""
    of_text: bool = False
    """Whether it's why the grammar of a tool that takes text is left out."""
