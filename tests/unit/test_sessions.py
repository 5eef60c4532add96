"""Sessions under random use, compared with plain lists: what was said stays, and nobody has two turns alone."""

import secrets
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from slipstream.chat import NO_SETTING, ChatTemplate, Conversations, Message
from slipstream.chat.answers import Dialect
from slipstream.engine import EngineCore, TurnCounters
from slipstream.errors import ContextLengthError, InvalidRequestError, SessionConflictError, SessionNotFoundError
from slipstream.sessions import SessionLimits, Sessions, SessionTurn
from slipstream.tokenizer import Tokenizer
from tests.looking import Look
from tests.unit.toy_backend import STOP, VOCABULARY, ToyBackend, ToyTokenizer

CONTEXT = 120
TEMPLATE = "{% for m in messages %}{{ m.role[0] | upper }}{{ m.content }}E{% endfor %}A"

Names = st.sampled_from(["a", "b", "c", "d", "e", "f"])
Texts = st.text("abc", min_size=1, max_size=6)
Messages = st.lists(st.builds(Message, st.sampled_from(["user", "assistant"]), Texts), min_size=1, max_size=3)
Answers = st.lists(st.integers(1, 26), min_size=1, max_size=6)  # letters


class ToyChatTokenizer(ToyTokenizer):
    """One that can read too; what it has no token for is its last."""

    def encode(self, text: str, *, begins: bool = True) -> list[int]:
        known = {spelled: id for id, spelled in enumerate(self._bytes)}
        return [known.get(letter.encode(), VOCABULARY - 1) for letter in text]

    def begins_after(self, id: int) -> bool:
        return False

    def decode(self, ids: Iterable[int], *, skip_special: bool = True, shown: Container[int] = ()) -> str:
        assert STOP not in ids, "an answer is recorded without it"
        return super().decode(ids)


@dataclass
class Expected:
    """What a session should be."""

    messages: list[Message]
    pinned: bool = False
    turn: SessionTurn | None = None
    begun: bool = True
    """Whether it is one already, or will be with the answer to its first turn."""
    parent: str | None = None


