"""Shares of the engine: what tenants and priorities get when it is short, over a backend without a model."""

import statistics
import threading
from collections import Counter
from dataclasses import replace
from unittest import mock

import pytest

from slipstream.engine import ActiveRequest, EngineRequest, Output, as_prompt
from slipstream.engine.fairness import Shares, VirtualTimes
from slipstream.engine.request import Flow
from slipstream.server.openai_chat import ChatRequest
from slipstream.server.openai_completions import CompletionRequest
from slipstream.server.responses_request import PromptRequest
from tests.unit import toy_backend
from tests.unit.test_scheduler import (
    HANG,
    SECONDS_PER_TOKEN,
    STEP_SIZES,
    Call,
    ToyEngine,
    assert_right,
    at_once,
    prompt,
    request,
    toy_engine,
)


class Order(list[str]):
    """A name for each piece of an answer, as it comes."""

    def __init__(self) -> None:
        super().__init__()
        self.last: dict[str, float] = {}
        """When the last piece of each name came."""

    def note(self, name: str, now: float) -> None:
        self.append(name)
        self.last[name] = now


def of(tenant: str, number: int, *, length: int = 24, weight: float = 1.0, priority: int = 0) -> EngineRequest:
    """A request of a tenant for `length` tokens, unlike any other."""
    asked = request(prompt(8, seed=hash((tenant, priority, number)) % 2**32), tenant=tenant, max_tokens=length)
    return replace(asked, weight=weight, priority=priority)


def submit(engine: ToyEngine, asked: list[EngineRequest], order: Order) -> list[Call]:
    """Submit all before any of them is started, and wait until all are answered."""

    def send(each: EngineRequest) -> Call:
        name = f"{each.tenant}{each.priority:+}" if each.priority else each.tenant
        return engine.submit(each, lambda _: order.note(name, engine.clock.now))

    calls: list[Call] = []

    def all_at_once(_: object) -> None:
        calls.extend(map(send, asked))

    first = engine.submit(request(prompt(4, seed=1), max_tokens=1), all_at_once)  # on the engine's thread
    engine.wait(first)
    engine.wait(*calls)
    for call in calls:
        assert_right(call)
    return calls


def test_requests_of_two_tenants_are_started_in_turn() -> None:
    """However many one of them sent before."""
    order = Order()
    with toy_engine(max_running=1) as engine:
        submit(engine, [*(of("a", n, length=2) for n in range(20)), *(of("b", n, length=2) for n in range(4))], order)
    started = order[::2]
    assert Counter(started[:8]) == {"a": 4, "b": 4}


def test_tenants_that_wait_are_not_passed_by_those_that_come_later() -> None:
    order = Order()
    with toy_engine(max_running=1) as engine:
        submit(engine, [of(f"t{number}", 0, length=1) for number in range(10)], order)
    assert order == [f"t{number}" for number in range(10)]


def test_a_tenant_gains_nothing_by_its_priorities() -> None:
    """One request after the other, each of another priority, beside a tenant with many."""
    order, left = Order(), [33]
    with toy_engine(max_running=1) as engine:
        calls: list[Call] = []

        def again(output: Output) -> None:
            if output.finish_reason is not None and left[0]:
                left[0] -= 1
                order.note("a", engine.clock.now)
                calls.append(engine.submit(of("a", left[0], length=2, priority=left[0] % 11 - 5), again))

        def begin(_: object) -> None:
            sent = (of("b", number, length=2) for number in range(40))
            calls.extend(engine.submit(each, lambda _: order.note("b", engine.clock.now)) for each in sent)
            calls.append(engine.submit(of("a", 99, length=2), again))

        engine.wait(engine.submit(request(prompt(4, seed=1), max_tokens=1), begin))
        while left[0]:
            engine.wait(calls[-1])
        engine.wait(*calls)
    twentieth = [place for place, name in enumerate(order) if name == "a"][19]
    assert order[:twentieth].count("b") >= 20, "two pieces of each answer"


