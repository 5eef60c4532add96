"""Many agents at once, on too little memory: no server's error, the same answers as from nothing, all memory back."""

import random
from pathlib import Path

import pytest

from slipstream.models import Model
from tests.soak import AGENTS, Tally, compare, crew, harbour, soak_for


def test_agents_of_three_tenants_on_a_quarter_of_their_memory(model: Model, tmp_path: Path) -> None:
    with harbour(tmp_path) as place:
        agents = crew(seed=1)
        tally = place.soak(agents, Tally(lambda turns: turns < 3 * AGENTS // 2))
        for agent in agents:
            agent.check()
        compare(tally.answered[::5])
        assert not place.errors()
        metrics = place.forget_everything()
        assert metrics["slipstream_kv_evictions_total"] > 0
        assert metrics["slipstream_kv_sequences running"] == metrics["slipstream_kv_sequences pinned"] == 0
        assert metrics["slipstream_sessions"] == 0
        assert metrics["slipstream_state_bytes"] == 0
        assert tally.counts["left"] > 0
        assert tally.counts["nonsense"] > 0
        assert tally.counts["reused"] > 0


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_ten_minutes(model: Model, tmp_path: Path) -> None:
    """With a new seed each time, which it prints; `python -m tests.soak 600` takes one."""
    soak_for(600, random.randrange(2**32), tmp_path)
