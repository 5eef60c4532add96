"""Messages, whatever protocol they came by, and when two of them are the same."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from typing import TypeVar

from slipstream.tokenizer.provenance import Traced, as_content, content, origin_of

Digest = bytes
"""Identifies a message, or a list of messages with all that precedes it, 16 bytes."""

_SIZE = 16
_Found = TypeVar("_Found")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a function; `arguments` is JSON text, as generated or as the client sent it back."""

    id: str
    name: str
    arguments: str

    def parsed_arguments(self) -> object:
        """The arguments as a value, or the text itself where it isn't JSON."""
        try:
            parsed = _DECODER.decode(self.arguments)
            return as_content(parsed, origin_of(self.arguments)) if isinstance(self.arguments, Traced) else parsed
        except (ValueError, RecursionError):  # the latter for brackets without end
            return self.arguments


@dataclass(frozen=True)  # without slots: it keeps its digests
class Message:
    """One message of a conversation; `role` is system, user, assistant or tool.

    The `reasoning` of an answer is no part of what it says: many clients don't send it back, and few templates want it.
    """

    role: str
    text: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    reasoning: str = ""

    def traced(self, origin: int) -> "Message":
        """The same with what it says as content of an origin."""
        calls = tuple(replace(call, arguments=content(call.arguments, origin)) for call in self.tool_calls)
        said, thought = content(self.text, origin), content(self.reasoning, origin)
        return replace(self, text=said, reasoning=thought, tool_calls=calls)

    def canonical(self) -> str:
        """A text that is equal for messages that mean the same, however the client serialised them."""
        calls = [(call.id, call.name, _ENCODER.encode(call.parsed_arguments())) for call in self.tool_calls]
        return repr((self.role, calls, self.tool_call_id, self.name)) + self.text

    def equals(self, other: "Message") -> bool:
        """Whether it is the same to the letter; compares digests in place of texts."""
        same = self.digest == other.digest
        return same and self.tool_calls == other.tool_calls and self.reasoning == other.reasoning

    @cached_property
    def digest(self) -> Digest:
        """Equal for messages that mean the same."""
        return digest(self.canonical())

    @cached_property
    def thought(self) -> Digest:
        """Equal for messages of the same reasoning."""
        return digest(self.reasoning)


class History:
    """A conversation in its setting, as the digests of its messages; each beginning of it has a key.

    `setting` is the digest of all that precedes the first message.
    """

    def __init__(self, setting: Digest, messages: Sequence[Message]) -> None:
        self._digests = setting + b"".join([message.digest for message in messages])

    @property
    def key(self) -> Digest:
        """The key of the whole."""
        return blake2b(self._digests, digest_size=_SIZE).digest()

    def key_after(self, message: Message) -> Digest:
        """The key of the conversation once the message was added to it."""
        return blake2b(self._digests + message.digest, digest_size=_SIZE).digest()

    def keys(self, start: int = 0) -> Iterator[Digest]:
        """The keys of the beginnings that end with the message number `start`, and with each later one."""
        hasher = blake2b(self._digests[: _SIZE * (start + 1)], digest_size=_SIZE)
        for at in range(_SIZE * (start + 1), len(self._digests), _SIZE):
            hasher.update(self._digests[at : at + _SIZE])
            yield hasher.copy().digest()

    def last_known(self, find: Callable[[Digest], _Found | None]) -> tuple[int, _Found] | None:
        """The last message that ends a beginning for whose key something is found, and what that is.

        Looks at the last messages first, and each time at twice as many: what goes on is known near its end.
        """
        end, width = len(self._digests) // _SIZE - 1, 4
        while end:
            start = max(0, end - width)
            keys = list(zip(range(start, end), self.keys(start), strict=False))
            for number, key in reversed(keys):
                if (found := find(key)) is not None:
                    return number, found
            end, width = start, 2 * width
        return None


def digest(text: str, before: Digest = b"") -> Digest:
    """The digest of `text` coming after what `before` stands for."""
    return blake2b(before + text.encode("utf-8", "surrogatepass"), digest_size=_SIZE).digest()


def _number(text: str) -> float | int:
    value = float(text)
    return int(value) if value.is_integer() and abs(value) < 2**53 else value


# A number is what it's worth: JavaScript writes 2.0 as 2.
_DECODER = json.JSONDecoder(parse_float=_number)
_ENCODER = json.JSONEncoder(sort_keys=True)
