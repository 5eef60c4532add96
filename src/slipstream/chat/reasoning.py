"""Reasoning: what models write before they answer, and how that is told from the answer."""

from typing import Protocol

from slipstream.chat.reading import Reading, Steps, skip, skip_space, text_until
from slipstream.chat.tags import Tag, Tags
from slipstream.chat.tags import text_until as text_until_rule
from slipstream.tokenizer.provenance import Traced

_GAP = r"GAP: /\n{0,2}/"


class Reasoning(Protocol):
    """One family's way to reason before an answer."""

    @property
    def end(self) -> Tag | None:
        """What ends it; None for a model that doesn't reason."""
        ...

    def opened_by(self, prompt: Traced) -> bool:
        """Whether a prompt ends inside of reasoning, which the template began."""
        ...

    def grammar(self, answer: str, *, opened: bool) -> str:
        """Lark rules for `start`: reasoning, which may be missing unless it was opened, and then the rule `answer`."""
        ...

    def read(self, reading: Reading, *, opened: bool) -> Steps[None]:
        """Read reasoning, if there is any, and the white space behind it."""
        ...


class TaggedReasoning:
    """Reasoning between two tags, the first of which a template may write already.

    Where it is not `expected`, it's read if it comes in free text, but no grammar leaves room for it.
    """

    def __init__(self, begin: Tag, end: Tag, *, expected: bool = True) -> None:
        self._begin = begin
        self._end = end
        self._expected = expected

    @property
    def end(self) -> Tag | None:
        """See `Reasoning.end`."""
        return self._end if self._expected else None

    def opened_by(self, prompt: Traced) -> bool:
        """See `Reasoning.opened_by`: it ends in the template's own tag."""
        begun = prompt.rstrip()
        own = begun.mask[-len(self._begin.mark) :]
        return str.endswith(begun, str(self._begin)) and own == b"\1" * len(own)

    def grammar(self, answer: str, *, opened: bool) -> str:
        """See `Reasoning.grammar`."""
        if not opened and not self._expected:
            return f"start: {answer}"
        thought = text_until_rule(self._end, "thought")
        if opened:
            return f"start: thought GAP {answer}\n{thought}\n{_GAP}"
        return f"start: (reasoning GAP)? {answer}\nreasoning: {self._begin.expression} thought\n{thought}\n{_GAP}"

    def read(self, reading: Reading, *, opened: bool) -> Steps[None]:
        """See `Reasoning.read`."""
        if opened or (yield from skip(reading, self._begin.mark)):
            yield from skip_space(reading)
            if not (yield from text_until(reading, self._end.mark, reading.think)):
                reading.think(reading.take().rstrip())
            yield from skip_space(reading)


_PAIRS = (
    (("<think>",), ("</think>",)),
    (("[THINK]",), ("[/THINK]",)),  # Magistral
    (("<|channel>", "thought"), ("<channel|>",)),  # Gemma 4
    (("<seed:think>",), ("</seed:think>",)),
)


def choose_reasoning(template: str, tags: Tags) -> Reasoning:
    """The way to reason that a model's chat template shows; the most common one, though not expected, if none."""
    for begin, end in _PAIRS:
        if begin[0] in template or end[0] in template:
            return TaggedReasoning(tags(*begin), tags(*end))
    begin, end = _PAIRS[0]
    return TaggedReasoning(tags(*begin), tags(*end), expected=False)
