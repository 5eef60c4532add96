"""Why a turn computed again what was computed before: how it differs from the known conversation nearest to it."""

import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from slipstream import fields
from slipstream.chat import Message, Prompt, Setting, Tool, ToolCall, ToolUse
from slipstream.chat.messages import Digest
from slipstream.chat.setting import place_of
from slipstream.recent import Recent
from slipstream.sessions.state import SessionState, SessionTurn

Kind = Literal[
    "system_changed",
    "tools_changed",
    "tools_reordered",
    "template_kwargs_changed",
    "reasoning_dropped",
    "message_edited",
    "message_removed",
    "message_inserted",
    "template_rewrote",
    "evicted",
    "not_exact",
    "other_tenant",
]

_WORTH_TELLING = 32
"""Tokens; when memory is full, it may lose the end of a block."""
_INDEXED = 2**16
"""Messages that conversations are found by, those seen last."""
_NEWEST = 8
"""Messages of a conversation that a turn enters in the index: its new ones, and some more."""
_LOOKED_UP = 64
_CANDIDATES = 4
_STRANGERS_IN_COMMON = 3
"""Messages in common with another tenant's conversation that are no coincidence."""
_REASONING = re.compile(r"</?(think|thinking|thought|reasoning)\b|\[/?THINK\]", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class ReuseBreak:
    """The first difference. `message` counts the conversation's messages from 0, the system message included.

    `field` may be a `Field`, which the server calls as chat completions do.
    """

    kind: Kind
    message: int | None = None
    field: str | None = None


class ReuseBreaks:
    """Explains turns, and counts what breaks reuse by kind. Thread-safe.

    A turn that found all it could costs a comparison of two numbers. For one that didn't, known conversations are
    looked up by the digests of its messages, and the one with most in common is compared, message by message.
    """

    def __init__(
        self, find: Callable[[str, str], SessionState | None], relevant: Callable[[Setting], Setting], missing: Kind
    ) -> None:
        self._find = find
        self._relevant = relevant
        self._missing = missing
        self._known: Recent[tuple[str, Digest], str] = Recent(_INDEXED)  # names of sessions
        self._tenants: Recent[Digest, str] = Recent(_INDEXED)
        self._lock = threading.Lock()
        self.kinds: Counter[Kind] = Counter()
        """How many turns were broken by each."""

    def note(self, state: SessionState) -> None:
        """Let a conversation be found by its newest messages."""
        with self._lock:
            for message in _said(state.messages[-_NEWEST:]):
                self._known[state.tenant, message.digest] = state.id
                self._tenants[message.digest] = state.tenant

    def explain(self, turn: SessionTurn, prompt: Prompt, reused: int) -> ReuseBreak | None:
        """Why a turn whose prompt had so many tokens in memory didn't have more; None if it had all there could be.

        A conversation of another tenant is counted, but nobody is told of it.
        """
        places = reversed(range(len(turn.messages)))
        answer = next((at for at in places if turn.messages[at].role == "assistant"), None)
        if not turn.reuse or answer is None:
            return None
        if prompt.known == answer + 1:
            found = self._in_known(turn, prompt, reused)
        else:
            found = self._against_nearest(turn, prompt, reused)
        if found is not None:
            self.kinds[found.kind] += 1
        return found if found is None or found.kind != "other_tenant" else None

    def _in_known(self, turn: SessionTurn, prompt: Prompt, reused: int) -> ReuseBreak | None:
        """Why less was in memory than the conversation has that the prompt goes on from."""
        if prompt.known_length - reused < _WORTH_TELLING:
            return None
        if prompt.parent is not None:
            return ReuseBreak(self._missing)
        candidates = self._candidates(turn, prompt)
        dropped = next(filter(None, (_dropped_reasoning(state.messages, turn.messages) for state in candidates)), None)
        return dropped or ReuseBreak("template_rewrote")

    def _against_nearest(self, turn: SessionTurn, prompt: Prompt, reused: int) -> ReuseBreak | None:
        """How a conversation differs whose last answer is not known as it is sent."""
        candidates = self._candidates(turn, prompt)
        if not candidates:
            return ReuseBreak("other_tenant") if self._strangers_know(turn) else None
        nearest = max(candidates, key=lambda state: _likeness(state, turn))
        known = len(nearest.token_ids) if nearest.token_ids is not None else 0
        if (found := self._difference(nearest, turn)) is not None:
            return found if known > reused else None  # the template may not show it
        lost = min(known, len(prompt.tokens)) - reused if _starts_alike(nearest, turn) else 0
        return ReuseBreak(self._missing) if lost >= _WORTH_TELLING else None

    def _difference(self, old: SessionState, turn: SessionTurn) -> ReuseBreak | None:
        """The first difference before something that both have, or that was an answer."""
        common = {message.digest for message in old.messages if message.role != "system"}
        if not any(message.digest in common for message in _said(turn.messages)):
            return None
        setting = self._relevant(turn.setting)
        before = self._relevant(old.setting)
        return (
            _tools_difference(before.tools.tools, setting.tools.tools)
            or _kwargs_difference(before, setting)
            or _message_difference(old.messages, turn.messages)
        )

    def _candidates(self, turn: SessionTurn, prompt: Prompt) -> list[SessionState]:
        """Known conversations that have something in common with a turn's."""
        names = Counter[str]()
        with self._lock:
            for message in islice(_said(reversed(turn.messages)), _LOOKED_UP):
                if (name := self._known.get((turn.tenant, message.digest))) is not None:
                    names[name] += 1
        likely = dict.fromkeys(
            [turn.name or prompt.conversation_id, *(name for name, _ in names.most_common(_CANDIDATES))]
        )
        found = (self._find(turn.tenant, name) for name in likely)
        return [state for state in found if state is not None and state.messages]

    def _strangers_know(self, turn: SessionTurn) -> bool:
        with self._lock:
            owners = (self._tenants.get(message.digest) for message in islice(_said(turn.messages), _LOOKED_UP))
            return sum(owner not in (None, turn.tenant) for owner in owners) >= _STRANGERS_IN_COMMON


def _said(messages: "Sequence[Message] | Iterator[Message]") -> Iterator[Message]:
    """The messages that conversations are told apart by."""
    return (message for message in messages if message.role != "system")


def _likeness(old: SessionState, turn: SessionTurn) -> tuple[bool, int, float]:
    """How near a conversation is to a turn's: whether it began alike, what they have in common, how new it is."""
    one, other = ([message.digest for message in _said(messages)] for messages in (old.messages, turn.messages))
    return one[:1] == other[:1], len(set(one) & set(other)), old.used


def _starts_alike(old: SessionState, turn: SessionTurn) -> bool:
    pairs = zip(old.messages, turn.messages, strict=False)
    return len(old.messages) <= len(turn.messages) and all(one.digest == other.digest for one, other in pairs)


def _tools_difference(old: Sequence[Tool], new: Sequence[Tool]) -> ReuseBreak | None:
    before, now = ([ToolUse((tool,)).canonical() for tool in tools] for tools in (old, new))
    if before == now:
        return None
    at = next((at for at, (one, other) in enumerate(zip(before, now, strict=False)) if one != other), None)
    place = place_of(new, min(len(before), len(now)) if at is None else at)
    if sorted(before) == sorted(now):
        return ReuseBreak("tools_reordered", field=f"tools[{place}]")
    if at is None:  # some were added at the end, or left out there
        return ReuseBreak("tools_changed", field=f"tools[{place}]")
    names = ("name", "description", "parameters")
    name = next(name for name in names if getattr(old[at], name) != getattr(new[at], name))
    return ReuseBreak("tools_changed", field=f"tools[{place}].{name}")


def _kwargs_difference(old: Setting, new: Setting) -> ReuseBreak | None:
    before, now = old.template_kwargs, new.template_kwargs
    changed = (
        name for name in sorted({*before, *now}) if (name in before, before.get(name)) != (name in now, now.get(name))
    )
    name = next(changed, None)
    return ReuseBreak("template_kwargs_changed", field=fields.TEMPLATE_KWARG.at(name)) if name is not None else None


def _message_difference(old: Sequence[Message], new: Sequence[Message]) -> ReuseBreak | None:
    pairs = enumerate(zip(old, new, strict=False))
    at = next((at for at, (one, other) in pairs if one.digest != other.digest), None)
    if at is None:
        return None
    if "system" in (old[at].role, new[at].role):
        return ReuseBreak("system_changed", at, "content" if old[at].role == new[at].role else None)
    later_old, later_new = ({message.digest for message in messages[at:]} for messages in (old, new))
    if new[at].digest in later_old:
        return ReuseBreak("message_removed", at)
    if old[at].digest in later_new:
        return ReuseBreak("message_inserted", at)
    edited_answer = old[at].role == new[at].role == "assistant"
    if not edited_answer and later_old.isdisjoint(later_new):
        return None  # the conversation takes another way from here
    return _edited(old[at], new[at], at)


def _edited(old: Message, new: Message, at: int) -> ReuseBreak:
    if old.role != new.role:
        return ReuseBreak("message_edited", at, "role")
    if old.text != new.text:
        thought, kept = old.text.strip(), new.text.strip()
        dropped = thought.endswith(kept) and _REASONING.search(thought[: len(thought) - len(kept)])
        return ReuseBreak("reasoning_dropped" if dropped else "message_edited", at, "content")
    if old.tool_calls != new.tool_calls:
        return ReuseBreak("message_edited", at, _calls_difference(old.tool_calls, new.tool_calls))
    return ReuseBreak("message_edited", at, "tool_call_id" if old.tool_call_id != new.tool_call_id else "name")


def _calls_difference(old: Sequence[ToolCall], new: Sequence[ToolCall]) -> str:
    for at, (one, other) in enumerate(zip(old, new, strict=False)):
        if one.id != other.id:
            return f"tool_calls[{at}].id"
        if one.name != other.name:
            return fields.TOOL_CALL_NAME.at(at)
        if one.parsed_arguments() != other.parsed_arguments():
            return fields.TOOL_CALL_ARGUMENTS.at(at)
    return f"tool_calls[{min(len(old), len(new))}]"


def _dropped_reasoning(old: Sequence[Message], new: Sequence[Message]) -> ReuseBreak | None:
    for at, (one, other) in enumerate(zip(old, new, strict=False)):
        if one.digest != other.digest:
            return None
        if one.reasoning and one.reasoning != other.reasoning:
            return ReuseBreak("reasoning_dropped", at, "reasoning_content")
    return None
