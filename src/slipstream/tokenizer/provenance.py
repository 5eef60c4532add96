"""Where text comes from: control tokens come from the template and the model, never from what somebody wrote.

A prompt mixes two kinds of text. The template's own may hold control tokens (`<|im_start|>`, `<tool_call>`); content,
which is messages, names, arguments, results and schemas, is text whatever it spells. Both are one string when a
template is rendered, so the string itself remembers which of its characters are which, and of content, which message it
comes from.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Self, SupportsIndex

_OWN = b"\1"
_OWN_RUN = re.compile(b"\1+")
_NOWHERE, _FIRST_ORIGIN = 0, 2
_PLAIN = (str, int, float, type(None))
ORIGINS = 256 - _FIRST_ORIGIN
"""How many origins are told apart; there may be more messages, so their numbers begin anew after these."""


class Traced(str):
    """A string that knows of each of its characters whether it may be part of a control token.

    What is done to it in a template (joining, cutting, stripping, changing case) keeps that; what can't be followed
    character by character makes content of the whole. A plain `str` beside it is the template's own.
    """

    __slots__ = ("mask",)

    mask: bytes
    """1 for each character that may be part of a control token, for content its origin: 0 if that isn't known."""

    def __new__(cls, text: str, mask: bytes) -> Self:
        """A string and its mask, which are of the same length."""
        self = super().__new__(cls, text)
        self.mask = mask
        return self

    def __str__(self) -> str:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Traced, (str.__add__("", self), self.mask)

    def __add__(self, other: str) -> "Traced":
        return Traced(str.__add__(self, other), self.mask + mask_of(other))

    def __radd__(self, other: str) -> "Traced":
        return Traced(str.__add__(other, self), mask_of(other) + self.mask)

    def __mul__(self, count: SupportsIndex) -> "Traced":
        return Traced(str.__mul__(self, count), self.mask * max(0, int(count)))

    __rmul__ = __mul__

    def __rmod__(self, form: str) -> "Traced":
        return all_content(str.__mod__(form, (self,)))

    def __getitem__(self, index: SupportsIndex | slice) -> "Traced":
        text = str.__getitem__(self, index)
        return Traced(text, self.mask[index] if isinstance(index, slice) else self.mask[index:][:1])

    def __iter__(self) -> Iterator[str]:
        return (self[at] for at in range(len(self)))

    def strip(self, chars: str | None = None, /) -> "Traced":
        """As `str` does."""
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None, /) -> "Traced":
        """As `str` does."""
        return self[len(self) - len(str.lstrip(self, chars)) :]

    def rstrip(self, chars: str | None = None, /) -> "Traced":
        """As `str` does."""
        return self[: len(str.rstrip(self, chars))]

    def removeprefix(self, prefix: str, /) -> "Traced":
        """As `str` does."""
        return self[len(self) - len(str.removeprefix(self, prefix)) :]

    def removesuffix(self, suffix: str, /) -> "Traced":
        """As `str` does."""
        return self[: len(str.removesuffix(self, suffix))]

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        """As `str` does."""
        return self._cut(str.split(self, sep, maxsplit), sep)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        """As `str` does."""
        return self._cut(str.rsplit(self, sep, maxsplit), sep)

    def splitlines(self, keepends: bool = False) -> list[str]:
        """As `str` does."""
        return self._cut(str.splitlines(self, keepends))

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        """As `str` does."""
        before, found, after = self._cut(str.partition(self, sep), "")
        return before, found, after

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        """As `str` does."""
        before, found, after = self._cut(str.rpartition(self, sep), "")
        return before, found, after

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> "Traced":
        """As `str` does; what is put in keeps where it comes from."""
        return joined(new, self.split(old, count)) if old else all_content(str.replace(self, old, new, count))

    def join(self, pieces: Iterable[str], /) -> "Traced":
        """As `str` does; what is joined keeps where it comes from."""
        return joined(self, pieces)

    def own_runs(self) -> Iterator[tuple[int, int]]:
        """Where text begins and ends that may hold control tokens."""
        return (run.span() for run in _OWN_RUN.finditer(self.mask))

    def _cut(self, pieces: Iterable[str], separator: str | None = None) -> list[str]:
        """Pieces of the string, in its order, as they stand in it; by default white space is between them."""
        cut: list[str] = []
        at = 0
        for piece in pieces:
            if separator is None:
                at = str.index(self, piece, at)
            cut.append(self[at : at + len(piece)])
            at += len(piece) + len(separator or "")
        return cut


