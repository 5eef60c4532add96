"""The engine and its scheduler, over a backend without a model: what runs when, and that answers stay the same."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import cast
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.backend import Exported
from slipstream.engine import (
    ActiveRequest,
    EngineCore,
    EngineRequest,
    FinishReason,
    Output,
    SamplingParams,
    TokenLogprob,
    TurnCounters,
    active,
    as_prompt,
    core,
    loop,
    scheduler,
)
from slipstream.engine.commands import Command, Guard, Install, Task
from slipstream.engine.idle import IdlePrefill
from slipstream.engine.text import TextStream
from slipstream.errors import (
    ContextLengthError,
    EngineStoppedError,
    InvalidRequestError,
    LogitsError,
    ModelError,
    OverloadedError,
)
from slipstream.kv import KVMemory, KVUsage
from slipstream.sampling import Sampler
from slipstream.tokenizer import Tokenizer
from slipstream.types import FloatArray
from tests.conformance.stores import KINDS
from tests.looking import Look
from tests.unit import toy_backend
from tests.unit.toy_backend import (
    SECONDS_PER_TOKEN,
    STEP_SIZES,
    STOP,
    VOCABULARY,
    CheckpointToy,
    Clock,
    HybridToy,
    QueueToy,
    Toy,
    ToyBackend,
    ToyChunk,
    ToyTokenizer,
    WindowToy,
    toy_logits,
)
from tests.waiting import HANG, wait_until

TOKENIZER = cast(Tokenizer, ToyTokenizer())
FOR_EVER = 1e6
"""Of the clock, which doesn't get there by itself."""


@dataclass
class Call:
    """A request, and what came back."""

    request: EngineRequest
    outputs: list[Output] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)
    active: ActiveRequest | None = None
    on_output: Callable[[Output], None] = lambda output: None

    def sink(self, output: Output) -> None:
        self.outputs.append(output)
        try:
            self.on_output(output)
        finally:
            if output.finish_reason is not None:
                self.done.set()

    @property
    def tokens(self) -> list[int]:
        return [token for output in self.outputs for token in output.token_ids]

    @property
    def text(self) -> str:
        return "".join(output.text for output in self.outputs)

    @property
    def logprobs(self) -> list[TokenLogprob]:
        return [logprob for output in self.outputs for logprob in output.logprobs]

    @property
    def reason(self) -> FinishReason | None:
        return self.outputs[-1].finish_reason

    @property
    def counters(self) -> TurnCounters:
        counters = self.outputs[-1].counters
        assert counters is not None
        return counters


def toy(kind: str, num_blocks: int, clock: Clock | None = None) -> Toy:
    """A backend of a kind."""
    if kind == "hybrid":
        return HybridToy(2 * num_blocks, clock=clock)
    if kind.startswith("windows"):
        return WindowToy(3 * num_blocks, clock=clock, has_full_attention=kind == "windows")
    if kind == "queue":
        return QueueToy(num_blocks, clock=clock)
    return CheckpointToy(num_blocks * 4, clock=clock) if kind == "checkpoints" else ToyBackend(num_blocks, clock=clock)


class ToyEngine:
    """An engine over a toy backend, for which only the clock's time passes."""

    def __init__(
        self,
        clock: Clock,
        *,
        num_blocks: int = 256,
        context_length: int = 1000,
        step_target: float = 16 * SECONDS_PER_TOKEN,
        patience: float = 0.0,
        max_running: int = 64,
        max_waiting: int = 256,
        kind: str = "paged",
    ) -> None:
        self.clock = clock
        self.backend = toy(kind, num_blocks, clock)
        self.core = EngineCore(
            self.backend,
            TOKENIZER,
            context_length=context_length,
            stop_token_ids=frozenset({STOP}),
            step_target=step_target,
            patience=patience,
            max_running=max_running,
            max_waiting=max_waiting,
        )

    @property
    def alive(self) -> bool:
        return self.core._thread.is_alive()

    def submit(self, request: EngineRequest, on_output: Callable[[Output], None] | None = None) -> Call:
        call = Call(request)
        if on_output is not None:
            call.on_output = on_output
        call.active = self.core.submit(request, call.sink)
        return call

    def wait(self, *calls: Call) -> None:
        """Until all are answered; fails if the engine's thread dies over it."""
        deadline = time.monotonic() + HANG
        for call in calls:
            while not call.done.wait(0.05):
                assert call.done.is_set() or self.alive, "the engine died"
                assert time.monotonic() < deadline, "no answer"

    def answer(self, request: EngineRequest) -> Call:
        call = self.submit(request)
        self.wait(call)
        return call

    def cancel(self, call: Call) -> None:
        assert call.active is not None
        self.core.cancel(call.active)

    def settled(self) -> KVUsage:
        """What the memory holds when nothing runs any more."""
        for _ in range(1000):
            usage = self.core.call(Look(lambda kv: kv.usage()))
            if usage.running_sequences == 0:
                return usage
        raise AssertionError("a sequence never stops running")


@contextmanager
def toy_engine(**options: float | str) -> Iterator[ToyEngine]:
    """An engine that must have behaved, and must have given all memory back, when everything is done."""
    clock = Clock()
    with ExitStack() as patches:
        for module in (core, active, loop):
            patches.enter_context(mock.patch.object(module, "time", clock))
        engine = ToyEngine(clock, **options)  # type: ignore[arg-type]
        try:
            yield engine
            engine.core.shutdown(drain_seconds=HANG)
        finally:
            engine.core.shutdown()
    assert not engine.backend.violations
    engine.core._loop._kv.check()
    assert engine.core._loop._kv.usage().running_sequences == 0
    assert_cached_as_said(engine)
    engine.core._loop._kv.clear()
    usage = engine.core._loop._kv.usage()
    assert usage.free == usage.capacity


def late(engine: ToyEngine) -> tuple[threading.Event, threading.Event]:
    """Let what is exported arrive late; the first event says that somebody waits for it, the second lets it arrive."""
    waiting, arrives = threading.Event(), threading.Event()

    def wait() -> None:
        waiting.set()
        assert threading.current_thread() is not engine.core._thread
        assert arrives.wait(HANG)

    engine.backend.before_arrival = wait
    return waiting, arrives


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(1, VOCABULARY, length).tolist()


def request(
    tokens: list[int], *, tenant: str = "", reuse: bool = True, speculation: bool = False, **params: object
) -> EngineRequest:
    """A greedy request that doesn't stop by itself, unless told otherwise."""
    given = {"temperature": 0.0, "ignore_eos": True, **params}
    return EngineRequest(
        prompt=as_prompt(tokens),
        params=SamplingParams(**given),  # type: ignore[arg-type]
        tenant=tenant,
        reuse=reuse,
        speculation=speculation,
    )


def assert_cached_as_said(engine: ToyEngine) -> None:
    for sequence in engine.core._loop._kv._cached:
        assert engine.backend.contents(sequence.state) == sequence.tokens.tolist()


@dataclass
class Answer:
    """What a request must be answered with."""

    tokens: list[int]
    text: str
    reason: FinishReason
    logprobs: list[TokenLogprob]


def direct(request: EngineRequest, max_sequence: int) -> Answer:
    """One token after another, each from all tokens before it, without an engine."""
    params, tokens = request.params, request.prompt.tolist()
    sampler = Sampler(params, params.seed or 0, request.prompt, VOCABULARY)
    stops = {*params.stop_token_ids, *(() if params.ignore_eos else (STOP,))}
    limit = len(tokens) + params.max_tokens if params.max_tokens else max_sequence
    answer = Answer([], "", "length", [])
    while len(tokens) < limit:
        logits = toy_logits(np.array(tokens))[0]
        token = sampler.sample(logits, len(tokens))
        if token in stops:
            answer.reason = "stop"
            break
        sampler.accept(token)
        tokens.append(token)
        answer.tokens.append(token)
        if params.logprobs is not None:
            answer.logprobs.append(sampler.logprob(logits, token))
        answer.text = TOKENIZER.decode(answer.tokens)
        found = [answer.text.find(stop) for stop in params.stop if stop in answer.text]
        if found:
            answer.text, answer.reason = answer.text[: min(found)], "stop"
            break
    return answer


