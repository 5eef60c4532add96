"""The turns of sessions: each begins with messages that join known ones, and ends with an answer that joins them."""

import secrets
from collections.abc import Sequence

from slipstream.chat import NO_SETTING, Conversations, Message, Part, Prompt, Setting, ToolUse
from slipstream.engine import TurnCounters
from slipstream.sessions.ahead import AheadOfTime
from slipstream.sessions.breaks import ReuseBreaks
from slipstream.sessions.directory import Directory
from slipstream.sessions.history import History
from slipstream.sessions.kv_connector import KVConnector
from slipstream.sessions.state import SessionState, SessionTurn


class SessionTurns:
    """Every turn of a conversation goes through `claim` and `answered`.

    A conversation that nobody named is a session too, by the id that its answers carry. Thread-safe.
    """

    def __init__(
        self, directory: Directory, conversations: Conversations, ahead: AheadOfTime, connector: KVConnector | None
    ) -> None:
        self._directory = directory
        self._conversations = conversations
        self._ahead = ahead
        self._connector = connector
        self.breaks = ReuseBreaks(directory.find, conversations.relevant, directory.missing_kind)

    def claim(
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
        with self._directory.lock:
            state = self._directory.find(tenant, name)
            first = state is None
            if state is None:
                state = self._directory.new(tenant, name)
            state.require_idle()
            asked = state.joined(messages, system, continues=continues)
            state.turn = SessionTurn(tenant, name, asked, setting.in_session(state.setting), alone, first)
            self._directory.add(state)
            return state.turn

    def release(self, turn: SessionTurn) -> None:
        """Let the session have other turns; harmless when it's done already."""
        if turn.name is None:
            return
        with self._directory.lock:
            state = self._directory.find(turn.tenant, turn.name)
            if state is not None and state.turn is turn:
                state.turn = None
                if turn.first:  # it never came to be
                    self._directory.remove([(turn.tenant, turn.name)])

    def prepare(self, turn: SessionTurn, prompt: Prompt, *, reuse: bool) -> None:
        """Have ready what the answer will take, and in memory what disk has of the prompt; takes as long as reading it.

        What is done here makes nobody wait at the turn's end.
        """
        state = self._directory.find(turn.tenant, turn.name or prompt.conversation_id)
        turn.history = History.of(turn.messages, state.history if state is not None else History.begin(turn.tenant))
        turn.reuse = reuse
        if reuse:
            self.fetch(turn.tenant, prompt)

    def fetch(self, tenant: str, prompt: Prompt) -> None:
        """Bring into memory what disk has of a prompt."""
        if self._connector is not None and prompt.parent is not None:
            self._connector.restore(tenant, prompt.parent, prompt.tokens.ids)

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

        `token_ids` and `text` are what was generated, see `Conversations.record`. Returns the session's id. A turn
        that was released before leaves its session as it is.
        """
        turn.reuse_break = self.breaks.explain(turn, prompt, counters.reused_tokens)
        part = self._conversations.record(prompt, answer, token_ids, text)
        with self._directory.lock:
            state = self._successor(turn, prompt, part)
            if turn.alone and state.turn is not turn:
                return state.id
            self._ahead.count(state, counters)
            asked = turn.history or History.of(turn.messages, state.history)
            turn.history = state.history = asked.then(answer)
            setting = Setting(ToolUse(turn.setting.tools.described), turn.setting.template_kwargs)
            state.setting = state.setting if state.setting == setting else setting  # which was measured
            state.named = state.named or turn.alone
            state.token_ids = part.tokens.ids if part is not None else prompt.tokens.ids
            state.node = part.key if part is not None else prompt.parent
            state.tokens = len(state.token_ids)
            state.turn = None if state.turn is turn else state.turn
            self._directory.note_use(state)
        self.breaks.note(state)
        self._directory.save(state)
        self._directory.forget_surplus(state)
        if part is not None:
            if answer.tool_calls:
                self._ahead.expect(turn.tenant, part.tokens.ids)
            if self._connector is not None:
                self._connector.add(turn.tenant, part)
            self._ahead.compute_after_answer(state, part.tokens.ids, turn.setting)
        return state.id

    def _successor(self, turn: SessionTurn, prompt: Prompt, part: Part | None) -> SessionState:
        """The session that a turn moves on.

        One that a client named moves with the client's own turns only; a conversation that nobody named, or that took
        another way than the session of its name, has one of its own.
        """
        conversation_id = part.entry.conversation_id if part is not None else prompt.conversation_id
        for name in (turn.name or conversation_id, conversation_id):
            state = self._directory.find(turn.tenant, name)
            if state is None:
                return self._directory.new(turn.tenant, name)
            if turn.alone:
                return state
            goes_on = state.turn is None and prompt.parent is not None and prompt.parent == state.node
            if not state.named or (goes_on and turn.name is not None):
                state.shared = state.shared or not goes_on
                return state
        return self._directory.new(turn.tenant, f"conv_{secrets.token_hex(12)}")
