"""Reading an answer while it comes, at a cost that grows with its length alone.

What takes text apart is written as a generator: each `yield` waits for more text, and nothing is read twice.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import TypeVar

_Result = TypeVar("_Result")
Steps = Generator[None, None, _Result]
"""Reads a part of an answer, waiting for its text at each `yield`."""


@dataclass(frozen=True, slots=True)
class AnswerDelta:
    """What an answer says more than before.

    A call is told with its `index`: `id` and `name` when it begins, then pieces of the JSON text of its `arguments`.
    """

    text: str = ""
    reasoning: str = ""
    index: int = 0
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(slots=True)
class ParsedCall:
    """A call as far as it is known; only the last one of an answer may be less than `complete`."""

    id: str
    name: str
    arguments: list[str] = field(default_factory=list)
    """Pieces of JSON text."""
    complete: bool = False


class Reading:
    """An answer on its way: the text that came and was not read yet, and what all before it says."""

    def __init__(self, new_call_id: Callable[[], str]) -> None:
        self.rest = ""
        self.ended = False
        """Whether no text will come after the `rest`."""
        self.deltas: list[AnswerDelta] = []
        """What was read since somebody last emptied it."""
        self.text: list[str] = []
        self.reasoning: list[str] = []
        self.calls: list[ParsedCall] = []
        self._new_call_id = new_call_id

    def take(self, count: int | None = None) -> str:
        """The next so many characters, or all there are, which are read with this."""
        taken = self.rest[:count]
        self.rest = self.rest[len(taken) :]
        return taken

    def say(self, text: str) -> None:
        """Note text for the user."""
        if text:
            self.text.append(text)
            self.deltas.append(AnswerDelta(text=text))

    def say_all(self) -> Steps[None]:
        """Note all that comes as text for the user."""
        while True:
            self.say(self.take())
            yield

    def think(self, text: str) -> None:
        """Note a piece of reasoning."""
        if text:
            self.reasoning.append(text)
            self.deltas.append(AnswerDelta(reasoning=text))

    def begin_call(self, name: str) -> None:
        """Note that a call begins; the arguments that follow are its own."""
        call = ParsedCall(self._new_call_id(), name)
        self.calls.append(call)
        self.deltas.append(AnswerDelta(index=len(self.calls) - 1, id=call.id, name=name))

    def add_arguments(self, text: str) -> None:
        """Note a piece of the arguments of the last call."""
        if text:
            self.calls[-1].arguments.append(text)
            self.deltas.append(AnswerDelta(index=len(self.calls) - 1, arguments=text))

    def end_call(self) -> None:
        """Note that the last call is complete."""
        self.calls[-1].complete = True


def text_until(reading: Reading, mark: str, tell: Callable[[str], None]) -> Steps[bool]:
    """Tell the text before a mark, piece by piece, but no white space right before it. Returns whether the mark came.

    If it never does, white space and what could have been its beginning are left unread at the end.
    """
    while (found := reading.rest.find(mark)) < 0 and not reading.ended:
        tell(reading.take(_certain_length(reading.rest, mark)))
        yield
    if found < 0:
        return False
    tell(reading.take(found).rstrip())
    reading.take(len(mark))
    return True


def whole_until(reading: Reading, mark: str) -> Steps[str | None]:
    """The text before a mark, once the mark is there; None if it never comes."""
    looked_at = 0
    while (found := reading.rest.find(mark, looked_at)) < 0:
        if reading.ended:
            return None
        looked_at = max(0, len(reading.rest) - len(mark) + 1)
        yield
    text = reading.take(found)
    reading.take(len(mark))
    return text


def comes_next(reading: Reading, *marks: str) -> Steps[bool]:
    """Whether one of the marks is next but for white space, once that's certain."""
    while not (begun := reading.rest.lstrip()).startswith(marks):
        if reading.ended or not any(mark.startswith(begun) for mark in marks):
            return False
        yield
    return True


def skip(reading: Reading, mark: str) -> Steps[bool]:
    """Skip a mark, and white space before it, if they come next. Returns whether they did."""
    if not (yield from comes_next(reading, mark)):
        return False
    reading.rest = reading.rest.lstrip().removeprefix(mark)
    return True


def skip_space(reading: Reading) -> Steps[None]:
    """Skip white space."""
    while not (rest := reading.rest.lstrip()) and not reading.ended:
        yield
    reading.rest = rest


def _certain_length(text: str, mark: str) -> int:
    """How much of `text` can't turn out to be the beginning of the mark, or white space before it."""
    for size in range(min(len(text), len(mark) - 1), 0, -1):
        if mark.startswith(text[-size:]):
            return len(text[:-size].rstrip())
    return len(text.rstrip())