def assert_right(call: Call, max_sequence: int = 999) -> None:
    """The answer is the one that a direct computation gives; if it was cancelled, the beginning of it."""
    expected = direct(call.request, max_sequence)
    assert [output.finish_reason for output in call.outputs[:-1]] == [None] * (len(call.outputs) - 1)
    if call.reason == "cancelled":
        assert call.tokens == expected.tokens[: len(call.tokens)]
        assert expected.text.startswith(call.text.rstrip("\ufffd"))
    else:
        assert call.reason == expected.reason
        assert call.tokens == expected.tokens
        assert call.text == expected.text
        assert call.logprobs == expected.logprobs
    assert call.counters.prompt_tokens == len(call.request.prompt)
    assert call.counters.completion_tokens == len(call.tokens)
    assert call.counters.accepted_tokens <= call.counters.drafted_tokens
    assert call.counters.reused_tokens < len(call.request.prompt)
    assert call.request.reuse or call.counters.reused_tokens == 0


class TestAnyWorkload:
    """Whatever is asked for at the same time, every answer is the one that it would be alone."""

    @dataclass
    class Arrival:
        request: EngineRequest
        step: int
        cancel_after: int | None
        call: Call

    @staticmethod
    @st.composite
    def requests(draw: st.DrawFn, max_sequence: int) -> list[EngineRequest]:
        segments = [prompt(length, seed) for seed, length in enumerate((1, 3, 4, 9, 17, 40))]
        requests: list[EngineRequest] = []
        for _ in range(draw(st.sampled_from([12, 6, 3, 2, 1]))):
            tokens: list[int] = []
            if requests and draw(st.booleans()):  # a conversation goes on, or branches off
                earlier = draw(st.sampled_from(requests))
                tokens = earlier.prompt.tolist() + direct(earlier, max_sequence).tokens
                tokens = tokens[: draw(st.integers(0, len(tokens)))] if draw(st.booleans()) else tokens
            for segment in draw(st.lists(st.sampled_from(segments), max_size=4)):
                tokens = tokens + segment
            tokens = [*tokens, draw(st.integers(1, VOCABULARY - 1))][-(max_sequence - 1) :]
            most = max_sequence - len(tokens)
            params = SamplingParams(
                max_tokens=draw(st.one_of(st.integers(1, min(most, 40)), st.none())),
                temperature=draw(st.sampled_from([0.0, 0.0, 0.3, 1.0])),
                seed=draw(st.integers(0, 99)),
                repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.3])),
                stop=tuple(draw(st.lists(st.sampled_from(["a", "tf", "xyz", "é", "Q"]), max_size=2))),
                stop_token_ids=tuple(draw(st.lists(st.integers(1, VOCABULARY - 1), max_size=1))),
                ignore_eos=draw(st.booleans()),
                logprobs=draw(st.sampled_from([None, None, 0, 2])),
            )
            requests.append(
                EngineRequest(
                    prompt=as_prompt(tokens),
                    params=params,
                    tenant=draw(st.sampled_from(["", "", "other"])),
                    reuse=draw(st.sampled_from([True, True, True, False])),
                    speculation=draw(st.booleans()),
                )
            )
        return requests

    @settings(max_examples=80)
    @given(data=st.data())
    def test_answers_equal_a_direct_computation(self, data: st.DataObject) -> None:
        num_blocks, context = data.draw(st.sampled_from([(6, 100), (12, 60), (20, 120), (60, 200)]), "memory")
        kind = data.draw(st.sampled_from([*KINDS, "queue"]), "kind")
        max_sequence = min(context, toy(kind, num_blocks).store.capacity)
        arrivals = [
            self.Arrival(
                request,
                data.draw(st.integers(0, 30), "step"),
                data.draw(st.one_of(st.none(), st.none(), st.none(), st.integers(0, 9)), "cancel after"),
                Call(request),
            )
            for request in data.draw(self.requests(max_sequence), "requests")
        ]
        with (
            mock.patch.object(scheduler, "HEADROOM", data.draw(st.sampled_from([1, 4, 16, 256]), "headroom")),
            mock.patch.object(scheduler, "_WORTH_WAITING", data.draw(st.sampled_from([4, 64]), "worth waiting")),
            toy_engine(
                num_blocks=num_blocks,
                context_length=context,
                step_target=data.draw(st.sampled_from([0.0, 0.16, 9.0]), "step target"),
                max_running=data.draw(st.integers(1, 8), "max running"),
                kind=kind,
            ) as engine,
        ):
            self.run(engine, arrivals)
            for arrival in arrivals:
                assert_right(arrival.call, max_sequence)
                assert arrival.call.reason != "cancelled" or arrival.cancel_after is not None

    def run(self, engine: ToyEngine, arrivals: "list[TestAnyWorkload.Arrival]") -> None:
        """Submit each request when its step comes, on the engine's thread, so that a failure can be repeated."""
        coming = sorted(arrivals, key=lambda arrival: arrival.step)
        active = 0

        def submit(arrival: TestAnyWorkload.Arrival) -> None:
            nonlocal active
            active += 1
            arrival.call.on_output = lambda output: after(arrival, output)
            arrival.call.active = engine.core.submit(arrival.request, arrival.call.sink)
            if arrival.cancel_after == 0:
                engine.cancel(arrival.call)

        def after(arrival: TestAnyWorkload.Arrival, output: Output) -> None:
            nonlocal active
            if arrival.cancel_after is not None and len(arrival.call.tokens) >= arrival.cancel_after:
                engine.cancel(arrival.call)
            if output.finish_reason is not None:
                active -= 1
                if not active and coming:
                    submit(coming.pop(0))

        def before_step() -> None:
            while coming and coming[0].step <= len(engine.backend.steps):
                submit(coming.pop(0))
            engine.core._loop._kv.check()

        engine.backend.before_step = before_step
        submit(coming.pop(0))
        engine.wait(*(arrival.call for arrival in arrivals))


