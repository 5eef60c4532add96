"""Tags, which models write around calls and reasoning: control tokens if the vocabulary has them, else text."""

from collections.abc import Callable
from dataclasses import dataclass

from slipstream.chat.schema import literal
from slipstream.tokenizer.provenance import Traced, content, joined, own


@dataclass(frozen=True, slots=True)
class Tag:
    """A tag in one vocabulary."""

    expression: str
    """The Lark expression that only the tag fits."""
    mark: Traced
    """How it looks in an answer: a control token's text is its own, and no other text is taken for it."""

    @property
    def is_token(self) -> bool:
        """Whether it begins with a control token, and so comes as a whole or not at all."""
        return self.mark.mask[:1] == b"\1"

    def __str__(self) -> str:
        return str.__str__(self.mark)


class Tags:
    """Tags of one vocabulary. `control_token` gives the id of the control token with a text, if there is one."""

    def __init__(self, control_token: Callable[[str], int | None] = lambda _: None) -> None:
        self._control_token = control_token
        self.token_ids: set[int] = set()
        """Of all tags that were asked for: they are part of an answer's text, special or not."""

    def __call__(self, *parts: str) -> Tag:
        """A tag of one or several parts, such as `<|channel|>`, `analysis`, `<|message|>`; empty of empty ones."""
        expressions, marks = [], []
        for part in filter(None, parts):
            token = self._control_token(part)
            if token is not None:
                self.token_ids.add(token)
            expressions.append(literal(part) if token is None else f"<[{token}]>")
            marks.append(content(part) if token is None else own(part))
        return Tag(" ".join(expressions), joined("", marks))


def rule_until(tag: Tag, rule: str, text: str | None = None) -> str:
    """Lark rules for `rule`: any text, or one that fits a terminal, and then the tag, which the text can't hold."""
    if tag.is_token:
        return f"{rule}: {rule.upper()}_TEXT {tag.expression}\n{rule.upper()}_TEXT: {text or _ANY_TEXT}"
    if text is None:
        return f"{rule}[lazy]: {_ANY_TEXT} {tag.expression}"
    return f"{rule}[lazy]: ({text} & ~({_ANY_TEXT} {literal(str(tag).strip())} {_ANY_TEXT})) {tag.expression}"


_ANY_TEXT = "/(.|\\n)*/"
