"""What many conversations share, and what they leave behind."""

import ctypes
from collections.abc import Iterable, Iterator
from mmap import PAGESIZE
from pathlib import Path

import numpy as np
import pytest

from slipstream import Engine, EngineConfig, Message, SamplingParams, Session, Tool, ToolUse
from slipstream.backend.paged_model import PagedModel
from slipstream.models import Model
from slipstream.types import FloatArray, IntArray
from tests.looking import Look
from tests.short_model import room_for
from tests.waiting import wait_until

GREEDY = SamplingParams(temperature=0, max_tokens=12)
BRIEF = SamplingParams(temperature=0, max_tokens=2)
SYSTEM = "You are agent of a team that looks after a warehouse and answers in a few words. " * 41  # some 700 tokens


HUGE_PAGE = 2.1
"""Megabytes."""


def resident_megabytes() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGESIZE / 1e6


def megabytes_of(arrays: Iterable[FloatArray | IntArray]) -> float:
    """Memory that the system has given for arrays, whatever else this process takes meanwhile."""
    library = ctypes.CDLL(None, use_errno=True)
    library.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    found = 0
    for array in arrays:
        begin = array.ctypes.data // PAGESIZE * PAGESIZE
        pages = np.zeros(-(-(array.ctypes.data + array.nbytes - begin) // PAGESIZE), np.uint8)
        assert library.mincore(begin, len(pages) * PAGESIZE, pages.ctypes.data) == 0
        found += int((pages & 1).sum()) * PAGESIZE
    return found / 1e6


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mincore"), reason="the system does not say what is resident")
def test_memory_for_keys_and_values_is_taken_when_they_are_written(model: Model) -> None:
    paged = PagedModel(model.ir_path)
    paged.allocate(2**32 // paged.block_bytes)
    storage = [arrays for _, arrays in paged._kv._groups]
    assert sum(array.nbytes for array in storage) == pytest.approx(2**32, rel=0.01)
    before = megabytes_of(storage)
    assert before < 20, "4 GiB take nothing"
    blocks = np.arange(1000, dtype=np.int32)
    paged.write_blocks(blocks, np.ones_like(paged.read_blocks(blocks[:1]).wait()).repeat(1000, axis=0))
    taken, written = megabytes_of(storage) - before, 1000 * paged.block_bytes / 1e6
    pieces = sum(len(array) for array in storage)  # each of which may begin and end within a huge page
    assert 0.95 * written < taken < written + 2 * HUGE_PAGE * pieces


def test_interleaved_conversations_compute_what_they_share_once(engine: Engine) -> None:
    engine.core.call(Look(lambda kv: kv.clear()))
    evictions = engine.core.stats().kv.evictions
    shared = len(engine.conversations.prompt([Message("system", SYSTEM)]).tokens)
    assert shared > 700
    sessions = [engine.session(SYSTEM) for _ in range(8)]
    reused = [
        session.send(f"Where are the {index * 7} boxes?", params=GREEDY).counters.reused_tokens
        for _ in range(4)
        for index, session in enumerate(sessions)
    ]
    generation_prompt = 4  # what follows the system message in `shared`
    assert min(reused[1:]) >= shared - generation_prompt
    assert engine.core.stats().kv.evictions == evictions, "there is memory for all of them"
    assert sorted(reused[8:16]) > sorted(reused[:8]), "and each finds its own turns too"


@pytest.fixture
def small_engine(model: Model) -> Iterator[Engine]:
    """With KV memory for about 1,000 tokens."""
    with Engine(model, EngineConfig.model_validate({"kv_memory": room_for(1090)})) as engine:
        yield engine


def test_forty_conversations_in_memory_for_ten(small_engine: Engine) -> None:
    engine = small_engine
    evictions = engine.core.stats().kv.evictions
    sessions = [engine.session(f"You are assistant {number}, and you count. " * 5) for number in range(40)]
    resident = []
    for turn in range(2):
        for session in sessions:
            answer = session.send(f"What comes after {turn}?", params=BRIEF)
            assert answer.finish_reason in ("stop", "length")
            engine.core.call(Look(lambda kv: kv.check()))
        resident.append(resident_megabytes())
    wait_until(lambda: engine.core.stats().kv.running_sequences == 0)  # what was computed ahead, too
    usage = engine.core.stats().kv
    assert 5 <= usage.cached_sequences <= 15
    assert usage.evictions > evictions + 60
    assert resident[1] - resident[0] < 20, "a second round over all conversations takes no more memory"
    engine.core.call(Look(lambda kv: kv.clear()))
    assert engine.core.stats().kv.free == usage.capacity


def test_prompt_tokens_forwarded_are_exactly_the_delta(engine: Engine) -> None:
    engine.core.call(Look(lambda kv: kv.clear()))
    session: Session = engine.session("You are terse.")

    def forwarded_for_turns() -> int:
        return engine.core.stats().tokens_forwarded - engine.core.stats().idle_tokens

    for number in range(8):
        before = forwarded_for_turns()
        counters = session.send("word " * 150, params=SamplingParams(temperature=0, max_tokens=1)).counters
        engine.core.call(Look(lambda kv: kv.check()))  # comes after the step that settles
        forwarded = forwarded_for_turns() - before
        assert forwarded == counters.delta_tokens + counters.completion_tokens
        assert number == 0 or counters.delta_tokens < 165


def test_a_conversation_whose_tool_runs_is_kept_rather_than_one_that_is_answered(small_engine: Engine) -> None:
    engine = small_engine
    look = ToolUse((Tool("look", "Look at a shelf", {"type": "object", "properties": {}}),), "required")
    calling = engine.session(f"You look after shelves. {SYSTEM[:900]}", tools=look)
    answered = engine.session(f"You look after lamps. {SYSTEM[:900]}")
    cost = calling.send("What is on the shelf?", params=GREEDY).counters
    (call,) = calling.messages[-1].tool_calls
    answered.send("How many lamps are there?", params=BRIEF)
    wait_until(lambda: engine.core.stats().kv.running_sequences == 0)  # what runs is no choice for eviction
    evictions = engine.core.stats().kv.evictions
    engine.session(f"You look after ropes. {SYSTEM[:2400]}").send("How many?", params=BRIEF)
    assert engine.core.stats().kv.evictions > evictions
    went_on = calling.send(Message("tool", "Nothing", tool_call_id=call.id), params=BRIEF)
    assert went_on.counters.reused_tokens >= cost.prompt_tokens + cost.completion_tokens - 4, (
        "it was used before the other one"
    )
    assert answered.send("And now?", params=BRIEF).counters.reused_tokens < 100
