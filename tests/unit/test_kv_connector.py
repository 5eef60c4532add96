"""KV on its way to disk: what is written when the server ends, and what becomes of a copy that never arrives."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from slipstream.chat import ChatTemplate, Conversations, Message, Part
from slipstream.chat.answers import Dialect
from slipstream.engine import EngineCore, EngineRequest, Output, SamplingParams
from slipstream.errors import ModelError
from slipstream.sessions import KVConnector, kv_connector
from slipstream.sessions.saved_kv import SavedKV
from slipstream.tokenizer import Tokenizer
from tests.looking import Look
from tests.unit.test_sessions import TEMPLATE, ToyChatTokenizer
from tests.unit.toy_backend import STOP, ToyBackend
from tests.waiting import HANG


class Saving:
    """An engine whose conversations are saved when it is told to, and not before."""

    def __init__(self, folder: Path) -> None:
        self.backend = ToyBackend(num_blocks=400)
        tokenizer = cast(Tokenizer, ToyChatTokenizer())
        self.core = EngineCore(self.backend, tokenizer, context_length=300, stop_token_ids=frozenset({STOP}))
        self.conversations = Conversations(ChatTemplate(TEMPLATE, {}), tokenizer, Dialect(TEMPLATE))
        self.saved = SavedKV(folder, "model; backend", 2**30)
        self.connector = KVConnector(self.core, self.conversations, self.saved, 1e9)

    def turn(self, text: str) -> Part:
        """Have a message answered and its part saved soon."""
        prompt = self.conversations.prompt([Message("user", text)])
        outputs, done = list[Output](), threading.Event()

        def sink(output: Output) -> None:
            outputs.append(output)
            if output.finish_reason is not None:
                done.set()

        params = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
        self.core.submit(EngineRequest(prompt=prompt.tokens.ids, params=params, speculation=False), sink)
        assert done.wait(HANG)
        tokens = [token for output in outputs for token in output.token_ids]
        answer = "".join(output.text for output in outputs)
        part = self.conversations.record(prompt, Message("assistant", answer), tokens, answer)
        assert part is not None
        self.connector.add("", part)
        return part

    def copies(self) -> list[str]:
        """What became of copies, in order."""
        return [event for event in self.backend.events if event in ("exported", "arrived")]


@pytest.fixture
def saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Saving]:
    monkeypatch.setattr(kv_connector, "_DELAY", 1e6)
    saving = Saving(tmp_path)
    try:
        yield saving
    finally:
        saving.core.shutdown()
    assert not saving.backend.violations


def test_many_conversations_are_saved_one_after_another_when_the_server_ends(saving: Saving) -> None:
    parts = [saving.turn(f"{'abc'[at % 3] * 70}{'xyz'[at // 3] * 3}") for at in range(9)]
    assert saving.connector.unsaved_parts == 9
    saving.connector.close()
    assert saving.connector.unsaved_parts == 0
    assert all(saving.saved.size(part.key) for part in parts)
    copies = saving.copies()
    assert copies == ["exported", "arrived"] * (len(copies) // 2)
    assert len(copies) > 2 * 9, "conversations have several spans"


def test_a_conversation_that_does_not_arrive_is_given_up_and_the_others_are_saved(
    saving: Saving, caplog: pytest.LogCaptureFixture
) -> None:
    parts = [saving.turn(letter * 10) for letter in "abc"]

    def fail() -> None:
        saving.backend.before_arrival = lambda: None
        raise ModelError("the bus is on fire")

    saving.backend.before_arrival = fail
    saving.connector.close()
    assert [saving.saved.size(part.key) > 0 for part in parts] == [False, True, True]
    assert saving.connector.unsaved_parts == 0
    assert "can't be saved: the bus is on fire" in caplog.text
    assert saving.turn("d").tokens.ids.size > 0


def test_a_conversation_whose_copy_memory_has_no_room_for_is_given_up_and_the_others_are_saved(saving: Saving) -> None:
    parts = [saving.turn(letter * 10) for letter in "abc"]

    def fail() -> None:
        saving.backend.before_arrival = lambda: None
        raise MemoryError

    saving.backend.before_arrival = fail
    saving.connector.close()
    assert [saving.saved.size(part.key) > 0 for part in parts] == [False, True, True]
    assert saving.connector.unsaved_parts == 0


def test_what_is_rescued_is_waited_for_when_it_is_written(saving: Saving, caplog: pytest.LogCaptureFixture) -> None:
    lost, kept = (saving.turn(letter * 10) for letter in "ab")
    failing: list[threading.Thread] = []

    def fail() -> None:
        failing.append(threading.current_thread())
        saving.backend.before_arrival = lambda: None
        raise ModelError("the bus is on fire")

    saving.backend.before_arrival = fail
    saving.core.call(Look(lambda kv: kv.clear()))
    assert saving.copies() == ["exported"] * 2, "nobody has waited yet"
    saving.connector.save_now(lost.key)
    saving.connector.save_now(kept.key)
    assert failing == [threading.current_thread()]
    assert not saving.saved.size(lost.key)
    assert saving.saved.size(kept.key)
    assert "can't be saved: the bus is on fire" in caplog.text
    saving.connector.close()