def test_requests_are_started_by_weight() -> None:
    order = Order()
    with toy_engine(max_running=1) as engine:
        asked = [*(of("a", n, length=2) for n in range(20)), *(of("b", n, length=2, weight=3.0) for n in range(20))]
        submit(engine, asked, order)
    assert Counter(order[:32])["b"] == pytest.approx(24, abs=4)


def test_a_flood_of_one_tenant_does_not_slow_another_beyond_its_share() -> None:
    """Steps that all decode in would cost the one request several times what it costs alone."""
    took: list[float] = []
    for flood in (0, 40):
        order = Order()
        with toy_engine(num_blocks=1024) as engine:
            started = engine.clock.now
            submit(engine, [*(of("a", n, length=200) for n in range(flood)), of("b", 0, length=40)], order)
        took.append(order.last["b"] - started)
        if flood:
            assert order[: len(order) - order[::-1].index("b")].count("a") > 30, "the flood goes on meanwhile"
    alone, beside = took
    assert beside <= 2 * alone


def test_a_tenant_that_comes_during_a_long_step_has_its_share_all_the_same() -> None:
    """Its answer comes after twice the time that it takes alone, from when it came: its prompt is next."""
    late = replace(of("b", 0, length=10), prompt=request(prompt(100, seed=99)).prompt)
    with toy_engine() as engine:
        engine.answer(late)
        alone = engine.clock.now
    order, sent = Order(), []
    with toy_engine(num_blocks=4096, step_target=64 * SECONDS_PER_TOKEN) as engine:

        def send() -> None:
            if engine.core._loop._scheduler.running[0].request.tenant == "a" and not sent:
                engine.clock.now -= 0.6  # in the middle of the step, whose time the clock has already
                sent.append((engine.clock.now, engine.submit(late, lambda _: order.note("b", engine.clock.now))))
                engine.clock.now += 0.6

        engine.backend.before_step = send
        flood = [replace(of("a", n, length=90), prompt=request(prompt(300, n)).prompt) for n in range(20)]
        submit(engine, flood, Order())
        ((came, call),) = sent
        assert_right(call)
    assert order.last["b"] - came <= 2 * alone


def test_turn_after_turn_beside_a_flood_takes_at_most_twice_as_long_as_alone() -> None:
    """The wait for the step under way included. Its prompts wait for no others of the flood, which has always more."""

    def turn(number: int) -> EngineRequest:
        return replace(of("b", number, length=20), prompt=request(prompt(50, seed=10_000 + number)).prompt)

    with toy_engine() as engine:
        engine.answer(turn(0))
        alone = engine.clock.now
    took: list[float] = []
    with toy_engine(num_blocks=8192, step_target=128 * SECONDS_PER_TOKEN, max_running=16) as engine:
        flood: list[Call] = []
        over = threading.Event()

        def more(output: Output | None = None) -> None:
            if len(took) < 8 and (output is None or output.finish_reason is not None):
                tokens = request(prompt(100, seed=len(flood))).prompt
                flood.append(engine.submit(replace(of("a", len(flood), length=30), prompt=tokens), more))

        def again(output: Output | None = None, came: float = 0.0) -> None:
            if output is not None and output.finish_reason is None:
                return
            if output is not None:
                took.append(engine.clock.now - came)
            if len(took) < 8:
                came = engine.clock.now
                engine.submit(turn(len(took)), lambda output: again(output, came))
            else:
                over.set()

        with at_once(engine):
            for _ in range(24):
                more()
            again()
        assert over.wait(HANG)
        engine.wait(*flood)
        for call in flood:
            assert_right(call)
    assert statistics.mean(took[1:]) <= 2 * alone, "the first finds a flood that knows of nobody else"


def test_steps_are_short_while_another_may_come_back() -> None:
    """A flow alone has long ones; once another was there, that one has to wait for a short one at most."""

    def longest(engine: ToyEngine, since: int) -> int:
        return max(step.tokens for step in engine.backend.steps[since:])

    def ask(tenant: str, seed: int) -> EngineRequest:
        return request(prompt(100, seed), tenant=tenant, max_tokens=1)

    with toy_engine() as engine:
        engine.answer(ask("a", 1))
        assert longest(engine, 0) >= 100
        with at_once(engine) as submit:
            together = [submit(ask(tenant, seed)) for seed, tenant in enumerate("ab", 2)]
        engine.wait(*together)
        since = len(engine.backend.steps)
        engine.answer(ask("a", 4))
        assert longest(engine, since) <= 10, "a tenth of a second"
        engine.clock.now += 10
        since = len(engine.backend.steps)
        engine.answer(ask("a", 5))
        assert longest(engine, since) >= 100


