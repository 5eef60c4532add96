"""What a session is."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from slipstream import fields
from slipstream.chat import Conversations, Message, Setting
from slipstream.chat.messages import Digest
from slipstream.errors import InvalidRequestError, SessionConflictError
from slipstream.sessions.history import History
from slipstream.types import IntArray

if TYPE_CHECKING:
    from slipstream.sessions.breaks import ReuseBreak


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """How long a session stays, and what those of one tenant may take together."""

    sessions: int = 2048
    """When there are more, the least recently used are forgotten; pinned ones don't count."""
    pins: int = 128
    """How many may be pinned."""
    memory: int = 256 * 2**20
    """Bytes of messages, tools and variables in memory. The least recently used leave it first."""
    ttl: float = 86_400.0
    """Seconds that a session stays without being used, unless it says otherwise."""


@dataclass(slots=True)
class SessionState:
    """A conversation by name. Times are in seconds since the epoch."""

    id: str
    tenant: str
    history: History
    setting: Setting
    """What its messages stand in: all tools that it has, and variables of the chat template."""
    created: float
    used: float
    ttl: float
    """How long it stays without being used."""
    named: bool = False
    """Whether a client gave it its name, or made it; the others go by their conversation's id."""
    shared: bool = False
    """Whether conversations that went different ways go by its id, which can happen where nobody gave a name."""
    pinned: bool = False
    """Whether its KV stays in memory, and the session itself whatever its age."""
    parent: str | None = None
    """The session that it was forked from."""
    node: Digest | None = None
    """The last part of the conversation that is in the ledger."""
    tokens: int = 0
    """How long it is, as a prompt or after its last answer."""
    token_ids: IntArray | None = field(default=None, compare=False)
    """The tokens of its prompt, or up to its last answer, int32 [n]; None until they are asked for after a restart."""
    turn: "SessionTurn | None" = field(default=None, compare=False)
    """The turn that is under way, if it has a session for itself."""
    ahead: range = field(default=range(0), compare=False)
    """Which of its tokens were computed ahead of the next turn."""

    setting_size: tuple[Setting | None, int] = field(default=(None, 0), compare=False, repr=False)
    """The setting that was measured last, and what it takes."""
    forgotten: bool = field(default=False, compare=False)
    """Whether it is no session any more."""

    @property
    def messages(self) -> tuple[Message, ...]:
        """What was said."""
        return self.history.messages

    @property
    def size(self) -> int:
        """Bytes of its messages, tools and variables, about."""
        measured, size = self.setting_size
        if measured is not self.setting:
            tools = [tool.as_dict() for tool in self.setting.tools.tools]
            size = len(json.dumps([tools, dict(self.setting.template_kwargs)]))
            self.setting_size = self.setting, size
        return size + self.history.size

    @property
    def pin_name(self) -> str:
        """What its pin in KV memory is called."""
        return f"{self.tenant}\n{self.id}"

    @property
    def expires(self) -> float | None:
        """When it will be forgotten, unless it's used before."""
        return None if self.pinned else self.used + self.ttl

    @property
    def is_beginning(self) -> bool:
        """Whether it will only be a session if its first turn comes to an answer."""
        return self.turn is not None and self.turn.first

    def require_idle(self) -> None:
        """Raise `SessionConflictError` if a turn is under way."""
        if self.turn is not None:
            raise SessionConflictError(
                f"session {self.id!r} is answering another request: wait for that, or fork the session", retry_after=1
            )

    def first(self, keep: int | None) -> History:
        """The first `keep` messages, by default all; raises `InvalidRequestError` if there are fewer."""
        count = len(self.messages)
        if keep is not None and not 0 <= keep <= count:
            raise InvalidRequestError(fields.KEEP, f" must be 0 to {count}: so many messages there are")
        return self.history.first(keep)

    def joined(
        self, messages: Sequence[Message], system: Message | None = None, *, continues: bool | None = None
    ) -> tuple[Message, ...]:
        """The conversation that a request with these messages means.

        They are all of it if they begin as the session does, or with a system message; else they are its next ones.
        `continues` tells where that's known. `system` takes the place of the session's own system message.
        Raises `InvalidRequestError` for new messages alone where it's not sure which conversation they belong to.
        """
        if messages and messages[0].role == "system":
            return tuple(messages)
        own = self.messages[:1] if self.messages and self.messages[0].role == "system" else ()
        said = self.messages[len(own) :]
        lead = own if system is None else (system,)
        if continues is None:
            continues = not (messages and said and messages[0].digest == said[0].digest)
        if not continues:
            return (*lead, *messages)
        if self.shared:
            complaint = f"several conversations go by the id {self.id!r}, since nobody gave them names: "
            advice = "send the whole conversation, or name sessions yourself"
            raise InvalidRequestError(complaint, advice, param=fields.SESSION_ID, code="session_shared")
        return (*lead, *said, *messages)


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """A session and what it takes at the moment."""

    state: SessionState
    kv_tokens: int
    """How many of its tokens have their KV in memory."""
    kv_bytes: int
    saved_bytes: int
    """KV on disk."""


@dataclass(slots=True, eq=False)
class SessionTurn:
    """A turn of a conversation, from its messages to its answer. `name` is the session that it will be, if known."""

    tenant: str
    name: str | None
    messages: tuple[Message, ...]
    setting: Setting
    alone: bool = False
    """Whether the session can have no other turn meanwhile."""
    first: bool = False
    """Whether the session begins with it."""
    history: History | None = None
    """The messages as storage knows them, once that's known; then with the answer."""
    reuse: bool = True
    """Whether it may use what is in memory."""
    reuse_break: "ReuseBreak | None" = None
    """Why it computed again what had been computed before, if it did; known once it's answered."""


def tokens_of(state: SessionState, conversations: Conversations) -> IntArray:
    """The token ids of a session, as far as they were ever made, int32 [n]."""
    if state.token_ids is None:
        known = conversations.known(state.messages, state.setting, tenant=state.tenant)
        state.token_ids = known.tokens.ids if known is not None else np.empty(0, np.int32)
    return state.token_ids