class SessionsMachine(RuleBasedStateMachine):
    limit = 5

    def __init__(self) -> None:
        super().__init__()
        self.backend = ToyBackend(num_blocks=80)
        tokenizer = cast(Tokenizer, ToyChatTokenizer())
        self.core = EngineCore(
            self.backend,
            tokenizer,
            context_length=CONTEXT,
            stop_token_ids=frozenset({STOP}),
        )
        self.conversations = Conversations(ChatTemplate(TEMPLATE, {}), tokenizer, Dialect(TEMPLATE))
        self.sessions = Sessions(self.core, self.conversations, limits=SessionLimits(self.limit, ttl=1000))
        self.expected: dict[str, Expected] = {}  # least recently used first

    def teardown(self) -> None:
        self.core.shutdown()
        self.sessions.close()
        assert not self.backend.violations

    # What should happen

    def used(self, name: str) -> Expected:
        self.expected[name] = session = self.expected.pop(name)
        return session

    def forget_surplus(self, newest: str) -> None:
        """Forget sessions that are too many, but not the one that has just come."""
        others = ((name, session) for name, session in self.expected.items() if name != newest)
        idle = [name for name, session in others if not session.pinned and session.turn is None]
        pins = sum(session.pinned for session in self.expected.values())
        for name in idle[: max(0, len(self.expected) - pins - self.limit)]:
            del self.expected[name]

    def refused(self, name: str, action: Callable[[], Any], *, alone: bool = True) -> bool:
        """Whether an action is refused, as it should be, for want of the session or since it's busy."""
        session = self.expected.get(name)
        if session is None or not session.begun:
            with pytest.raises(SessionNotFoundError):
                action()
            return True
        if alone and session.turn is not None:
            with pytest.raises(SessionConflictError):
                action()
            return True
        return False

    def too_long(self, messages: list[Message]) -> bool:
        return sum(len(message.text) + 2 for message in messages) + 1 >= CONTEXT

    # What is done

    @rule(name=Names, messages=Messages | st.just([]))
    def create(self, name: str, messages: list[Message]) -> None:
        if name in self.expected:
            with pytest.raises(SessionConflictError):
                self.sessions.create("", name, messages)
            return
        self.sessions.create("", name, messages)
        self.expected[name] = Expected(messages)
        self.forget_surplus(name)

    @rule(name=Names, messages=Messages)
    def begin(self, name: str, messages: list[Message]) -> None:
        session = self.expected.get(name)
        if session is not None and session.turn is not None:
            with pytest.raises(SessionConflictError):
                self.sessions.turns.claim("", name, messages, NO_SETTING)
            return
        before = session.messages if session else []
        whole = bool(before) and before[0] == messages[0]
        turn = self.sessions.turns.claim("", name, messages, NO_SETTING)
        assert list(turn.messages) == (messages if whole else [*before, *messages])
        if session is None:
            session = self.expected[name] = Expected([], begun=False)
        session.turn = turn

    @rule(name=Names, token_ids=Answers)
    def answer(self, name: str, token_ids: list[int]) -> None:
        session = self.expected.get(name)
        if session is not None and session.turn is not None:
            self.give_answer(session.turn, token_ids)

    @rule(name=Names, messages=Messages, token_ids=Answers)
    def turn_with_a_hint(self, name: str, messages: list[Message], token_ids: list[int]) -> None:
        if name in self.expected:  # whose messages it would take the place of
            return
        turn = self.sessions.turns.claim("", name, messages, NO_SETTING, alone=False)
        assert list(turn.messages) == messages
        self.sessions.turns.release(turn)
        self.give_answer(turn, token_ids)

    def give_answer(self, turn: SessionTurn, token_ids: list[int]) -> None:
        name = cast(str, turn.name)
        prompt = self.conversations.prompt(turn.messages)
        text = ToyTokenizer().decode(token_ids)
        message = Message("assistant", text)
        self.sessions.turns.answered(turn, prompt, message, token_ids, text, TurnCounters())
        self.sessions.turns.release(turn)
        session = self.expected.setdefault(name, Expected([]))
        session.messages, session.turn, session.begun = [*turn.messages, message], None, True
        self.used(name)
        self.forget_surplus(name)
        assert np.array_equal(self.sessions.get("", name).token_ids, [*prompt.tokens.ids, *token_ids])

    @rule(name=Names, times=st.integers(1, 2))
    def give_up(self, name: str, times: int) -> None:
        session = self.expected.get(name)
        if session is None or session.turn is None:
            return
        for _ in range(times):
            self.sessions.turns.release(session.turn)
        session.turn = None
        if not session.begun:
            del self.expected[name]

    @rule(name=Names, messages=Messages)
    def append(self, name: str, messages: list[Message]) -> None:
        if self.refused(name, lambda: self.sessions.append("", name, messages)):
            return
        extended = [*self.expected[name].messages, *messages]
        if self.too_long(extended):
            with pytest.raises(ContextLengthError):
                self.sessions.append("", name, messages)
            return
        self.sessions.append("", name, messages)
        self.used(name).messages = extended

    @rule(name=Names, keep=st.integers(0, 8))
    def rollback(self, name: str, keep: int) -> None:
        if self.refused(name, lambda: self.sessions.rollback("", name, keep=keep)):
            return
        kept = self.expected[name].messages[:keep]
        if keep > len(kept):
            with pytest.raises(InvalidRequestError, match="keep"):
                self.sessions.rollback("", name, keep=keep)
        elif not self.too_long(kept):
            self.sessions.rollback("", name, keep=keep)
            self.used(name).messages = kept

    @rule(name=Names, new_name=Names, keep=st.none() | st.integers(0, 8))
    def fork(self, name: str, new_name: str, keep: int | None) -> None:
        def fork() -> None:
            self.sessions.fork("", name, keep=keep, new_name=new_name)

        if self.refused(name, fork, alone=False):
            return
        kept = self.expected[name].messages[:keep]
        if keep is not None and keep > len(kept):
            with pytest.raises(InvalidRequestError, match="keep"):
                fork()
        elif self.too_long(kept):
            with pytest.raises(ContextLengthError):
                fork()
        elif new_name in self.expected:
            with pytest.raises(SessionConflictError):
                fork()
        else:
            fork()
            self.expected[new_name] = Expected(kept, parent=name)
            self.forget_surplus(new_name)

    @rule(name=Names, pinned=st.booleans())
    def pin_or_unpin(self, name: str, pinned: bool) -> None:
        act = self.sessions.pin if pinned else self.sessions.unpin
        if self.refused(name, lambda: act("", name), alone=False) or self.too_long(self.expected[name].messages):
            return
        act("", name)
        self.expected[name].pinned = pinned
        if not pinned:
            self.used(name)

    @rule(name=Names)
    def delete(self, name: str) -> None:
        if not self.refused(name, lambda: self.sessions.delete("", name)):
            self.sessions.delete("", name)
            del self.expected[name]

    # What is always so

    @invariant()
    def sessions_are_as_expected(self) -> None:
        states = self.sessions.existing("", self.sessions.ids(""))
        begun = [name for name, session in self.expected.items() if session.begun]
        assert [state.id for state in states] == begun[::-1]
        for state in states:
            session = self.expected[state.id]
            assert list(state.messages) == session.messages
            assert (state.pinned, state.turn, state.parent) == (session.pinned, session.turn, session.parent)
        assert len(self.sessions) == len(self.expected)
        assert self.sessions.ids(secrets.token_hex(2)) == []

    @invariant()
    def sizes_are_possible(self) -> None:
        for info in self.sessions.infos(self.sessions.existing("", self.sessions.ids(""))):
            assert 0 <= info.kv_tokens <= info.state.tokens

    @invariant()
    def memory_is_consistent(self) -> None:
        self.core.call(Look(lambda kv: kv.check()))
        pinned = {name for name, session in self.expected.items() if session.pinned}
        assert self.core.stats().kv.pinned_sequences <= len(pinned)


TestSessions = SessionsMachine.TestCase
TestSessions.settings = settings(max_examples=40, stateful_step_count=40)