class TestWhoRunsWhen:
    def test_a_long_prompt_does_not_make_a_decoding_request_wait(self) -> None:
        with toy_engine(step_target=16 * SECONDS_PER_TOKEN) as engine:
            one, (long,) = decoding_meanwhile(engine, request(prompt(300, seed=1), max_tokens=1))
            engine.wait(one, long)
            shared = [step for step in engine.backend.steps if len(step.chunks) == 2]
            assert len(shared) > 300 // 16
            assert all(step.size <= 16 for step in shared)
            assert all(step.chunks[0].past >= len(one.request.prompt) for step in shared)
            assert all(step.chunks[0].rows == 1 for step in shared)
            assert_right(one)
            assert_right(long)

    def test_with_nobody_decoding_prompts_are_computed_in_the_largest_steps(self) -> None:
        with toy_engine(step_target=4 * SECONDS_PER_TOKEN) as engine:
            engine.answer(request(prompt(3 * STEP_SIZES[-1]), max_tokens=1))
            assert [step.size for step in engine.backend.steps[:3]] == [STEP_SIZES[-1]] * 3

    def test_a_prompt_goes_on_even_if_decoding_takes_all_the_time_there_is(self) -> None:
        with toy_engine(step_target=2 * SECONDS_PER_TOKEN) as engine:
            one, (long, *crowd) = decoding_meanwhile(
                engine,
                request(prompt(60, seed=9), max_tokens=1),
                *(request(prompt(2, seed), max_tokens=60) for seed in range(1, 5)),
            )
            engine.wait(one, long, *crowd)
            assert long.counters.forward_passes == 60 // 2
            for call in (one, long, *crowd):
                assert_right(call)

    @pytest.mark.parametrize("lengths", [(13, 50), (127, 50), (1, 62, 7, 40), (31, 31, 31, 31, 31)])
    def test_prompt_chunks_together_fill_no_more_than_the_largest_step(self, lengths: tuple[int, ...]) -> None:
        with toy_engine() as engine:
            with at_once(engine) as submit:
                for seed, length in enumerate(lengths):
                    submit(request(prompt(length, seed), max_tokens=1))
            assert max(step.size for step in engine.backend.steps) <= STEP_SIZES[-1]

    @pytest.mark.parametrize("lengths", [(13, 50), (63, 50), (1, 62, 7, 40), (31, 31, 31, 31)])
    def test_prompt_chunks_and_a_decoding_request_together_fill_no_more_than_the_target(
        self, lengths: tuple[int, ...]
    ) -> None:
        with toy_engine(step_target=16 * SECONDS_PER_TOKEN) as engine:
            requests = [request(prompt(length, seed), max_tokens=1) for seed, length in enumerate(lengths, start=1)]
            one, others = decoding_meanwhile(engine, *requests)
            engine.wait(one, *others)
            assert max(step.size for step in engine.backend.steps) == 16

    def test_what_a_step_of_lone_tokens_costs_is_learned_at_its_padded_size(self) -> None:
        with toy_engine(step_target=8 * SECONDS_PER_TOKEN) as engine:
            with at_once(engine) as submit:
                for seed in range(6):
                    submit(request(prompt(4, seed), max_tokens=60))
            steps = len(engine.backend.steps)
            one, others = decoding_meanwhile(engine, request(prompt(50, seed=8), max_tokens=1))
            engine.wait(one, *others)
            chunks = [step.tokens for step in engine.backend.steps[steps:] if len(step.chunks) == 2]
            assert max(chunks) == 7  # with the dummy of the one that decodes, eight: what fits

    def test_requests_start_in_the_order_they_came_in(self) -> None:
        with toy_engine(max_running=1) as engine:
            order: list[int] = []
            calls = [
                engine.submit(
                    request(prompt(30 - 5 * n, n), max_tokens=3),
                    lambda output, n=n: order.append(n) if output.finish_reason else None,  # type: ignore[misc]
                )
                for n in range(5)
            ]
            engine.wait(*calls)
            assert order == [0, 1, 2, 3, 4]

    def test_the_older_prompt_is_computed_first(self) -> None:
        with toy_engine() as engine:
            with at_once(engine) as submit:
                older, younger = (submit(request(prompt(length, length), max_tokens=1)) for length in (300, 100))
            assert older.counters.prefill_ms == pytest.approx(3 * 128 * SECONDS_PER_TOKEN * 1e3)
            assert younger.counters.prefill_ms > older.counters.prefill_ms

    def test_places_of_those_who_are_done_are_taken_while_others_run(self) -> None:
        with toy_engine(max_running=8) as engine:
            with at_once(engine) as submit:
                for seed in range(24):  # one of them is done in nearly every step
                    submit(request(prompt(4, seed), max_tokens=20 + seed))
            crowd = [len(step.chunks) for step in engine.backend.steps[2:-25]]
            assert min(crowd) >= 6

    def test_no_more_run_at_once_than_allowed(self) -> None:
        with toy_engine(max_running=3) as engine:
            calls = [engine.submit(request(prompt(4, seed), max_tokens=6)) for seed in range(10)]
            engine.wait(*calls)
            assert max(len(step.chunks) for step in engine.backend.steps) == 3

    def test_stats_count_steps_and_real_tokens(self) -> None:
        with toy_engine() as engine:
            engine.answer(request(prompt(20), max_tokens=5))
            engine.settled()
            stats = engine.core.stats()
            assert stats.steps == len(engine.backend.steps)
            assert stats.tokens_forwarded == sum(step.tokens for step in engine.backend.steps) == 25
            assert stats.infer_seconds == pytest.approx(engine.clock.now)
            assert (stats.running, stats.waiting) == (0, 0)


def decoding_meanwhile(engine: ToyEngine, *requests: EngineRequest) -> tuple[Call, list[Call]]:
    """Requests that come in while another one decodes."""
    one, others = Call(request(prompt(4), max_tokens=60)), [Call(request) for request in requests]

    def submit(output: Output) -> None:
        if len(one.tokens) == 3:
            for call in others:
                engine.core.submit(call.request, call.sink)

    one.on_output = submit
    engine.core.submit(one.request, one.sink)
    return one, others


@contextmanager
def at_once(engine: ToyEngine) -> Iterator[Callable[[EngineRequest], Call]]:
    """Requests that all wait when the engine comes to look: it is kept busy with a step of another one until then."""
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        entered.set()
        assert leave.wait(HANG)

    engine.backend.before_step = hold
    calls = [engine.submit(request([1], max_tokens=1, tenant="the one that keeps it busy"))]
    assert entered.wait(HANG)
    engine.backend.before_step = lambda: None

    def submit(request: EngineRequest) -> Call:
        calls.append(engine.submit(request))
        return calls[-1]

    try:
        yield submit
    finally:
        leave.set()
    engine.wait(*calls)


class TestAheadOfTheDevice:
    def test_outputs_are_given_out_while_the_device_is_at_the_next_step(self) -> None:
        with toy_engine() as engine:
            events = engine.backend.events
            call = Call(request(prompt(20), max_tokens=3), on_output=lambda _: events.append("output"))
            engine.core.submit(call.request, call.sink)
            engine.wait(call)
            assert events[:8] == ["launched", "waited", *["launched", "output", "waited"] * 2]
            assert events[8] == "output"  # the last one waits for nothing
            assert [output.token_ids for output in call.outputs] == [(token,) for token in call.tokens]

    def test_no_output_waits_for_a_command(self) -> None:
        with toy_engine() as engine:
            events = engine.backend.events

            @dataclass(frozen=True)
            class Noted(Command[None]):
                def run(self, kv: KVMemory) -> Iterator[None]:
                    events.append("command")
                    yield None

            def command() -> None:
                if len(engine.backend.steps) == 2:
                    engine.core._inbox.put(Task(Noted()))

            engine.backend.before_step = command
            call = Call(request(prompt(20), max_tokens=4), on_output=lambda _: events.append("output"))
            engine.core.submit(call.request, call.sink)
            engine.wait(call)
            assert events[events.index("command") - 2 :][:3] == ["waited", "output", "command"]

    def test_a_step_is_planned_and_launched_before_a_queued_one_is_waited_for(self) -> None:
        with toy_engine(kind="queue") as engine:
            call = engine.answer(request(prompt(3 * STEP_SIZES[-1]), max_tokens=2))
            launches = ["launched", *["launched", "waited"] * 2, "waited", "launched", "waited"]
            assert engine.backend.events[:8] == launches
            assert_right(call)

    def test_one_that_comes_meanwhile_is_admitted_while_the_device_is_at_a_queued_step(self) -> None:
        with toy_engine(kind="queue") as engine:
            long, short = request(prompt(5 * STEP_SIZES[-1]), max_tokens=1), request(prompt(9, seed=1), max_tokens=1)
            calls: list[Call] = []

            def look() -> None:
                match len(engine.backend.steps):
                    case 2:
                        calls.append(engine.submit(short))
                    case 3:
                        assert engine.backend.events.count("waited") == 1
                        assert len(engine.core._loop._scheduler.running) == 2

            engine.backend.before_step = look
            one = engine.submit(long)
            engine.wait(one)
            engine.wait(*calls)
            assert_right(one)
            assert_right(calls[0])

    def test_what_is_cancelled_meanwhile_leaves_what_is_computed(self) -> None:
        with toy_engine(kind="queue") as engine:
            tokens = prompt(5 * STEP_SIZES[-1])
            call = Call(request(tokens, max_tokens=1))

            def cancel() -> None:
                if len(engine.backend.steps) == 3:
                    assert call.active is not None
                    engine.core.cancel(call.active)

            with at_once(engine):
                engine.backend.before_step = cancel
                call.active = engine.core.submit(call.request, call.sink)
            engine.wait(call)
            assert call.reason == "cancelled"
            again = engine.answer(request(tokens, max_tokens=1))
            assert again.counters.reused_tokens == 2 * STEP_SIZES[-1] - 2  # beside the one that kept the engine busy
            assert_right(again)

    @pytest.mark.parametrize("follows", [5, 2 * STEP_SIZES[-1]])
    def test_one_that_went_on_from_a_queued_step_that_fails_keeps_nothing_of_it(self, follows: int) -> None:
        with toy_engine(kind="queue") as engine:
            size = STEP_SIZES[-1]
            tokens = prompt(3 * size)
            branch = request([*tokens[:size], *prompt(follows, seed=1)], max_tokens=2)
            calls: list[Call] = []

            def fail() -> None:
                engine.backend.before_step = lambda: None
                calls.append(engine.submit(branch))
                raise RuntimeError("the device failed")

            engine.backend.before_step = fail
            calls.append(engine.submit(request(tokens, max_tokens=2)))
            engine.wait(*calls)
            for again in (request(tokens, max_tokens=2), branch):
                assert_right(engine.answer(again))