def test_beside_a_flood_a_tenant_computes_its_share_of_the_tokens() -> None:
    """While its request is under way, prompt and answer, the flood computes hardly more tokens than it does."""
    computed: Counter[str] = Counter()
    with toy_engine(num_blocks=4096) as engine:

        def count() -> None:
            running = engine.core._loop._scheduler.running
            tenants = {id(each.sequence.state): each.request.tenant for each in running if each.sequence is not None}
            if "b" in tenants.values():
                for chunk in engine.backend.steps[-1].chunks:
                    computed[tenants[id(chunk.state)]] += len(chunk.tokens)

        engine.backend.before_step = count
        flood = [replace(of("a", n, length=100), prompt=request(prompt(300, seed=n)).prompt) for n in range(20)]
        late = replace(of("b", 0, length=40), prompt=request(prompt(600, seed=99)).prompt)
        submit(engine, [*flood, late], Order())
        assert sum(step.tokens for step in engine.backend.steps) > 4 * computed["a"], "the flood had more to do"
    assert computed["b"] >= 639
    assert computed["a"] <= 1.5 * computed["b"]


@pytest.mark.parametrize(("connections", "weight"), [(1, 1.0), (2, 1.0), (1, 100.0)])
def test_prompts_that_are_nearly_a_step_take_no_more_than_their_share(connections: int, weight: float) -> None:
    """They go first, but not for ever: none is a whole step ahead of another."""
    computed: Counter[str] = Counter()
    sent = 0
    with toy_engine(num_blocks=8192) as engine:

        def more(output: Output | None = None) -> None:
            nonlocal sent
            if sent < 40 and (output is None or output.finish_reason is not None):
                sent += 1
                tokens = request(prompt(112, seed=10_000 + sent)).prompt
                calls.append(engine.submit(replace(of("b", sent, length=1, weight=weight), prompt=tokens), more))

        def count() -> None:
            tenants = {id(each.sequence.state): each.request.tenant for each in running() if each.sequence is not None}
            for chunk in engine.backend.steps[-1].chunks if sent < 40 else ():
                computed[tenants.get(id(chunk.state), "")] += len(chunk.tokens)

        def running() -> list[ActiveRequest]:
            return engine.core._loop._scheduler.running

        with at_once(engine) as submit:
            flood = (replace(of("a", n, length=1, weight=weight), prompt=as_prompt(prompt(600, n))) for n in range(20))
            calls = [submit(each) for each in flood]
            for _ in range(connections):
                more()
            engine.backend.before_step = count
        while sent < 40:
            engine.wait(calls[-1])
        engine.wait(*calls)
    assert computed["b"] <= 1.3 * computed["a"]


def test_a_small_prompt_waits_for_a_tenant_with_a_large_share_no_longer_than_that() -> None:
    """While it's computed, two tokens, the other one has a right to two hundred."""
    waited: list[float] = []
    with toy_engine(num_blocks=8192) as engine:

        def more(output: Output | None = None, came: float = 0.0) -> None:
            if output is not None:
                waited.append(engine.clock.now - came)
            if len(waited) < 10:
                came = engine.clock.now
                asked = replace(of("b", len(waited), length=1), prompt=as_prompt(prompt(2, len(waited))))
                engine.submit(asked, lambda output: more(output, came))

        with at_once(engine) as submit:
            for n in range(10):
                submit(replace(of("a", n, length=1, weight=100.0), prompt=as_prompt(prompt(900, n))))
            more()
    assert max(waited) <= 4 * 101 * 2 * SECONDS_PER_TOKEN
    assert statistics.mean(waited) >= 0.25 * 101 * 2 * SECONDS_PER_TOKEN


