"""The messages of a conversation as storage has them: a row for each, found by what it and all before it say."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from slipstream.chat import Message, ToolCall
from slipstream.chat.messages import Digest
from slipstream.sessions.tree import Row


@dataclass(frozen=True, slots=True)
class History:
    """Messages, each with a key that stands for it and all before it, to the letter.

    The keys of the ledger are no good for this: they are equal for messages that mean the same.
    Those of different tenants differ, so that tenants share no rows.
    """

    messages: tuple[Message, ...] = ()
    keys: tuple[Digest, ...] = ()
    owner: Digest = b""
    """What stands for the tenant before the first key."""
    size: int = 0
    """Bytes of the messages, about."""

    @classmethod
    def begin(cls, tenant: str) -> "History":
        """A tenant's history without messages."""
        return cls(owner=owner_of(tenant))

    @classmethod
    def of(cls, messages: Sequence[Message], known: "History") -> "History":
        """The history of these messages, with the keys of those that begin a known one."""
        equal = [*map(Message.equals, messages, known.messages), False]
        start = known.first(equal.index(False))
        return start.then(*messages[len(start.messages) :])

    @classmethod
    def read(cls, rows: Sequence[Row], tenant: str) -> "History":
        """The tenant's history that was written as these rows, in order."""
        messages = tuple(_message(row.value) for row in rows)
        return cls(messages, tuple(row.key for row in rows), owner_of(tenant), _size(messages))

    @property
    def head(self) -> Digest | None:
        """The key of all of it; None if there are no messages."""
        return self.keys[-1] if self.keys else None

    def first(self, count: int | None) -> "History":
        """The first messages alone, by default all."""
        rest = self.messages[count:] if count is not None else ()
        return History(self.messages[:count], self.keys[:count], self.owner, self.size - _size(rest))

    def then(self, *messages: Message) -> "History":
        """The same with more messages."""
        keys = [self.head or self.owner]
        for message in messages:
            keys.append(hashlib.blake2b(keys[-1] + _value(message), digest_size=16).digest())
        size = self.size + _size(messages)
        return History((*self.messages, *messages), (*self.keys, *keys[1:]), self.owner, size)

    def rows_backwards(self) -> Iterator[Row]:
        """A row for each message, the last one first."""
        for at in reversed(range(len(self.keys))):
            yield Row(self.keys[at], self.keys[at - 1] if at else None, _value(self.messages[at]))


def owner_of(tenant: str) -> Digest:
    """What stands for a tenant in the keys of its rows; nothing for the tenant without a name."""
    return hashlib.blake2b(tenant.encode(), digest_size=16).digest() if tenant else b""


def _size(messages: Sequence[Message]) -> int:
    calls = sum(len(call.arguments) + len(call.name) for message in messages for call in message.tool_calls)
    return calls + sum(100 + len(message.text) + len(message.reasoning) for message in messages)


def _value(message: Message) -> bytes:
    calls = [[call.id, call.name, call.arguments] for call in message.tool_calls]
    row = [message.role, message.text, calls, message.tool_call_id, message.name, message.reasoning]
    return json.dumps(row).encode()  # ASCII, for a client may send half of a surrogate pair


def _message(value: bytes) -> Message:
    role, text, calls, *rest = json.loads(value)
    return Message(role, text, tuple(ToolCall(*call) for call in calls), *rest)
