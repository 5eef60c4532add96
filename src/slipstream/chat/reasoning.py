"""Reasoning: what models write before they answer, and how that is told from the answer."""

from slipstream.chat.reading import Reading, Steps, skip, skip_space, text_until
from slipstream.chat.tags import Tag, Tags, rule_until
from slipstream.tokenizer.provenance import Traced

_GAP = r"GAP: /\n{0,2}/"


class Reasoning:
    """A way to reason before an answer, between two tags, the first of which a template may write already.

    Where it is not `expected`, it's read if it comes in free text, but no grammar leaves room for it.
    """

    def __init__(self, begin: Tag, end: Tag, *, expected: bool = True) -> None:
        self.begin = begin
        self.end = end
        self.expected = expected

    def opened_by(self, prompt: Traced) -> bool:
        """Whether a prompt ends inside of reasoning, with the template's own tag."""
        begun = prompt.rstrip()
        own = begun.mask[-len(self.begin.mark) :]
        return str.endswith(begun, str(self.begin)) and own == b"\1" * len(own)

    def grammar(self, answer: str, *, opened: bool) -> str:
        """Lark rules for `start`: reasoning, which may be missing unless it was opened, and then the rule `answer`."""
        if not opened and not self.expected:
            return f"start: {answer}"
        thought = rule_until(self.end, "thought")
        if opened:
            return f"start: thought GAP {answer}\n{thought}\n{_GAP}"
        return f"start: (reasoning GAP)? {answer}\nreasoning: {self.begin.expression} thought\n{thought}\n{_GAP}"

    def read(self, reading: Reading, *, opened: bool) -> Steps[None]:
        """Read reasoning, if there is any, and the white space behind it."""
        if opened or (yield from skip(reading, self.begin.mark)):
            yield from skip_space(reading)
            if not (yield from text_until(reading, self.end.mark, reading.think)):
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
            return Reasoning(tags(*begin), tags(*end))
    begin, end = _PAIRS[0]
    return Reasoning(tags(*begin), tags(*end), expected=False)