class TestDrafts:
    """Prompt lookup: what is verified along, and that it stays within bounds."""

    def test_they_save_steps_and_change_nothing(self) -> None:
        with toy_engine() as engine:
            plain, drafting = (
                engine.answer(request(prompt(20), max_tokens=200, reuse=False, speculation=speculation))
                for speculation in (False, True)
            )
            assert drafting.tokens == plain.tokens
            assert plain.counters.drafted_tokens == 0
            assert plain.counters.forward_passes == 200
            assert drafting.counters.accepted_tokens > 10
            saved = plain.counters.forward_passes - drafting.counters.forward_passes
            assert saved >= drafting.counters.accepted_tokens - 1  # the last may be the end, and save nothing

    def test_they_never_make_a_step_larger_than_the_largest_that_was_measured(self) -> None:
        with toy_engine(num_blocks=1000) as engine:
            with at_once(engine) as submit:
                for seed in range(12):
                    submit(request(prompt(60, seed) * 2 + prompt(20, seed), max_tokens=20, speculation=True))
            assert max(step.size for step in engine.backend.steps) == STEP_SIZES[-1]

    def test_they_are_shorter_where_recurrent_states_make_them_dear(self) -> None:
        drafted = []
        for seconds in (0.0, 20 * SECONDS_PER_TOKEN):
            costs = mock.patch.multiple(toy_backend, SECONDS_PER_STEP=10 * SECONDS_PER_TOKEN, SECONDS_PER_STATE=seconds)
            with costs, toy_engine(kind="hybrid") as engine:
                call = engine.answer(request(prompt(20), max_tokens=200, speculation=True))
                assert_right(call)
                drafted.append(call.counters.drafted_tokens)
        assert drafted[0] > drafted[1] > 0

    def test_the_end_of_an_answer_cuts_them(self) -> None:
        with toy_engine() as engine:
            for max_tokens in range(1, 12):
                call = engine.answer(request(prompt(15) * 6, max_tokens=max_tokens, speculation=True))
                assert len(call.tokens) == max_tokens
                assert_right(call)


class TestReuse:
    def test_the_next_turn_computes_only_what_is_new(self) -> None:
        with toy_engine() as engine:
            first = engine.answer(request(prompt(40), max_tokens=10))
            history = prompt(40) + first.tokens
            second = engine.answer(request(history + prompt(7, seed=1), max_tokens=5))
            assert second.counters.reused_tokens == len(history)
            assert second.counters.delta_tokens == 7
            assert_right(second)

    @pytest.mark.parametrize("ending", [{"max_tokens": 10}, {"stop": ("s",), "max_tokens": 60}])
    def test_a_next_turn_that_is_sent_at_once_finds_all_of_the_one_before(self, ending: dict[str, object]) -> None:
        with toy_engine() as engine:
            second: list[Call] = []

            def reply(output: Output) -> None:
                if output.finish_reason is not None:
                    history = prompt(40) + first.tokens
                    second.append(engine.submit(request([*history, 5, 6], max_tokens=4)))

            first = Call(request(prompt(40), **ending), on_output=reply)
            engine.core.submit(first.request, first.sink)
            engine.wait(first)
            engine.wait(*second)
            assert second[0].counters.reused_tokens == 40 + len(first.tokens)
            assert_right(first)
            assert_right(second[0])

    def test_a_turn_that_comes_at_once_computes_the_last_tokens_of_the_one_before_along(self) -> None:
        with toy_engine(patience=FOR_EVER) as engine:
            first = engine.answer(request(prompt(40), max_tokens=10))
            history = prompt(40) + first.tokens
            steps = len(engine.backend.steps)
            second = engine.answer(request(history + prompt(7, seed=1), max_tokens=1))
            assert [step.tokens for step in engine.backend.steps[steps:]] == [8], "seven, and one that was left to do"
            assert second.counters.reused_tokens == len(history), "which counts for the turn before"
            assert_right(second)

    def test_last_tokens_are_computed_alone_when_nobody_comes(self) -> None:
        with toy_engine(patience=0.01) as engine:
            engine.answer(request(prompt(40), max_tokens=10))
            assert engine.core.stats().kv.running_sequences == 1
            engine.clock.now += 0.01
            wait_until(lambda: engine.core.stats().kv.running_sequences == 0)
            assert engine.backend.steps[-1].tokens == 1

    def test_who_looks_into_memory_finds_all_that_was_said(self) -> None:
        with toy_engine(patience=FOR_EVER) as engine:
            first = engine.answer(request(prompt(40), max_tokens=10))
            said = as_prompt([*prompt(40), *first.tokens])
            assert engine.core.call(Look(lambda kv: kv.computed("", said))) == 50

    def test_last_tokens_are_not_computed_for_a_command_that_nobody_waits_for(self) -> None:
        with toy_engine(patience=FOR_EVER) as engine:
            first = engine.answer(request(prompt(40), max_tokens=10))
            steps = len(engine.backend.steps)
            said = as_prompt([*prompt(40), *first.tokens])
            engine.core.send(Guard(b"all", "", said, 0))
            second = engine.answer(request([*said.tolist(), *prompt(7, seed=1)], max_tokens=1))
            assert [step.tokens for step in engine.backend.steps[steps:]] == [8]
            assert_right(second)

    def test_last_tokens_make_room_for_who_has_none(self) -> None:
        with toy_engine(patience=FOR_EVER, num_blocks=50, max_running=1) as engine:
            first = engine.answer(request(prompt(100), max_tokens=10))
            assert_right(engine.answer(request(prompt(150, seed=1), max_tokens=10)))
            again = engine.answer(request(prompt(100) + first.tokens + [5], max_tokens=3))
            assert again.counters.delta_tokens > 0
            assert_right(again)

    def test_idle_work_has_patience_too(self) -> None:
        with toy_engine(patience=0.01) as engine:
            first = engine.answer(request(prompt(40), max_tokens=1))
            done = ahead(engine, [*prompt(40), *first.tokens, 5, 6, 7])
            second = engine.answer(request([*prompt(40), *first.tokens, 5, 6, 7, 8], max_tokens=1))
            assert second.counters.delta_tokens == 4
            engine.clock.now += 0.02
            engine.core.call(Look(lambda kv: kv.usage()))
            assert done.result(HANG).stop == 44

    def test_the_same_prompt_at_the_same_time_is_computed_once(self) -> None:
        with toy_engine() as engine:
            with at_once(engine) as submit:
                calls = [submit(request(prompt(100), max_tokens=1, temperature=1.0, seed=n)) for n in range(8)]
            assert [call.counters.reused_tokens for call in calls] == [0, *[99] * 7]
            for call in calls:
                assert_right(call)

    def test_of_a_longer_one_only_the_end_is_computed_again(self) -> None:
        with toy_engine() as engine:
            with at_once(engine) as submit:
                calls = [submit(request(prompt(310), max_tokens=1, temperature=1.0, seed=n)) for n in range(8)]
            assert calls[0].counters.reused_tokens == 0
            assert all(call.counters.reused_tokens > 310 - 64 for call in calls[1:])
            for call in calls:
                assert_right(call)

    def test_who_does_not_share_the_prefix_need_not_wait_for_it(self) -> None:
        with toy_engine() as engine:
            with at_once(engine) as submit:
                leader, follower = (submit(request(prompt(600), max_tokens=1, seed=n)) for n in range(2))
                other = submit(request(prompt(4, seed=5), max_tokens=1))
            assert follower.counters.reused_tokens > 500
            assert other.counters.queue_ms < follower.counters.queue_ms
            assert leader.counters.reused_tokens == 0

    def test_who_waited_for_a_prefix_takes_over_when_it_is_cancelled(self) -> None:
        with toy_engine() as engine:
            with at_once(engine) as submit:
                leader = submit(request(prompt(600), max_tokens=1))
                followers = [submit(request(prompt(600), max_tokens=2, temperature=1.0, seed=n)) for n in range(3)]
                engine.backend.before_step = lambda: engine.cancel(leader) if len(engine.backend.steps) == 4 else None
            assert leader.reason == "cancelled"
            assert engine.core.stats().tokens_forwarded < 2 * 600
            for call in followers:
                assert_right(call)

    def test_tenants_share_nothing(self) -> None:
        with toy_engine() as engine:
            engine.answer(request(prompt(40), max_tokens=1, tenant="one"))
            assert engine.answer(request(prompt(40), max_tokens=1, tenant="two")).counters.reused_tokens == 0
            assert engine.answer(request(prompt(40), max_tokens=1, tenant="one")).counters.reused_tokens == 39

    def test_who_wants_no_reuse_gets_none(self) -> None:
        with toy_engine() as engine:
            engine.answer(request(prompt(40), max_tokens=1))
            call = engine.answer(request(prompt(40), max_tokens=1, reuse=False))
            assert call.counters.reused_tokens == 0
            assert_right(call)


