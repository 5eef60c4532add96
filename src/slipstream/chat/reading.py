"""Reading an answer while it comes, at a cost that grows with its length alone.

What takes text apart is written as a generator: each `yield` waits for more text, and nothing is read twice.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import TypeVar

from slipstream.tokenizer.provenance import Traced, content, joined

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
        self.rest = content("")
        self.ended = False
        """Whether no text will come after the `rest`."""
        self.deltas: list[AnswerDelta] = []
        """What was read since somebody last emptied it."""
        self.text: list[str] = []
        self.reasoning: list[str] = []
        self.calls: list[ParsedCall] = []
        self._new_call_id = new_call_id
        self.passed = content("")
        """The mark that text was last read up to, and white space before it."""
        self._attempted: list[Traced] | None = None

    def take(self, count: int | None = None) -> Traced:
        """The next so many characters, or all there are, which are read with this."""
        taken = self.rest[:count]
        self.rest = self.rest[len(taken) :]
        if self._attempted is not None:
            self._attempted.append(taken)
        return taken

    def attempt(self, before: str | None = None) -> None:
        """Remember what is read from now on until a call begins: perhaps it's none.

        What was `before` it is text too, then; by default the mark that text was read up to.
        """
        self._attempted = [self.passed if before is None else content(before)]

    def gave_up(self) -> bool:
        """Whether no call began since the attempt: then what was read is noted as text."""
        attempted, self._attempted = self._attempted, None
        if attempted is not None:
            self.say("".join(attempted))
        return attempted is not None

    def say(self, text: str) -> None:
        """Note text for the user."""
        if text:
            text = str.__str__(text)
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
            text = str.__str__(text)
            self.reasoning.append(text)
            self.deltas.append(AnswerDelta(reasoning=text))

    def begin_call(self, name: str, id: str | None = None) -> None:
        """Note that a call begins, with the id that the model gave it if it did; what follows are its arguments."""
        self._attempted = None
        call = ParsedCall(id or self._new_call_id(), str.__str__(name))
        self.calls.append(call)
        self.deltas.append(AnswerDelta(index=len(self.calls) - 1, id=call.id, name=call.name))

    def add_arguments(self, text: str) -> None:
        """Note a piece of the arguments of the last call."""
        if text:
            # Line ends to JavaScript and to Python's `splitlines`, but not to JSON, where they may stand as they are.
            text = str.__str__(text).replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
            self.calls[-1].arguments.append(text)
            self.deltas.append(AnswerDelta(index=len(self.calls) - 1, arguments=text))

    def end_call(self) -> None:
        """Note that the last call is complete."""
        self.calls[-1].complete = True


def text_until(reading: Reading, mark: str, tell: Callable[[str], None]) -> Steps[bool]:
    """Tell the text before a mark, piece by piece, but no white space right before it. Returns whether the mark came.

    If it never does, white space and what could have been its beginning are left unread at the end.
    """
    mark = content(mark)
    while (found := _find(reading.rest, mark)) < 0 and not reading.ended:
        tell(reading.take(_certain_length(reading.rest, mark)))
        yield
    if found < 0:
        return False
    text = reading.take(found)
    tell(text.rstrip())
    reading.passed = text[len(text.rstrip()) :] + reading.take(len(mark))
    return True


def whole_until(reading: Reading, mark: str) -> Steps[str | None]:
    """The text before a mark, once the mark is there; None if it never comes."""
    text = yield from text_before(reading, mark)
    if text is None:
        return None
    reading.take(len(mark))
    return str.__str__(text)


def text_before(reading: Reading, *marks: str) -> Steps[Traced | None]:
    """The text before the first of some marks, which is left unread; None if none of them ever comes."""
    expected = [content(mark) for mark in marks]
    longest = max(map(len, expected))
    passed: list[Traced] = []  # apart from the rest, to which each piece that comes is added
    while not (found := [at for mark in expected if (at := _find(reading.rest, mark)) >= 0]) and not reading.ended:
        certain = max(0, len(reading.rest) - longest + 1)
        passed.append(reading.rest[:certain])
        reading.rest = reading.rest[certain:]
        yield
    reading.rest = joined("", [*passed, reading.rest])
    return reading.take(sum(map(len, passed)) + min(found)) if found else None


def comes_next(reading: Reading, *marks: str) -> Steps[bool]:
    """Whether one of the marks is next but for white space, once that's certain."""
    expected = [content(mark) for mark in marks]
    while not any(_begins(begun := reading.rest.lstrip(), mark) for mark in expected):
        if reading.ended or not any(_begins(mark, begun) for mark in expected):
            return False
        yield
    return True


def skip(reading: Reading, mark: str) -> Steps[bool]:
    """Skip a mark, and white space before it, if they come next. Returns whether they did."""
    if not (yield from comes_next(reading, mark)):
        return False
    reading.take(len(reading.rest) - len(reading.rest.lstrip()) + len(mark))
    return True


def skip_space(reading: Reading) -> Steps[None]:
    """Skip white space."""
    while not (rest := reading.rest.lstrip()) and not reading.ended:
        yield
    reading.take(len(reading.rest) - len(rest))


def cut_off_in(reading: Reading, mark: str) -> bool:
    """Whether what is left, but for white space, is the beginning of a mark, or nothing."""
    return _begins(content(mark), reading.rest.lstrip())


def _begins(text: Traced, with_: Traced) -> bool:
    return str.startswith(text, with_) and text.mask.startswith(with_.mask)


def _find(text: Traced, mark: Traced) -> int:
    """Where a mark is, in text that comes from where the mark does; -1 if nowhere."""
    found = str.find(text, mark)
    while found >= 0 and text.mask[found : found + len(mark)] != mark.mask:
        found = str.find(text, mark, found + 1)
    return found


def _certain_length(text: Traced, mark: Traced) -> int:
    """How much of `text` can't turn out to be the beginning of the mark, or white space before it."""
    for size in range(min(len(text), len(mark) - 1), 0, -1):
        if _begins(mark, text[-size:]):
            return len(text[:-size].rstrip())
    return len(text.rstrip())
