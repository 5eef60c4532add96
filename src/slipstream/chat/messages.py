"""Messages, whatever protocol they came by, and when two of them are the same."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace

from slipstream.tokenizer.provenance import Traced, as_content, content, origin_of

Digest = bytes
"""Identifies a list of messages with all that precedes it, 16 bytes."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a function; `arguments` is JSON text, as generated or as the client sent it back."""

    id: str
    name: str
    arguments: str

    def parsed_arguments(self) -> object:
        """The arguments as a value, or the text itself where it isn't JSON."""
        try:
            # A number is what it's worth: JavaScript writes 2.0 as 2.
            parsed = json.loads(self.arguments, parse_float=_number)
            return as_content(parsed, origin_of(self.arguments)) if isinstance(self.arguments, Traced) else parsed
        except (ValueError, RecursionError):  # the latter for brackets without end
            return self.arguments


@dataclass(frozen=True, slots=True)
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
        calls = [[call.id, call.name, call.parsed_arguments()] for call in self.tool_calls]
        return json.dumps([self.role, self.text, calls, self.tool_call_id, self.name], sort_keys=True)


def digests(start: Digest, messages: Iterable[Message]) -> list[Digest]:
    """The digest after each message, where `start` is the digest of all that precedes the first."""
    chain = []
    for message in messages:
        start = digest(start, message.canonical())
        chain.append(start)
    return chain


def digest(before: Digest, text: str) -> Digest:
    """The digest of `text` coming after what `before` stands for."""
    return hashlib.blake2b(before + text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _number(text: str) -> float | int:
    value = float(text)
    return int(value) if value.is_integer() and abs(value) < 2**53 else value