def ahead(engine: ToyEngine, tokens: list[int], *, at_least: int = 0, name: str = "") -> Future[range]:
    """Have the tokens computed when there's time."""
    done: Future[range] = Future()
    engine.core.prefill(IdlePrefill(name, "", as_prompt(tokens), done.set_result, at_least))
    return done


class TestAheadOfTime:
    def test_what_was_computed_while_idle_costs_the_next_request_nothing(self) -> None:
        with toy_engine() as engine:
            assert ahead(engine, prompt(100)).result(HANG) == range(0, 100)
            answer = engine.answer(request([*prompt(100), 7, 8], max_tokens=4))
            assert answer.counters.delta_tokens == 2
            assert engine.core.stats().idle_tokens == 100
        with toy_engine() as engine:
            assert engine.answer(request([*prompt(100), 7, 8], max_tokens=4)).tokens == answer.tokens

    def test_a_request_waits_for_one_short_step_at_most(self) -> None:
        with toy_engine() as engine:
            calls: list[Call] = []

            def interrupt() -> None:
                if len(engine.backend.steps) == 2:
                    calls.append(engine.submit(request(prompt(40, seed=1), max_tokens=3)))

            engine.backend.before_step = interrupt
            done = ahead(engine, prompt(200))
            assert done.result(HANG) == range(0, 200)
            engine.wait(*calls)
            sizes = [step.tokens for step in engine.backend.steps]
            assert sizes[:3] == [8, 8, 40], "steps of idle work are short, and the request's own comes next"
            assert len(engine.backend.steps) > 10, "the idle work goes on afterwards"

    def test_the_same_prefix_is_not_computed_twice(self) -> None:
        with toy_engine() as engine:
            calls: list[Call] = []

            def interrupt() -> None:
                if len(engine.backend.steps) == 2:
                    calls.append(engine.submit(request(prompt(200), max_tokens=3)))

            engine.backend.before_step = interrupt
            done = ahead(engine, prompt(200))
            done.result(HANG)
            engine.wait(*calls)
            assert calls[0].counters.reused_tokens == 16
            assert sum(step.tokens for step in engine.backend.steps) == 200 + 3

    def test_a_later_job_for_the_same_conversation_takes_the_place_of_the_earlier(self) -> None:
        with toy_engine() as engine:
            all_there = threading.Event()
            engine.backend.before_step = lambda: all_there.wait(HANG)
            running = engine.submit(request(prompt(300, seed=2), max_tokens=1))
            first = ahead(engine, prompt(50), name="mine")
            second = ahead(engine, prompt(60), name="mine")
            all_there.set()
            assert second.result(HANG).stop == 60
            engine.wait(running)
            assert not first.done()

    def test_what_was_evicted_meanwhile_is_not_computed_for_a_guess(self) -> None:
        with toy_engine() as engine:
            guess = ahead(engine, prompt(50), at_least=40)
            wanted = ahead(engine, prompt(50, seed=1), name="another")
            wanted.result(HANG)
            assert not guess.done()
            assert engine.core.stats().idle_tokens == 50

    def test_without_memory_for_it_requests_go_on(self) -> None:
        with toy_engine(num_blocks=12) as engine:
            long = engine.submit(request(prompt(30), max_tokens=10))
            ahead(engine, prompt(47, seed=1))
            engine.wait(long)
            assert engine.answer(request(prompt(30, seed=2), max_tokens=2)).reason == "length"

    def test_a_step_that_fails_drops_the_job_alone(self) -> None:
        with toy_engine() as engine:
            failed = threading.Event()

            def fail() -> None:
                engine.backend.before_step = lambda: None
                failed.set()
                raise RuntimeError("no")

            engine.backend.before_step = fail
            lost = ahead(engine, prompt(50))
            assert failed.wait(HANG)
            assert engine.answer(request(prompt(20, seed=1), max_tokens=2)).reason == "length"
            assert not lost.done()


class TestSavedKV:
    def test_exported_kv_gives_the_same_answer(self) -> None:
        with toy_engine() as engine:
            tokens = as_prompt(prompt(333))
            first = engine.answer(request(prompt(333), max_tokens=4))
            parts = [(0, 150), (150, 333)]
            contents = [engine.core.export("", tokens[:end], start) for start, end in parts]
            engine.settled()
            engine.core.call(Look(lambda kv: kv.clear()))
            assert engine.core.export("", tokens) is None
            for (start, end), part in zip(parts, contents, strict=True):
                assert part is not None
                assert engine.core.call(Install("", tokens[:end], start, part))
            again = engine.answer(request(prompt(333), max_tokens=4))
            assert again.tokens == first.tokens
            assert again.counters.delta_tokens == 1

    @pytest.mark.parametrize("kind", ["paged", "queue"])
    def test_steps_go_on_while_exported_kv_is_on_its_way(self, kind: str) -> None:
        with toy_engine(kind=kind) as engine, ThreadPoolExecutor(1) as pool:
            tokens = as_prompt(prompt(333))
            first = engine.answer(request(prompt(333), max_tokens=4))
            waiting, arrives = late(engine)
            exporting = pool.submit(engine.core.export, "", tokens[:60])
            try:
                assert waiting.wait(HANG)
                assert_right(engine.answer(request(prompt(40, seed=1), max_tokens=4)))
                engine.core.call(Look(lambda kv: kv.clear()))
                assert_right(engine.answer(request(prompt(400, seed=2), max_tokens=4)))
                assert not exporting.done()
            finally:
                arrives.set()
            blob = exporting.result()
            assert blob is not None
            engine.core.call(Look(lambda kv: kv.clear()))
            assert engine.core.call(Install("", tokens[:60], 0, blob))
            again = engine.answer(request(prompt(333), max_tokens=4))
            assert again.tokens == first.tokens
            assert again.counters.reused_tokens == 60

    def test_one_span_at_a_time_is_on_its_way(self) -> None:
        with toy_engine() as engine:
            engine.answer(request(prompt(333), max_tokens=1))
            assert engine.core.export("", as_prompt(prompt(333))) is not None
            copies = [event for event in engine.backend.events if event in ("exported", "arrived")]
            assert copies == ["exported", "arrived"] * 6

    def test_an_eviction_does_not_wait_for_what_is_rescued(self) -> None:
        with toy_engine(num_blocks=100) as engine:
            tokens = as_prompt(prompt(333))
            engine.answer(request(prompt(333), max_tokens=1))
            expected = engine.core.export("", tokens)
            rescued: Future[Exported] = Future()
            engine.core.rescue_to(lambda _, exported: rescued.set_result(exported))
            engine.core.send(Guard(b"all", "", tokens, 0))
            waiting, arrives = late(engine)
            assert_right(engine.answer(request(prompt(333, seed=1), max_tokens=4)))
            assert not waiting.is_set()
            arrives.set()
            assert np.array_equal(rescued.result(HANG).wait(), expected)

    def test_kv_that_does_not_arrive_is_an_error_for_who_waits_for_it(self) -> None:
        def fail() -> None:
            raise ModelError("the bus is on fire")

        with toy_engine() as engine:
            engine.answer(request(prompt(100), max_tokens=1))
            engine.backend.before_arrival = fail
            with pytest.raises(ModelError, match="on fire"):
                engine.core.export("", as_prompt(prompt(100)))
            assert_right(engine.answer(request(prompt(100), max_tokens=4)))

    def test_kv_without_what_comes_before_is_refused(self) -> None:
        with toy_engine() as engine:
            tokens = as_prompt(prompt(100))
            engine.answer(request(prompt(100), max_tokens=1))
            part = engine.core.export("", tokens, 50)
            assert part is not None
            engine.settled()
            engine.core.call(Look(lambda kv: kv.clear()))
            assert not engine.core.call(Install("", tokens, 50, part))


