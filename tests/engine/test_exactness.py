"""The promise that everything rests on."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from slipstream import Engine, EngineConfig, SamplingParams
from slipstream.engine import scheduler
from slipstream.models import Model
from tests.engine import exactness
from tests.short_model import room_for

SEEDED = SamplingParams(temperature=0.9, seed=3, max_tokens=24)
LIKELY = SamplingParams(temperature=0, max_tokens=24, logprobs=3)


@pytest.fixture(scope="module", autouse=True)
def _where_the_backend_says_so(engine: Engine) -> None:
    if not engine.exact:
        pytest.skip("the self-test found no step class on this processor, and the server says so")


@pytest.fixture
def narrow(model: Model, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """With KV memory for 256 tokens of this model, of which little is kept free for what answers grow by."""
    monkeypatch.setattr(scheduler, "HEADROOM", 16)
    with Engine(model, EngineConfig.model_validate({"kv_memory": room_for(290)})) as engine:
        yield engine


def test_the_same_request_gives_the_same_tokens_whatever_happens_around_it(model: Model) -> None:
    assert exactness.run(40, seed=1, model=model) >= 40


def test_the_same_with_all_layers(whole_model: Model) -> None:
    assert exactness.run(4, seed=1, model=whole_model) >= 4


@pytest.mark.parametrize("params", [SEEDED, LIKELY], ids=["seeded", "greedy, with log-probabilities"])
def test_with_reuse_and_afresh(engine: Engine, params: SamplingParams) -> None:
    prompt = "A tree, a house, a river and a road. " * 12
    ids = engine.encode(f"{prompt} What comes next?")
    afresh = engine.generate(ids, params, reuse=False)
    engine.generate(engine.encode(prompt), params)
    with ThreadPoolExecutor() as pool:  # beside others, as far as their prompts go
        others = [pool.submit(engine.generate, f"{number} {prompt}", params) for number in range(3)]
        reused = engine.generate(ids, params)
        assert all(other.result().token_ids for other in others)
    assert reused.counters.reused_tokens > 100
    assert reused.token_ids == afresh.token_ids
    assert reused.logprobs == afresh.logprobs


def test_preempted_and_afresh(narrow: Engine) -> None:
    prompts = [narrow.encode(f"{number} {'A tree, a house, a river. ' * 8}") for number in range(2)]
    long = SamplingParams(temperature=0.8, seed=5, max_tokens=80, ignore_eos=True)
    with ThreadPoolExecutor() as pool:
        together = [each.result().token_ids for each in [pool.submit(narrow.generate, ids, long) for ids in prompts]]
    assert narrow.core.stats().preemptions > 0
    assert together == [narrow.generate(ids, long, reuse=False).token_ids for ids in prompts]
