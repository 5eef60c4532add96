"""Sessions: conversations by name, extended, forked and rolled back; the one place where turns begin and end."""

import logging
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np

from slipstream import fields
from slipstream.backend.base import IntArray
from slipstream.chat import NO_SETTING, Conversations, Message, Part, Prompt, Setting
from slipstream.engine import EngineCore, TurnCounters
from slipstream.errors import (
    ContextLengthError,
    EngineStoppedError,
    InvalidRequestError,
    SessionConflictError,
    SessionNotFoundError,
    SlipstreamError,
)
from slipstream.kv import KVMemory
from slipstream.sessions.ahead import AheadOfTime
from slipstream.sessions.database import Database
from slipstream.sessions.later import Later
from slipstream.sessions.saver import Saver
from slipstream.sessions.state import SessionInfo, SessionState, SessionTurn

logger = logging.getLogger(__name__)

MAX_SESSIONS = 2048
"""When there are more, the least recently used are forgotten, but none that is pinned."""

_AHEAD_DELAY = 0.03
"""Seconds after an answer until work for the next turn begins: who comes back at once finds nothing in the way."""

_EXPIRY_INTERVAL = 10.0


class Sessions:
    """All sessions of an engine. Every turn of a conversation goes through `begin` and `answered`.

    A conversation that nobody named is a session too, by the id that its answers carry. Thread-safe.
    `ttl` is how many seconds a session stays without being used, unless it says otherwise.
    """

    def __init__(
        self,
        core: EngineCore,
        conversations: Conversations,
        *,
        ttl: float,
        database: Database | None = None,
        saver: Saver | None = None,
    ) -> None:
        self._core = core
        self._conversations = conversations
        self._ttl = ttl
        self._database = database
        self.saver = saver
        self._states: dict[tuple[str, str], SessionState] = {}  # least recently used first
        self._lock = threading.RLock()
        self._later = Later("slipstream-sessions")
        self.ahead = AheadOfTime(core, conversations)
        if database is not None:
            self._restore(database)
        self._later.run(self._tidy, after=_EXPIRY_INTERVAL)

    def __len__(self) -> int:
        return len(self._states)

    # Turns

    def begin(
        self,
        tenant: str,
        name: str | None,
        messages: Sequence[Message],
        setting: Setting,
        *,
        system: Message | None = None,
        alone: bool = True,
        continues: bool | None = None,
    ) -> SessionTurn:
        """Start a turn of the session called `name`, if there is a name; `release` it when it's over.

        With `alone`, the session has no other turn meanwhile, and `messages` may be its next ones only, see
        `SessionState.joined`. Without, the name is a hint, which strangers may share: the messages are a whole
        conversation, and nothing of the session gets into it.

        Raises `SessionConflictError` if a turn is under way.
        """
        if name is None or not alone:
            whole = (*([system] if system else []), *messages)
            return SessionTurn(tenant, name, whole, setting.in_session(NO_SETTING))
        with self._lock:
            state = self._states.get((tenant, name))
            first = state is None
            if state is None:
                state = self._new(tenant, name)
            state.require_idle()
            asked = state.joined(messages, system, continues=continues)
            turn = SessionTurn(tenant, name, asked, setting.in_session(state.setting), alone, first)
            state.turn = turn
            self._states[tenant, name] = state
            return turn

    def release(self, turn: SessionTurn) -> None:
        """Let the session have other turns; harmless when it's done already."""
        if turn.name is None:
            return
        with self._lock:
            state = self._states.get((turn.tenant, turn.name))
            if state is not None and state.turn is turn:
                state.turn = None
                if turn.first:  # it never came to be
                    del self._states[turn.tenant, turn.name]

    def fetch(self, tenant: str, prompt: Prompt) -> None:
        """Bring into memory what disk has of a prompt; takes as long as reading it."""
        if self.saver is not None and prompt.parent is not None:
            self.saver.restore(tenant, prompt.parent, prompt.token_ids)

    def answered(
        self,
        turn: SessionTurn,
        prompt: Prompt,
        answer: Message,
        token_ids: Sequence[int],
        text: str,
        counters: TurnCounters,
    ) -> str:
        """End a turn: its messages and the answer are the session now, on disk too, and its KV will be kept.

        `token_ids` and `text` are what was generated, see `Conversations.record`. Returns the session's id.
        """
        part = self._conversations.record(prompt, answer, token_ids, text)
        with self._lock:
            state = self._successor(turn, prompt, part)
            self.ahead.count(state, counters)
            state.messages = (*turn.messages, answer)
            state.tools = turn.setting.tools.tools
            state.template_kwargs = turn.setting.template_kwargs
            state.named = state.named or turn.alone
            state.token_ids = part.token_ids if part is not None else prompt.token_ids
            state.node = part.key if part is not None else prompt.parent
            state.tokens = len(state.token_ids)
            state.turn = None if state.turn is turn else state.turn
            self._note_use(state)
        self._forget_surplus(state)
        self._store(state, part)
        if part is not None:
            if self.saver is not None:
                self.saver.add(turn.tenant, part)
            self.ahead.expect()
            self._later.run(
                lambda: self.ahead.compute_after_answer(state, part.token_ids, turn.setting), after=_AHEAD_DELAY
            )
        return state.id

    # What else may be done with a session

    def create(
        self,
        tenant: str,
        name: str | None = None,
        messages: Sequence[Message] = (),
        setting: Setting = NO_SETTING,
        *,
        ttl: float | None = None,
        pinned: bool = False,
        parent: str | None = None,
    ) -> SessionState:
        """A new session; its messages are computed when there is nothing else to do.

        Raises `SessionConflictError` if the name is taken, `InvalidRequestError` for messages that can't be rendered.
        """
        name = name or f"sess_{secrets.token_hex(12)}"
        state = self._new(tenant, name, tuple(messages), setting, ttl=ttl)
        state.named, state.pinned, state.parent = True, pinned, parent
        prompt = self._prompt(state)
        with self._lock:
            if (tenant, name) in self._states:
                raise SessionConflictError(f"there is a session {name!r} already: choose another id, or delete it")
            self._states[tenant, name] = state
        self._forget_surplus(state)
        self._changed(state, prompt)
        return state

    def get(self, tenant: str, name: str) -> SessionState:
        """The session of that name; raises `SessionNotFoundError`."""
        with self._lock:
            state = self._states.get((tenant, name))
            if state is None or state.is_beginning:
                raise SessionNotFoundError(name)
            return state

    def all(self, tenant: str) -> list[SessionState]:
        """All sessions of a tenant, most recently used first."""
        with self._lock:
            states = reversed(self._states.values())
            return [state for state in states if state.tenant == tenant and not state.is_beginning]

    def infos(self, states: Sequence[SessionState]) -> list[SessionInfo]:
        """What sessions take at the moment."""
        tokens = [self._tokens_of(state) for state in states]

        def measure(kv: KVMemory) -> list[int]:
            return [kv.computed(state.tenant, ids) for state, ids in zip(states, tokens, strict=True)]

        per_token = self._core.kv_bytes_per_token
        return [
            SessionInfo(state, computed, computed * per_token, self._saved_bytes(state))
            for state, computed in zip(states, self._core.call(measure), strict=True)
        ]

    def append(self, tenant: str, name: str, messages: Sequence[Message]) -> SessionState:
        """Extend a session without an answer; the messages are computed when there is nothing else to do.

        Raises `SessionConflictError` while a turn is under way, `InvalidRequestError` for messages that can't be
        rendered; then nothing is appended.
        """
        return self._change_messages(tenant, name, lambda state: (*state.messages, *messages))

    def fork(self, tenant: str, name: str, *, keep: int | None = None, new_name: str | None = None) -> SessionState:
        """A new session of the first `keep` messages of another, by default all; they share the memory of those."""
        with self._lock:
            state = self.get(tenant, name)
            kept = state.first(keep)
        return self.create(tenant, new_name, kept, state.setting, ttl=state.ttl, parent=name)

    def rollback(self, tenant: str, name: str, *, keep: int) -> SessionState:
        """Go back to the first `keep` messages; raises `SessionConflictError` while a turn is under way."""
        return self._change_messages(tenant, name, lambda state: state.first(keep))

    def pin(self, tenant: str, name: str) -> SessionState:
        """Keep a session, and its KV in memory, until it is unpinned.

        Raises `InvalidRequestError` if pinned sessions would take more memory than requests can spare.
        """
        state = self.get(tenant, name)
        if not self._core.call(lambda kv: kv.pin(state.pin_name, tenant, self._tokens_of(state))):
            advice = "there is no room for another pinned session: unpin one, or raise "
            raise InvalidRequestError(advice, fields.KV_MEMORY, param=fields.PINNED, code="kv_memory_full")
        state.pinned = True
        self._changed(state, self._prompt(state))
        return state

    def unpin(self, tenant: str, name: str) -> SessionState:
        """Let a session age like others, and its KV be evicted."""
        with self._lock:
            state = self.get(tenant, name)
            state.pinned = False
            self._note_use(state)
        self._core.call(lambda kv: kv.unpin(state.pin_name))
        self._store(state)
        return state

    def keep_for(self, tenant: str, name: str, ttl: float) -> SessionState:
        """Let a session stay for so many seconds without being used."""
        with self._lock:
            state = self.get(tenant, name)
            state.ttl = ttl
            self._note_use(state)
        self._store(state)
        return state

    def delete(self, tenant: str, name: str) -> None:
        """Forget a session and free what it alone holds; raises `SessionConflictError` while a turn is under way."""
        with self._lock:
            state = self.get(tenant, name)
            state.require_idle()
            del self._states[tenant, name]
        self._let_go([state])

    def save(self, tenant: str, name: str) -> SessionState:
        """Write a session's KV to disk before returning, as far as it's in memory."""
        state = self.get(tenant, name)
        saver = self._require_saver()
        if state.node is not None:
            saver.save_now(state.node)
        return state

    def load(self, tenant: str, name: str) -> SessionState:
        """Read a session's KV from disk before returning, as far as it's not in memory."""
        state = self.get(tenant, name)
        saver = self._require_saver()
        if state.node is not None:
            saver.restore(tenant, state.node, self._tokens_of(state))
        return state

    def close(self) -> None:
        """Stop the work in the background; call it after the engine's end, which saves what is unsaved."""
        self._later.close()
        if self.saver is not None:
            self.saver.close()
        if self._database is not None:
            self._database.close()

    # How it works

    def _successor(self, turn: SessionTurn, prompt: Prompt, part: Part | None) -> SessionState:
        """The session that a turn moves on.

        One that a client named moves with the client's own turns only; a conversation that nobody named, or that took
        another way than the session of its name, has one of its own.
        """
        conversation_id = part.entry.conversation_id if part is not None else prompt.conversation_id
        for name in (turn.name or conversation_id, conversation_id):
            state = self._states.get((turn.tenant, name))
            if state is None:
                return self._new(turn.tenant, name)
            if turn.alone:
                return state
            goes_on = state.turn is None and prompt.parent is not None and prompt.parent == state.node
            if not state.named or (goes_on and turn.name is not None):
                state.shared = state.shared or not goes_on
                return state
        return self._new(turn.tenant, f"conv_{secrets.token_hex(12)}")

    def _change_messages(
        self, tenant: str, name: str, change: Callable[[SessionState], tuple[Message, ...]]
    ) -> SessionState:
        """Give a session other messages, unless they can't be rendered; it's busy meanwhile."""
        with self._lock:
            state = self.get(tenant, name)
            state.require_idle()
            changed = replace(state, messages=change(state), token_ids=None)
            state.turn = SessionTurn(tenant, name, changed.messages, state.setting, alone=True)
        try:
            prompt = self._prompt(changed)
            with self._lock:
                state.messages = changed.messages
                self._note_use(state)
        finally:
            state.turn = None
        self._changed(state, prompt)
        return state

    def _new(
        self,
        tenant: str,
        name: str,
        messages: tuple[Message, ...] = (),
        setting: Setting = NO_SETTING,
        *,
        ttl: float | None = None,
    ) -> SessionState:
        now, kept_for = time.time(), self._ttl if ttl is None else ttl
        return SessionState(name, tenant, messages, setting.tools.tools, setting.template_kwargs, now, now, kept_for)

    def _prompt(self, state: SessionState) -> Prompt | None:
        """The prompt that a session's next answer would have, as far as it's certain; None if it has no messages."""
        if not state.messages:
            return None
        asks = any(message.role == "user" for message in state.messages)
        render = self._conversations.prompt if asks else self._conversations.beginning
        prompt = render(state.messages, state.setting, tenant=state.tenant)
        if len(prompt.token_ids) >= self._core.limits.max_sequence:
            raise ContextLengthError(
                f"the session would have {len(prompt.token_ids):,} tokens, but there is room for "
                f"{self._core.limits.max_sequence:,}: append less, or roll it back"
            )
        return prompt

    def _changed(self, state: SessionState, prompt: Prompt | None) -> None:
        """Save a session, and have its prompt computed."""
        with self._lock:
            known = self._known(state)
            state.node = known.key if known is not None else None
            state.token_ids = prompt.token_ids if prompt is not None else np.empty(0, np.int32)
            state.tokens = len(state.token_ids)
        self._store(state)
        if prompt is not None:
            self.fetch(state.tenant, prompt)
            self.ahead.compute(state, prompt.token_ids)

    def _note_use(self, state: SessionState) -> None:
        """Count a session as used now. The lock is held."""
        state.used = time.time()
        self._states.pop((state.tenant, state.id), None)
        self._states[state.tenant, state.id] = state

    def _store(self, state: SessionState, part: Part | None = None) -> None:
        if self._database is None:
            return
        try:
            with self._lock:
                if self._states.get((state.tenant, state.id)) is state:  # not forgotten meanwhile
                    self._database.save(state, part)
        except sqlite3.Error as error:  # such as a full disk: it costs nobody an answer
            logger.warning("session %s can't be saved and is in memory alone: %s", state.id, error)

    def _known(self, state: SessionState) -> Part | None:
        """As much of a session as is in the ledger."""
        return self._conversations.known(state.messages, state.setting, tenant=state.tenant)

    def _tokens_of(self, state: SessionState) -> IntArray:
        """The token ids of a session, as far as they were ever made."""
        if state.token_ids is None:
            known = self._known(state)
            state.token_ids = known.token_ids if known is not None else np.empty(0, np.int32)
        return state.token_ids

    def _saved_bytes(self, state: SessionState) -> int:
        return self.saver.size(state.node) if self.saver is not None and state.node is not None else 0

    def _require_saver(self) -> Saver:
        if self.saver is None:
            raise InvalidRequestError("nothing is kept on disk: start with ", fields.STATE_DIR, code="no_state_dir")
        return self.saver

    def _restore(self, database: Database) -> None:
        for key, entry in database.parts():
            self._conversations.restore(key, entry)
        for state in database.sessions():
            self._states[state.tenant, state.id] = state
        for state in list(self._states.values()):
            if state.pinned:
                self._later.run(lambda state=state: self._restore_pinned(state))  # type: ignore[misc]

    def _restore_pinned(self, state: SessionState) -> None:
        try:
            self._changed(state, self._prompt(state))
        except SlipstreamError as error:  # another model's context may be shorter
            logger.warning("session %s can't be made ready: %s", state.id, error)

    def _tidy(self) -> None:
        """Forget what has expired, from time to time."""
        now = time.time()
        with self._lock:
            gone = [s for s in self._states.values() if s.expires is not None and s.expires < now and s.turn is None]
            for state in gone:
                del self._states[state.tenant, state.id]
        self._later.run(self._tidy, after=_EXPIRY_INTERVAL)
        self._let_go(gone)
        if self._database is not None:
            self._database.checkpoint()

    def _forget_surplus(self, newest: SessionState) -> None:
        with self._lock:
            surplus = len(self._states) - MAX_SESSIONS
            others = (state for state in self._states.values() if state is not newest)
            idle = (state for state in others if not state.pinned and state.turn is None)
            gone = [state for state, _ in zip(idle, range(surplus), strict=False)]
            for state in gone:
                del self._states[state.tenant, state.id]
        if gone:
            self._later.run(lambda: self._let_go(gone))

    def _let_go(self, states: Iterable[SessionState]) -> None:
        """Free what sessions held that are no more."""
        for state in states:
            state.forgotten = True
            tokens = self._tokens_of(state)
            if len(tokens) and state.messages[-1].role == "assistant":
                tokens = self.ahead.with_certain_tail(state, tokens, state.setting)

            def free(kv: KVMemory, state: SessionState = state, tokens: IntArray = tokens) -> None:
                kv.unpin(state.pin_name)
                kv.discard(state.tenant, tokens)

            with suppress(EngineStoppedError):  # which frees all there is
                self._core.call(free)
            if self._database is not None:
                self._database.delete(state)