class TestFullMemory:
    def test_generations_that_outgrow_memory_finish_with_the_right_tokens(self) -> None:
        with mock.patch.object(scheduler, "HEADROOM", 8), toy_engine(num_blocks=20) as engine:
            with at_once(engine) as submit:
                calls = [submit(request(prompt(8, seed), max_tokens=50)) for seed in range(3)]
            assert engine.core.stats().preemptions > 0
            for call in calls:
                assert_right(call, 79)

    def test_room_is_taken_from_the_youngest_and_given_back_to_the_oldest(self) -> None:
        finished: list[int] = []
        with mock.patch.object(scheduler, "HEADROOM", 8), toy_engine(num_blocks=20, max_running=3) as engine:
            with at_once(engine) as submit:
                for seed in range(6):
                    call = submit(request(prompt(8, seed), max_tokens=50))
                    call.on_output = lambda output, n=seed: finished.append(n) if output.finish_reason else None  # type: ignore[misc]
            assert engine.core.stats().preemptions > 0
            assert finished == list(range(6))

    def test_what_is_promised_is_enough(self) -> None:
        with toy_engine(num_blocks=10) as engine:
            with at_once(engine) as submit:
                calls = [submit(request(prompt(8, seed), max_tokens=12)) for seed in range(2)]
            for call in calls:
                assert_right(call, 39)
            assert engine.core.stats().preemptions == 0

    def test_one_that_needs_all_of_it_waits_until_it_has_it(self) -> None:
        with toy_engine(num_blocks=20) as engine:
            with at_once(engine) as submit:
                calls = [submit(request(prompt(20, seed))) for seed in range(3)]
            for call in calls:
                assert_right(call, 79)
                assert len(call.tokens) == 79 - 20
            assert engine.core.stats().preemptions == 0

    def test_an_answered_request_takes_the_room_for_its_last_token_from_a_younger_one(self) -> None:
        # When the older has its 20 tokens, the last of them needs a sixth block, and the younger has the other five.
        with mock.patch.object(scheduler, "HEADROOM", 1), toy_engine(num_blocks=10) as engine:
            with at_once(engine) as submit:
                older = submit(request(prompt(8, seed=1), max_tokens=12))
                younger = submit(request(prompt(6, seed=2), max_tokens=25))
            assert engine.core.stats().preemptions > 0
            assert_right(older, 39)
            assert_right(younger, 39)


class TestRefusals:
    def test_a_prompt_longer_than_the_context(self) -> None:
        with toy_engine(context_length=100) as engine:
            with pytest.raises(ContextLengthError, match="context is 100 tokens") as caught:
                engine.submit(request(prompt(100)))
            assert caught.value.code == "context_length_exceeded"

    def test_a_prompt_with_max_tokens_beyond_the_context(self) -> None:
        with toy_engine(context_length=100) as engine:
            with pytest.raises(ContextLengthError, match="max_tokens of 11"):
                engine.submit(request(prompt(90), max_tokens=11))
            assert len(engine.answer(request(prompt(90), max_tokens=10)).tokens) == 10

    def test_a_prompt_longer_than_the_memory(self) -> None:
        with (
            toy_engine(num_blocks=10, context_length=100) as engine,
            pytest.raises(ContextLengthError, match=r"holds 39 tokens \(kv_memory\)"),
        ):
            engine.submit(request(prompt(39)))

    def test_no_prompt_at_all(self) -> None:
        with toy_engine() as engine, pytest.raises(InvalidRequestError, match="empty") as caught:
            engine.submit(request([]))
        assert caught.value.param == "prompt"

    @pytest.mark.parametrize("token", [-1, VOCABULARY])
    def test_token_ids_outside_the_vocabulary(self, token: int) -> None:
        with toy_engine() as engine:
            with pytest.raises(InvalidRequestError, match="0 to 49") as caught:
                engine.submit(request([1, token, 2]))
            assert caught.value.param == "prompt"
            with pytest.raises(InvalidRequestError, match="0 to 49") as caught:
                engine.submit(request([1], logit_bias={3: 1.0, token: 1.0}))
            assert caught.value.param == "logit_bias"

    def test_more_than_may_wait(self) -> None:
        with toy_engine(max_running=1, max_waiting=3) as engine:
            with at_once(engine) as submit:
                for seed in range(3):
                    submit(request(prompt(4, seed), max_tokens=2))
                with pytest.raises(OverloadedError, match="3 requests are waiting") as caught:
                    submit(request(prompt(4), max_tokens=2))
                assert caught.value.retry_after > 0
                assert engine.core.stats().waiting == 3
            assert_right(engine.answer(request(prompt(4), max_tokens=2)))