def _made_by(name: str) -> Callable[..., Traced]:
    method, keeps = getattr(str, name), name in _KEEPING

    def call(self: Traced, *args: Any, **kwargs: Any) -> Traced:
        text = method(self, *args, **kwargs)
        return Traced(text, self.mask) if keeps and len(text) == len(self) else all_content(text)

    return call


_KEEPING = ("capitalize", "casefold", "lower", "swapcase", "title", "upper")
"""What makes a text whose characters stand for those of another, if they are as many."""
_FORMATTING = ("format", "format_map", "__format__", "__mod__")
_OTHERS = ("center", "expandtabs", "ljust", "rjust", "translate", "zfill")
for _name in (*_KEEPING, *_FORMATTING, *_OTHERS):
    setattr(Traced, _name, _made_by(_name))


def origin(message: int) -> int:
    """Stands for the message of this number in masks."""
    return _FIRST_ORIGIN + message % ORIGINS


def origin_of(text: str) -> int:
    """Where a text comes from, if all of it is content of one origin."""
    mask = text.mask if isinstance(text, Traced) else b""
    alike = mask != b"" and mask == mask[:1] * len(mask)
    return mask[0] if alike and mask[0] >= _FIRST_ORIGIN else _NOWHERE


def content(text: str, origin: int = _NOWHERE) -> Traced:
    """Text that holds no control token, whatever it spells; what is traced already stays as it is."""
    return text if isinstance(text, Traced) else all_content(text, origin)


def all_content(text: str, origin: int = _NOWHERE) -> Traced:
    """Text of which nothing is a control token any more, traced or not."""
    return Traced(str.__str__(text), bytes((origin,)) * len(text))


def own(text: str) -> Traced:
    """Text of which every control token that it spells is one."""
    return Traced(text, _OWN * len(text))


def mask_of(text: str) -> bytes:
    """The mask of any string; a plain one is the template's own."""
    return text.mask if isinstance(text, Traced) else _OWN * len(text)


def joined(separator: str, pieces: Iterable[str]) -> Traced:
    """The pieces with the separator between them, each character with its mask."""
    pieces = list(pieces)
    mask = mask_of(separator).join(map(mask_of, pieces))
    return Traced(str.join(separator, pieces), mask)


def as_content(value: Any, origin: int = _NOWHERE) -> Any:
    """A copy of JSON-like data in which all strings, keys too, are content, but for those that are traced."""
    if isinstance(value, str):
        return content(value, origin)
    if isinstance(value, Mapping):
        return {as_content(key, origin): as_content(each, origin) for key, each in value.items()}
    if isinstance(value, Sequence):
        return [as_content(each, origin) for each in value]
    return value


def made_of(text: str, *parts: Any) -> str:
    """A text that was made of some values, nobody knows how: content if one of them is traced or may hold what is.

    It is of their origin if they have one in common.
    """
    origins = {*_origins(parts)}
    return all_content(text, origins.pop() if len(origins) == 1 else _NOWHERE) if origins else text


def _origins(value: Any) -> Iterator[int]:
    """Of the traced strings in a value; nowhere stands for several, and for values that don't say what they hold."""
    if isinstance(value, Traced):
        yield origin_of(value)
    elif isinstance(value, Mapping):
        yield from _origins([*value, *value.values()])
    elif isinstance(value, Collection) and not isinstance(value, str | bytes):
        for each in value:
            yield from _origins(each)
    elif not isinstance(value, _PLAIN):
        yield _NOWHERE