@pytest.mark.parametrize("length", [100, 400])
def test_a_prompt_has_its_share_beside_answers_that_take_longer_than_a_step_should(length: int) -> None:
    """And so to its end, though a flood's answers would fill all of the time that the little which is left may take."""
    asked = replace(of("b", 0, length=1), prompt=as_prompt(prompt(length)))
    with toy_engine(num_blocks=8192) as engine:
        engine.answer(asked)
        alone = engine.clock.now
    came: list[float] = []
    with toy_engine(num_blocks=8192, step_target=16 * SECONDS_PER_TOKEN) as engine:

        def come(output: Output) -> None:
            if not came:
                came.append(engine.clock.now)
                engine.submit(asked, lambda output: came.append(engine.clock.now))

        with at_once(engine) as submit:
            calls = [submit(of("a", number, length=80)) for number in range(40)]
            for call in calls:
                call.on_output = come
    assert came[1] - came[0] <= 2 * alone + STEP_SIZES[-1] * SECONDS_PER_TOKEN


def test_a_tenant_has_no_more_tokens_by_its_priorities() -> None:
    """With an answer under way in each of them, beside a tenant with as many answers in one."""
    order = Order()
    with toy_engine(num_blocks=1024) as engine:
        asked = [
            *(of("a", n, length=100, priority=n - 5) for n in range(11)),
            *(of("b", n, length=100) for n in range(11)),
        ]
        submit(engine, asked, order)
    meanwhile = Counter(name[0] for name in order[: order.index("b") + 600])
    assert meanwhile["a"] <= 2 * meanwhile["b"]


@pytest.mark.parametrize("connections", [2, 5])
def test_a_long_prompt_is_computed_while_ever_new_tenants_come_with_short_ones(connections: int) -> None:
    """Each of them is new, and had nothing yet."""
    came = 0
    with toy_engine(num_blocks=8192) as engine:

        def more(output: Output | None = None) -> None:
            nonlocal came
            if came < 200 and (output is None or output.finish_reason is not None) and not long.done.is_set():
                came += 1
                tokens = prompt(100, seed=10_000 + came)
                calls.append(engine.submit(request(tokens, tenant=f"t{came}", max_tokens=1), more))

        calls: list[Call] = []
        with at_once(engine) as submit:
            long = submit(request(prompt(600), tenant="long", max_tokens=1))
            for _ in range(connections):
                more()
        engine.wait(*calls)
    assert came < 120


def test_who_has_nearly_all_of_the_machine_computes_all_its_work_beside_another() -> None:
    """A step takes hardly longer for one more request: none of its own is left out for it."""
    with mock.patch.object(toy_backend, "SECONDS_PER_STEP", 100 * SECONDS_PER_TOKEN), toy_engine() as engine:
        with at_once(engine) as submit:
            calls = [submit(of("a", number, priority=3)) for number in range(5)]
            submit(of("a", 5, priority=-3, length=200))
        engine.wait(*calls)
        sizes = Counter(len(step.chunks) for step in engine.backend.steps)
    assert sizes[6] >= 20, "of the 23 steps in which they decode"


@pytest.mark.parametrize("places", [1, 4])
def test_a_person_s_turn_passes_a_batch_and_the_batch_ends_all_the_same(places: int) -> None:
    order = Order()
    with toy_engine(max_running=places) as engine:
        batch = [of("", n, length=8, priority=-3) for n in range(12)]
        submit(engine, [*batch, of("", 99, length=8, priority=3)], order)
    assert order.last["+3"] < 0.5 * order.last["-3"]


def test_none_starves_under_requests_that_always_pass_it() -> None:
    """Each request of the higher priority sends another one, so there is always one that could go first."""
    order = Order()
    with toy_engine(max_running=1) as engine:
        left = [200]

        def again(_: object) -> None:
            if not order.count("low") and left[0]:
                left[0] -= 1
                engine.submit(of("", left[0], length=1, priority=5), again)

        high = engine.submit(of("", 1000, length=1, priority=5), again)
        low = engine.submit(of("", 1001, length=1, priority=-5), lambda _: order.note("low", engine.clock.now))
        engine.wait(high, low)
        assert_right(low)


