"""What it takes to find out why a turn was not reused, beside many other conversations; and when it was.

python -m slipstream_bench.measurements.reuse_break_costs
"""

import statistics
import time

import numpy as np

from slipstream.chat import Message, Prompt, Setting
from slipstream.chat.messages import History as Digests
from slipstream.sessions.breaks import ReuseBreak, ReuseBreaks
from slipstream.sessions.history import History
from slipstream.sessions.state import SessionState, SessionTurn
from slipstream.tokens import Tokens

_CONVERSATIONS = 500
_REPEATS = 50


def _messages(conversation: int, count: int) -> tuple[Message, ...]:
    said = (
        Message("assistant" if at % 2 else "user", f"Message {at} of conversation {conversation}. " * 20)
        for at in range(count)
    )
    return Message("system", "You are terse."), *said


def _turn(messages: tuple[Message, ...]) -> SessionTurn:
    """A turn whose messages were just parsed, so that no digest is known yet."""
    return SessionTurn("", None, tuple(Message(each.role, each.text) for each in messages), Setting())


def main() -> None:
    for count in (20, 200):
        tokens = np.arange(count * 100, dtype=np.int32)
        states: dict[str, SessionState] = {}

        def find(_: str, name: str, states: dict[str, SessionState] = states) -> SessionState | None:
            return states.get(name)

        for number in range(_CONVERSATIONS):
            history = History().then(*_messages(number, count))
            states[str(number)] = SessionState(str(number), "", history, Setting(), 0.0, 0.0, 0.0, token_ids=tokens)
        breaks = ReuseBreaks(find, lambda setting: setting, "evicted")
        for state in states.values():
            breaks.note(state)
        known = _messages(7, count)
        asked = (*known, Message("user", "And then?"))
        changed = (Message("system", "You are terse. It is 12:04."), *asked[1:])
        prompt = Prompt(Tokens(tokens), "conv", Digests(b"", []))
        whole = Prompt(Tokens(tokens), "conv", Digests(b"", []), b"p", len(tokens), False, len(known), len(tokens))
        for name, messages, made, reused in (("reused", asked, whole, len(tokens)), ("broken", changed, prompt, 10)):
            seconds, found = [], None
            for _ in range(_REPEATS):
                turn = _turn(messages)
                _ = [message.digest for message in turn.messages]  # which the prompt needs in any case
                started = time.perf_counter()
                found = breaks.explain(turn, made, reused)
                seconds.append(time.perf_counter() - started)
            assert found == (ReuseBreak("system_changed", 0, "content") if name == "broken" else None)
            print(f"{count} messages, {name}: {statistics.median(seconds) * 1e6:.0f} us")


if __name__ == "__main__":
    main()
