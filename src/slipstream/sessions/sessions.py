"""What clients do with sessions: create, read, extend, fork, roll back, pin, save and delete them."""

import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from slipstream import fields
from slipstream.chat import NO_SETTING, Conversations, Message, Prompt, Setting
from slipstream.chat.messages import Digest
from slipstream.engine import EngineCore
from slipstream.engine.commands import CountComputed, Pin, Unpin
from slipstream.errors import (
    ContextLengthError,
    InvalidRequestError,
    SessionConflictError,
    SessionNotFoundError,
    SlipstreamError,
)
from slipstream.sessions.ahead import AheadOfTime
from slipstream.sessions.database import Database
from slipstream.sessions.directory import Directory
from slipstream.sessions.history import History
from slipstream.sessions.kv_connector import KVConnector
from slipstream.sessions.state import SessionInfo, SessionLimits, SessionState, SessionTurn, tokens_of
from slipstream.sessions.turns import SessionTurns
from slipstream.sessions.worker import Worker

logger = logging.getLogger(__name__)


class Sessions:
    """All sessions of an engine. Thread-safe."""

    def __init__(
        self,
        core: EngineCore,
        conversations: Conversations,
        *,
        limits: SessionLimits,
        database: Database | None = None,
        connector: KVConnector | None = None,
    ) -> None:
        self._core = core
        self._conversations = conversations
        self._worker = Worker("slipstream-sessions")
        self.connector = connector
        self.ahead = AheadOfTime(core, conversations, self._worker)
        self._directory = Directory(core, conversations, self.ahead, self._worker, limits, database, connector)
        self.turns = SessionTurns(self._directory, conversations, self.ahead, connector)
        for state in self._directory.pinned():
            self._worker.run(lambda state=state: self._make_ready(state))  # type: ignore[misc]

    def __len__(self) -> int:
        return len(self._directory)

    def create(
        self,
        tenant: str,
        name: str | None = None,
        messages: Sequence[Message] = (),
        setting: Setting = NO_SETTING,
        *,
        ttl: float | None = None,
        pinned: bool = False,
    ) -> SessionState:
        """A new session; its messages are computed when there is nothing else to do.

        Raises `SessionConflictError` if the name is taken, `InvalidRequestError` for messages that can't be rendered.
        """
        history = History.begin(tenant).then(*messages)
        return self._add(self._new(tenant, name, history, setting, ttl), pinned=pinned)

    def get(self, tenant: str, name: str) -> SessionState:
        """The session of that name; raises `SessionNotFoundError`."""
        state = self._directory.find(tenant, name)
        if state is None or state.is_beginning:
            raise SessionNotFoundError(name)
        return state

    def ids(self, tenant: str) -> list[str]:
        """The names of all sessions of a tenant, most recently used first."""
        entries = reversed(self._directory.entries())
        begun = (entry for entry in entries if entry.state is None or not entry.state.is_beginning)
        return [entry.id for entry in begun if entry.tenant == tenant]

    def existing(self, tenant: str, names: Sequence[str]) -> list[SessionState]:
        """The sessions of those names, but for those that are gone."""
        found = (self._directory.find(tenant, name) for name in names)
        return [state for state in found if state is not None and not state.is_beginning]

    def infos(self, states: Sequence[SessionState]) -> list[SessionInfo]:
        """What sessions take at the moment."""
        tokens = [tokens_of(state, self._conversations) for state in states]
        computed = self._core.call(CountComputed([(s.tenant, ids) for s, ids in zip(states, tokens, strict=True)]))
        per_token = self._core.backend.store.bytes_per_token
        return [
            SessionInfo(state, count, count * per_token, self._saved_bytes(state))
            for state, count in zip(states, computed, strict=True)
        ]

    def append(self, tenant: str, name: str, messages: Sequence[Message]) -> SessionState:
        """Extend a session without an answer; the messages are computed when there is nothing else to do.

        Raises `SessionConflictError` while a turn is under way, `InvalidRequestError` for messages that can't be
        rendered; then nothing is appended.
        """
        return self._change(tenant, name, lambda state: state.history.then(*messages))

    def fork(self, tenant: str, name: str, *, keep: int | None = None, new_name: str | None = None) -> SessionState:
        """A new session of the first `keep` messages of another, by default all; they share the memory of those."""
        with self._directory.lock:
            state = self.get(tenant, name)
            fork = self._new(tenant, new_name, state.first(keep), state.setting, state.ttl)
        fork.parent = name
        return self._add(fork)

    def rollback(self, tenant: str, name: str, *, keep: int) -> SessionState:
        """Go back to the first `keep` messages; raises `SessionConflictError` while a turn is under way."""
        return self._change(tenant, name, lambda state: state.first(keep))

    def pin(self, tenant: str, name: str) -> SessionState:
        """Keep a session, and its KV in memory, until it is unpinned.

        Raises `InvalidRequestError` if pinned sessions would take more memory than requests can spare, `LimitError` if
        they are too many.
        """
        state = self.get(tenant, name)
        self._directory.require_room(state, pinned=True)
        tokens = tokens_of(state, self._conversations)
        if not self._core.call(Pin(state.pin_name, tenant, tokens)):
            advice = "there is no room for another pinned session: unpin one, or raise "
            raise InvalidRequestError(advice, fields.KV_MEMORY, param=fields.PINNED, code="kv_memory_full")
        state.pinned = True
        self._changed(state, self._prompt(state))
        return state

    def unpin(self, tenant: str, name: str) -> SessionState:
        """Let a session age like others, and its KV be evicted."""
        with self._directory.lock:
            state = self.get(tenant, name)
            state.pinned = False
            self._directory.note_use(state)
        self._core.call(Unpin(state.pin_name))
        self._directory.save(state)
        return state

    def keep_for(self, tenant: str, name: str, ttl: float) -> SessionState:
        """Let a session stay for so many seconds without being used."""
        with self._directory.lock:
            state = self.get(tenant, name)
            state.ttl = ttl
            self._directory.note_use(state)
        self._directory.save(state)
        return state

    def delete(self, tenant: str, name: str) -> None:
        """Forget a session and free what it alone holds; raises `SessionConflictError` while a turn is under way."""
        self._directory.forget(self.get(tenant, name))

    def forget_unnamed(self, tenant: str, name: str, head: Digest | None) -> None:
        """Forget a conversation that nobody named, if it still ends with the message of the key `head`."""
        self._directory.scrub()
        with self._directory.lock:
            state = self._directory.find(tenant, name)
            if state is None or state.named or state.turn is not None or state.history.head != head:
                return
            self._directory.forget(state)

    def save(self, tenant: str, name: str) -> SessionState:
        """Write a session's KV to disk before returning, as far as it's in memory."""
        state = self.get(tenant, name)
        connector = self._require_connector()
        if state.node is not None:
            connector.save_now(state.node)
        return state

    def load(self, tenant: str, name: str) -> SessionState:
        """Read a session's KV from disk before returning, as far as it's not in memory."""
        state = self.get(tenant, name)
        connector = self._require_connector()
        if state.node is not None:
            connector.restore(tenant, state.node, tokens_of(state, self._conversations))
        return state

    def close(self) -> None:
        """Stop the work in the background; call it after the engine's end, which saves what is unsaved."""
        self._worker.close()
        self._directory.save_late()
        if self.connector is not None:
            self.connector.close()

    def _new(
        self, tenant: str, name: str | None, history: History, setting: Setting, ttl: float | None
    ) -> SessionState:
        state = self._directory.new(tenant, name or f"sess_{secrets.token_hex(12)}", history, setting, ttl=ttl)
        state.named = True
        return state

    def _add(self, state: SessionState, *, pinned: bool = False) -> SessionState:
        """Have a new session found, unless its name is taken or it can't be rendered."""
        self._directory.require_room(state, pinned=pinned)
        state.pinned = pinned
        prompt = self._prompt(state)
        with self._directory.lock:
            if self._directory.find(state.tenant, state.id) is not None:
                raise SessionConflictError(f"there is a session {state.id!r} already: choose another id, or delete it")
            self._directory.add(state)
        self._directory.forget_surplus(state)
        self._changed(state, prompt)
        return state

    def _change(self, tenant: str, name: str, change: Callable[[SessionState], History]) -> SessionState:
        """Give a session other messages, unless they can't be rendered; it's busy meanwhile."""
        with self._directory.lock:
            state = self.get(tenant, name)
            state.require_idle()
            changed = replace(state, history=change(state), token_ids=None)
            self._directory.require_room(changed)
            state.turn = SessionTurn(tenant, name, changed.messages, state.setting, alone=True)
        try:
            prompt = self._prompt(changed)
            with self._directory.lock:
                state.history = changed.history
                self._directory.note_use(state)
        finally:
            state.turn = None
        self._changed(state, prompt)
        return state

    def _prompt(self, state: SessionState) -> Prompt | None:
        """The prompt that a session's next answer would have, as far as it's certain; None if it has no messages."""
        if not state.messages:
            return None
        asks = any(message.role == "user" for message in state.messages)
        render = self._conversations.prompt if asks else self._conversations.beginning
        prompt = render(state.messages, state.setting, tenant=state.tenant)
        length, limit = len(prompt.tokens), self._core.limits.max_sequence
        if length >= limit:
            message = f"the session would have {length:,} tokens, but there is room for {limit:,}: "
            raise ContextLengthError(message, "append less, or roll it back", prompt=length, wanted=0, limit=limit)
        return prompt

    def _changed(self, state: SessionState, prompt: Prompt | None) -> None:
        """Save a session, and have its prompt computed."""
        with self._directory.lock:
            state.node = prompt.parent if prompt is not None else None
            state.token_ids = prompt.tokens.ids if prompt is not None else np.empty(0, np.int32)
            state.tokens = len(state.token_ids)
        self._directory.save(state)
        if prompt is not None:
            self.turns.fetch(state.tenant, prompt)
            self.ahead.compute(state, prompt.tokens.ids)

    def _saved_bytes(self, state: SessionState) -> int:
        return self.connector.size(state.node) if self.connector is not None and state.node is not None else 0

    def _require_connector(self) -> KVConnector:
        if self.connector is None:
            raise InvalidRequestError("nothing is kept on disk: start with ", fields.STATE_DIR, code="no_state_dir")
        return self.connector

    def _make_ready(self, state: SessionState) -> None:
        try:
            self._changed(state, self._prompt(state))
        except SlipstreamError as error:  # another model's context may be shorter
            logger.warning("session %s can't be made ready: %s", state.id, error)