def test_places_are_taken_back_from_who_has_more_than_its_share() -> None:
    order = Order()
    late: list[Call] = []
    running: set[int] = set()
    with toy_engine(max_running=4, num_blocks=1024) as engine:

        def send(number: int) -> Call:
            def piece(_: object) -> None:
                running.add(number)
                if len(running) == 4 and not late:  # every place is taken
                    sent = (of("b", n, length=8) for n in range(2))
                    late.extend(engine.submit(each, lambda _: order.note("b", engine.clock.now)) for each in sent)
                order.note("a", engine.clock.now)

            return engine.submit(of("a", number, length=300), piece)

        engine.answer(request(prompt(4, seed=1), max_tokens=1))
        with at_once(engine):
            early = [send(number) for number in range(4)]
        engine.wait(*early)
        engine.wait(*late)
        assert engine.core.stats().preemptions >= 1
    for call in (*early, *late):
        assert_right(call)
    assert order.last["b"] < order.last["a"] / 2


def test_memory_is_taken_back_from_who_has_more_than_its_share() -> None:
    order = Order()
    with toy_engine(num_blocks=150, context_length=500) as engine:  # of four tokens: two requests with their headroom
        asked = [*(of("a", n, length=200) for n in range(6)), of("b", 0, length=8)]
        submit(engine, asked, order)
    assert order.last["b"] < order.last["a"] / 2


def test_prompts_are_computed_in_turn() -> None:
    order = Order()
    with toy_engine(num_blocks=1024) as engine:
        long = [replace(of("a", n, length=1), prompt=request(prompt(300, seed=n)).prompt) for n in range(8)]
        submit(engine, [*long, of("b", 0, length=1)], order)
    assert order.index("b") <= 2


def test_a_flow_that_had_nothing_to_do_does_not_make_up_for_it() -> None:
    times = VirtualTimes()
    one, other = Flow("a", 0), Flow("b", 0)
    times.charge(one, 100.0)
    times.arrive(other, [one])
    assert times[other] == times[one]
    times.charge(other, 10.0)
    times.arrive(one, [other])
    assert times[one] == times[other] == 110.0
    new = Flow("c", 0)
    times.arrive(new, [])
    assert times[new] == 110.0, "where nobody has anything to do, it isn't ahead of who comes next"


def test_a_flow_that_goes_on_is_not_forgotten_and_the_times_kept_stay_few() -> None:
    times, busy = VirtualTimes(), Flow("busy", 0)
    times.arrive(busy, [])
    for number in range(10_000):
        times.arrive(Flow(f"t{number}", 0), [busy])
        if number % 1000 == 0:
            times.charge(busy, 1.0)
    assert times[busy] == 10.0
    assert len(times._times) <= 4096


def test_priorities_divide_the_share_of_their_tenant() -> None:
    weights = Shares().weights([Flow("a", 1), Flow("a", 0), Flow("b", -5)])
    assert weights[Flow("a", 1)] == 2 * weights[Flow("a", 0)]
    assert weights[Flow("a", 1)] + weights[Flow("a", 0)] == weights[Flow("b", -5)] == 1.0


def test_one_flow_alone_is_served_as_if_there_were_none() -> None:
    order = Order()
    with toy_engine(max_running=2) as engine:
        calls = submit(engine, [of("a", n, length=4) for n in range(6)], order)
        assert engine.core.stats().preemptions == 0
    assert all(call.reason == "length" for call in calls)


@pytest.mark.parametrize(("tier", "priority"), [("flex", -2), ("priority", 2), ("auto", 0), ("default", 0), (None, 0)])
def test_service_tiers_of_openai_are_priorities(tier: str | None, priority: int) -> None:
    body = {"service_tier": tier, "prompt": "Hello"}
    (turn,) = CompletionRequest.model_validate(body).turns()
    chat = ChatRequest.model_validate({**body, "messages": []})
    assert [each.priority for each in (turn, chat.turn(), PromptRequest(service_tier=tier).turn(()))] == [priority] * 3
    (turn,) = CompletionRequest.model_validate({**body, "slipstream": {"priority": 5}}).turns()
    assert turn.priority == 5, "the field of this server's own says it exactly"