class TestFailures:
    def test_a_step_that_fails_fails_its_own_requests_only(self, caplog: pytest.LogCaptureFixture) -> None:
        with toy_engine(max_running=2) as engine:
            with at_once(engine) as submit:
                calls = [submit(request(prompt(30, seed), max_tokens=5)) for seed in range(4)]
                engine.backend.before_step = failing_in_step(engine, 4)
            assert [call.reason for call in calls] == ["error", "error", "length", "length"]
            assert isinstance(calls[0].outputs[-1].error, RuntimeError)
            assert "a step failed" in caplog.text
            for call in calls[2:]:
                assert_right(call)

    def test_an_engine_that_is_not_sound_after_a_failure_takes_no_more(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with toy_engine() as engine:
            engine.backend.before_step = failing_in_step(engine, 2)
            with monkeypatch.context() as patch:
                patch.setattr(KVMemory, "check", mock.Mock(side_effect=AssertionError("lost")))
                assert engine.answer(request(prompt(5), max_tokens=5)).reason == "error"
                wait_until(lambda: not engine.core.alive)
            with pytest.raises(EngineStoppedError):
                engine.submit(request(prompt(5)))

    def test_a_step_that_hangs_is_noticed(self) -> None:
        going_on = threading.Event()
        with toy_engine() as engine:
            assert engine.core.stalled_seconds == 0
            engine.backend.before_step = lambda: going_on.wait(HANG)
            call = engine.submit(request(prompt(5), max_tokens=2))
            wait_until(lambda: engine.core.stalled_seconds > 0.05)
            engine.backend.before_step = lambda: None
            going_on.set()
            engine.settled()
            assert_right(call)
            wait_until(lambda: engine.core.stalled_seconds == 0)

    def test_what_was_computed_before_the_failure_is_still_good(self) -> None:
        with toy_engine() as engine:
            engine.backend.before_step = failing_in_step(engine, 3)
            assert engine.answer(request(prompt(300), max_tokens=5)).reason == "error"
            again = engine.answer(request(prompt(300), max_tokens=5))
            assert again.counters.reused_tokens == 2 * STEP_SIZES[-1]
            assert_right(again)

    def test_an_answered_request_does_not_hear_of_a_failure_after_it(self) -> None:
        with toy_engine() as engine:
            engine.backend.before_step = failing_in_step(engine, 4)
            call = engine.answer(request(prompt(5), max_tokens=3))
            engine.settled()
            assert len(engine.backend.steps) == 4
            assert_right(call)
            again = engine.answer(request(prompt(5) + call.tokens + [7], max_tokens=3))
            assert again.counters.reused_tokens == 5 + 2
            assert_right(again)

    def test_a_failed_choice_leaves_nothing_of_a_draft_behind(self) -> None:
        with toy_engine() as engine:

            def fail_with_a_draft() -> None:
                if any(chunk.past > 40 and len(chunk.tokens) > 1 for chunk in engine.backend.steps[-1].chunks):
                    raise RuntimeError("the sampler is out of paper")

            engine.backend.before_choice = fail_with_a_draft
            call = engine.answer(request(prompt(20) * 2, max_tokens=60, speculation=True))
            assert call.reason == "error"
            assert call.tokens == direct(call.request, 999).tokens[: len(call.tokens)]
            engine.settled()
            assert_cached_as_said(engine)
            engine.backend.before_choice = lambda: None
            again = engine.answer(request(prompt(20) * 2 + call.tokens + [7], max_tokens=30, speculation=True))
            assert again.counters.reused_tokens > 40
            assert_right(again)

    @pytest.mark.parametrize("step", range(1, 5))
    def test_a_step_fails_with_the_queued_one_before_it(self, step: int) -> None:
        with toy_engine(kind="queue") as engine:
            engine.backend.before_step = failing_in_step(engine, step)
            assert engine.answer(request(prompt(450), max_tokens=5)).reason == "error"
            again = engine.answer(request(prompt(450), max_tokens=5))
            assert again.counters.reused_tokens == (step - 1) * STEP_SIZES[-1]
            assert_right(again)

    @pytest.mark.parametrize("kind", ["paged", "queue"])
    def test_every_step_may_fail(self, kind: str) -> None:
        with toy_engine(kind=kind) as engine:

            def fail() -> None:
                raise RuntimeError("the machine is still on fire")

            engine.backend.before_step = fail
            calls = [engine.submit(request(prompt(20, seed % 3), max_tokens=3)) for seed in range(10)]
            engine.wait(*calls)
            assert {call.reason for call in calls} == {"error"}

    @pytest.mark.parametrize("at", [1, 4])
    def test_a_sink_that_fails_loses_its_request_and_no_other(self, at: int, caplog: pytest.LogCaptureFixture) -> None:
        def fail(output: Output) -> None:
            if len(bad.outputs) == at:
                raise RuntimeError("nobody listens")

        with toy_engine() as engine:
            bad = Call(request(prompt(6), max_tokens=4), on_output=fail)
            good = Call(request(prompt(6, seed=1), max_tokens=8))
            for call in (bad, good):
                engine.core.submit(call.request, call.sink)
            engine.wait(bad, good)
            assert bad.reason == ("length" if at == 4 else "cancelled")
            assert "sink failed" in caplog.text
            assert_right(bad)
            assert_right(good)

    @pytest.mark.parametrize("at", [0, 1, 2])
    def test_an_output_that_can_not_be_made_fails_its_request_alone(
        self, at: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        feed, finish = TextStream.feed, TextStream.finish
        fed: Counter[TextStream] = Counter()

        def failing_feed(self: TextStream, tokens: list[int]) -> str:
            fed[self] += 1
            if self is engine_text() and fed[self] == at + 1:
                raise RuntimeError("no such character")
            return feed(self, tokens)

        def failing_finish(self: TextStream) -> str:
            if self is engine_text():
                raise RuntimeError("nor an end")
            return finish(self)

        def engine_text() -> TextStream:
            assert bad.active is not None
            return bad.active._text

        monkeypatch.setattr(TextStream, "feed", failing_feed)
        monkeypatch.setattr(TextStream, "finish", failing_finish)
        with toy_engine() as engine:
            with at_once(engine) as submit:
                bad = submit(request(prompt(6), max_tokens=4))
                good = submit(request(prompt(6, seed=1), max_tokens=8))
            assert bad.reason == "error"
            assert str(bad.outputs[-1].error) == "no such character"
            assert [record.getMessage() for record in caplog.records] == [
                "a request's output can't be made, others go on"
            ]
            assert len(bad.tokens) == at
            assert_right(good)

    @pytest.mark.parametrize("at", [6, 9])
    def test_logits_that_are_no_numbers_fail_their_request_alone(
        self, at: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with toy_engine() as engine:
            compute = engine.backend.compute

            def overflowing(chunks: Sequence[ToyChunk]) -> FloatArray:
                logits, row = compute(chunks), 0
                for chunk in chunks:
                    tokens = engine.backend.contents(chunk.state)
                    if tokens[:6] == [*prompt(6)] and len(tokens) >= at:
                        logits[row : row + chunk.rows] = np.nan
                    row += chunk.rows
                return logits

            monkeypatch.setattr(engine.backend, "compute", overflowing)
            with at_once(engine) as submit:
                bad = submit(request(prompt(6), max_tokens=12))
                good = submit(request(prompt(6, seed=1), max_tokens=12))
            assert bad.reason == "error"
            assert isinstance(bad.outputs[-1].error, LogitsError)
            assert len(bad.tokens) <= at - 6
            assert_right(good)

    def test_an_engine_that_fails_tells_everybody_and_takes_no_more(self, caplog: pytest.LogCaptureFixture) -> None:
        with toy_engine(max_running=1) as engine:
            with at_once(engine) as submit:
                calls = [submit(request(prompt(5, seed), max_tokens=3)) for seed in range(2)]
                engine.core._loop._scheduler.plan = mock.Mock(side_effect=MemoryError("no luck"))  # type: ignore[method-assign]
            for call in calls:
                assert call.reason == "error"
                assert isinstance(call.outputs[-1].error, EngineStoppedError)
                assert "no luck" in str(call.outputs[-1].error)
            assert not engine.core.alive
            with pytest.raises(EngineStoppedError):
                engine.submit(request(prompt(5)))

    def test_a_failing_call_fails_its_caller_only(self) -> None:
        with toy_engine() as engine:
            with pytest.raises(ZeroDivisionError):
                engine.core.call(Look(lambda kv: 1 // 0))
            assert engine.core.call(Look(lambda kv: kv.capacity)) == 256 * 4 - 1


def failing_in_step(engine: ToyEngine, step: int) -> Callable[[], None]:
    def fail() -> None:
        if len(engine.backend.steps) == step:
            raise RuntimeError("the machine is on fire")

    return fail


class TestCancelling:
    def test_one_that_waits_never_runs(self) -> None:
        with toy_engine(max_running=1) as engine:
            with at_once(engine) as submit:
                calls = [submit(request(prompt(5, seed), max_tokens=3)) for seed in range(3)]
                engine.cancel(calls[1])
            assert [call.reason for call in calls] == ["length", "cancelled", "length"]
            assert calls[1].counters.forward_passes == 0
            assert len(calls[1].outputs) == 1

    def test_one_that_runs_ends_after_the_step_under_way_and_leaves_its_kv(self) -> None:
        with toy_engine() as engine:
            call = Call(request(prompt(40), max_tokens=100))
            call.on_output = lambda _: engine.cancel(call) if len(call.tokens) == 3 else None
            call.active = engine.core.submit(call.request, call.sink)
            engine.wait(call)
            assert len(call.tokens) == 4
            assert call.reason == "cancelled"
            again = engine.answer(request(prompt(40) + call.tokens, max_tokens=2))
            assert again.counters.reused_tokens == 43
            assert_right(again)

    def test_one_whose_prompt_is_being_computed(self) -> None:
        with toy_engine() as engine:
            with at_once(engine) as submit:
                call = submit(request(prompt(500), max_tokens=5))
                engine.backend.before_step = lambda: engine.cancel(call) if len(engine.backend.steps) == 3 else None
            assert call.reason == "cancelled"
            assert len(engine.backend.steps) == 3

    def test_again_and_too_late_is_harmless(self) -> None:
        with toy_engine() as engine:
            call = engine.answer(request(prompt(5), max_tokens=3))
            engine.cancel(call)
            engine.cancel(call)
            assert_right(engine.answer(request(prompt(5, seed=1), max_tokens=3)))
            assert_right(call)

    def test_half_a_character_is_released(self) -> None:
        with toy_engine() as engine:
            call = Call(request(prompt(5), logit_bias={VOCABULARY - 2: 100}, max_tokens=50))
            call.on_output = lambda _: engine.cancel(call) if call.tokens else None
            call.active = engine.core.submit(call.request, call.sink)
            engine.wait(call)
            assert call.text == TOKENIZER.decode(call.tokens)
            assert call.text.endswith("\ufffd")


class TestShutdown:
    def test_what_runs_and_waits_is_told(self) -> None:
        with toy_engine(max_running=1) as engine:
            entered, leave = threading.Event(), threading.Event()

            def hold() -> None:
                entered.set()
                leave.wait(HANG)

            engine.backend.before_step = hold
            calls = [engine.submit(request(prompt(5, seed), max_tokens=30)) for seed in range(3)]
            assert entered.wait(HANG)
            closing = closing_thread(engine, drain_seconds=0)
            leave.set()
            closing.join(HANG)
            assert not closing.is_alive()
            for call in calls:
                assert call.reason == "error"
                assert isinstance(call.outputs[-1].error, EngineStoppedError)
            assert len(engine.backend.steps) == 1

    def test_with_time_to_drain_all_are_answered(self) -> None:
        with toy_engine(max_running=2) as engine:
            calls = [engine.submit(request(prompt(5, seed), max_tokens=30)) for seed in range(5)]
            engine.core.shutdown(drain_seconds=1000)
            for call in calls:
                assert_right(call)

    def test_who_takes_longer_than_the_time_to_drain_is_aborted(self) -> None:
        with toy_engine() as engine:
            with at_once(engine) as submit:
                quick = submit(request(prompt(5), max_tokens=3))
                slow = submit(request(prompt(5, seed=1), max_tokens=500))
                closing = closing_thread(engine, drain_seconds=40 * 2 * SECONDS_PER_TOKEN)
            closing.join(HANG)
            assert_right(quick)
            assert slow.reason == "error"
            assert 0 < len(slow.tokens) < 100
            assert slow.tokens == direct(slow.request, 999).tokens[: len(slow.tokens)]

    def test_whoever_was_accepted_before_is_answered(self) -> None:
        """Requests that come in just when the engine runs out of work are among those that it drains."""
        with toy_engine() as engine:
            stop = direct(request(prompt(5), max_tokens=1), 999).tokens[0]
            last: list[Call] = []

            def submit_and_close(output: Output) -> None:
                last.append(engine.submit(request(prompt(5, seed=1), max_tokens=3)))
                closing_thread(engine, drain_seconds=1000)

            first = engine.submit(request(prompt(5), stop_token_ids=(stop,)), submit_and_close)
            engine.wait(first)
            engine.wait(*last)
            assert first.reason == "stop"
            assert_right(last[0])

    def test_nothing_is_accepted_after_it(self) -> None:
        with toy_engine() as engine:
            engine.core.shutdown()
            with pytest.raises(EngineStoppedError):
                engine.submit(request(prompt(5)))
            with pytest.raises(EngineStoppedError):
                engine.core.call(Look(lambda kv: None))

    def test_twice_is_harmless(self) -> None:
        with toy_engine() as engine:
            engine.core.shutdown(drain_seconds=5)
            engine.core.shutdown()


def closing_thread(engine: ToyEngine, *, drain_seconds: float) -> threading.Thread:
    """A thread that shuts the engine down, and has got so far that nothing more is accepted."""
    thread = threading.Thread(target=lambda: engine.core.shutdown(drain_seconds=drain_seconds), daemon=True)
    thread.start()
    for _ in range(2000):
        try:
            engine.core.submit(request([1], max_tokens=1), lambda output: None)
        except EngineStoppedError:
            return thread
        time.sleep(0.001)
    raise AssertionError("the engine goes on accepting requests")


class TestEnds:
    """Why answers end, and what the last output says."""

    def test_at_max_tokens(self) -> None:
        with toy_engine() as engine:
            call = engine.answer(request(prompt(5), max_tokens=7))
            assert (call.reason, len(call.tokens)) == ("length", 7)

    def test_at_the_end_of_the_context(self) -> None:
        with toy_engine(context_length=30) as engine:
            call = engine.answer(request(prompt(5)))
            assert (call.reason, len(call.tokens)) == ("length", 25)

    def test_at_a_stop_token_which_is_not_part_of_it(self) -> None:
        tokens = direct(request(prompt(5), max_tokens=6), 999).tokens
        with toy_engine() as engine:
            call = engine.answer(request(prompt(5), stop_token_ids=(tokens[5],)))
            assert call.reason == "stop"
            assert call.tokens == tokens[: tokens.index(tokens[5])]

    def test_at_the_model_s_stop_token_unless_that_is_ignored(self) -> None:
        with toy_engine() as engine:
            call = engine.answer(request(prompt(5), ignore_eos=False, logit_bias={STOP: 100}))
            assert (call.reason, call.tokens) == ("stop", [])
            call = engine.answer(request(prompt(5), ignore_eos=True, logit_bias={STOP: 100}, max_tokens=4))
            assert (call.reason, call.tokens) == ("length", [STOP] * 4)

    def test_at_a_stop_string_whose_tokens_are_told(self) -> None:
        plain = direct(request(prompt(5), max_tokens=20), 999)
        stop = plain.text[3:6]
        with toy_engine() as engine:
            call = engine.answer(request(prompt(5), stop=(stop,)))
            assert call.reason == "stop"
            assert call.text == plain.text[: plain.text.index(stop)]
            assert TOKENIZER.decode(call.tokens) == call.text + stop

    def test_with_the_last_output_a_request_no_longer_counts_as_running(self) -> None:
        with toy_engine() as engine:
            running: list[int] = []
            call = engine.submit(
                request(prompt(5), ignore_eos=False, logit_bias={STOP: 100}),
                lambda output: running.append(engine.core.stats().running),
            )
            engine.wait(call)
            assert running == [0]

    def test_counters_say_what_a_turn_cost(self) -> None:
        with toy_engine(max_running=1) as engine:
            with at_once(engine) as submit:
                first = submit(request(prompt(100), max_tokens=11))
                second = submit(request(prompt(3, seed=1), max_tokens=1))
            counters = first.counters
            assert counters.prompt_tokens == counters.delta_tokens == 100
            assert counters.completion_tokens == 11
            assert counters.forward_passes == 1 + 10  # the prompt, and each token but the last
            assert counters.prefill_ms == pytest.approx(128 * SECONDS_PER_TOKEN * 1e3)
            assert counters.decode_ms == pytest.approx(10 * 2 * SECONDS_PER_TOKEN * 1e3)
            assert second.counters.queue_ms >= counters.prefill_ms + counters.decode_ms
