"""Random scenarios for the promise: same prompt and parameters, same tokens, whatever happens around them.

Each scenario is one request to an engine that reuses, forks, batches, chunks, preempts, evicts and is ended and started
again. Afterwards a slow
oracle runs prompt and answer through the model in one piece, from scratch and alone, and chooses each token anew.

Run `python -m tests.engine.exactness --scenarios 5000` for as long as you like; the suite runs some of it.
"""

import argparse
import random
from collections import Counter
from collections.abc import Callable, Generator
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import Any
from unittest.mock import patch

import numpy as np
from rich.progress import track

from slipstream.backend import Chunk, StepCost, StepMeasurements, Store
from slipstream.backend.openvino import OpenVINOBackend
from slipstream.backend.paged import PagedBackend
from slipstream.backend.paged_model import PagedModel
from slipstream.backend.steps import BLOCK_SIZE, StepClass
from slipstream.chat import Tool, ToolUse
from slipstream.chat.answers import Dialect
from slipstream.config import EngineConfig
from slipstream.engine import ActiveRequest, EngineCore, EngineRequest, Output, SamplingParams, as_prompt, scheduler
from slipstream.engine.closing import Closer
from slipstream.engine.commands import CountComputed, Install, Pin
from slipstream.engine.grammar import Grammar, GrammarCompiler
from slipstream.engine.idle import IdlePrefill
from slipstream.kv import KVMemory, KVUsage
from slipstream.models import DEFAULT_MODEL, Model, ModelStore
from slipstream.runtime import BACKENDS
from slipstream.sampling import Row, Sampler
from slipstream.sessions import SavedKV
from slipstream.tokenizer import Tokenizer
from slipstream.types import IntArray
from tests.looking import Look
from tests.processors import Emulated
from tests.waiting import HANG

CONTEXT = 1200
STEP_SIZES = (2, 4, 8, 16, 32, 64, 128, 256)
RESTARTS = 0.08
"""How often a round of scenarios is followed by one."""
HEADROOMS = (1, 1, 256)
"""Tokens that the scheduler keeps room for beyond a prompt; where they are few, requests are preempted."""
PER_TOKEN = (5e-4, 5e-6)
"""Seconds that a token adds to a step, as the scheduler is told; where it is little, drafts are many."""

_TOOLS = (Tool("look_up", parameters={"properties": {"word": {"type": "string"}, "times": {"type": "integer"}}}),)
GRAMMARS = [
    written.source
    for use in (ToolUse(_TOOLS), ToolUse(_TOOLS, "required"))
    if (written := Dialect("", tool_format="hermes").grammar(use, None, opens_reasoning=False))
]


@dataclass(frozen=True)
class Processor:
    """The one at hand, or another that is emulated; what is measured on that is kept in a folder of its own."""

    folder: Path | None = None
    sizes: tuple[int, ...] = ()
    rows: tuple[int, ...] = ()
    step_class: StepClass | None = None
    """What steps are to be, in place of what the self-test finds."""

    def backend(self, model: Model, kv_memory: int) -> PagedBackend[Any]:
        backend = self._measured(model, kv_memory)
        backend.step_class = self.step_class or backend.step_class
        return backend

    def _measured(self, model: Model, kv_memory: int) -> PagedBackend[Any]:
        if self.folder is None:
            config = EngineConfig.model_validate({"kv_memory": kv_memory})
            backend = BACKENDS[model.weights](model, config)(lambda _: None)
            assert isinstance(backend, PagedBackend)
            return backend
        for path in (model.ir_path, model.ir_path.with_suffix(".bin")):
            if not (self.folder / path.name).exists():
                (self.folder / path.name).symlink_to(path)
        paged = Emulated(PagedModel(self.folder / model.ir_path.name), sizes=self.sizes, rows=self.rows)
        return OpenVINOBackend(paged, kv_memory=kv_memory)  # type: ignore[arg-type]


THIS_PROCESSOR = Processor()


class NarrowBackend:
    """A backend of which an engine may use only some blocks, so that memory runs out, and steps of other sizes."""

    def __init__(
        self, backend: PagedBackend[Any], num_blocks: int, largest_step: int, per_token: float, seen: Counter[str]
    ) -> None:
        self._backend = backend
        self.store = _counted(backend.new_store(num_blocks), seen)
        largest_step = min(largest_step, getattr(self.store, "longest_chunk", largest_step))
        sizes = [size for size in STEP_SIZES if size <= largest_step]
        measured = StepMeasurements(tuple((size, 1e-3 + size * per_token) for size in sizes))
        self.cost = StepCost(measured, smallest_chunk=2)

    def __getattr__(self, name: str) -> object:
        return getattr(self._backend, name)


def _counted(store: Store[Any], seen: Counter[str]) -> Store[Any]:
    """The store, which counts from now on how often a sequence was forked, and taken back to fewer tokens."""
    fork, rewind = store.fork, store.rewind

    def counted_fork(state: Any, length: int, room: int) -> Any:
        seen["forks"] += 1
        seen["forks before the end"] += length < state.length
        return fork(state, length, room)

    def counted_rewind(state: Any, length: int) -> int:
        seen["rewinds"] += length < state.length
        return rewind(state, length)

    store.fork, store.rewind = counted_fork, counted_rewind
    return store


@dataclass
class Scenario:
    """One request, and what came of it."""

    request: EngineRequest
    cancel_after: int | None = None
    answer: list[int] = field(default_factory=list)
    done: Future[Output] = field(default_factory=Future)


class Oracle:
    """Computes answers again from scratch."""

    def __init__(self, model: Model, processor: Processor) -> None:
        self._backend = processor.backend(model, kv_memory=64 * 2**20)
        self._stops = set(model.manifest.stop_token_ids)
        self._draws_itself = model.weights == "safetensors"
        """Whether the device draws tokens: it rounds weights in its own way, which decides now and then."""

    def check(self, scenario: Scenario) -> None:
        """Assert that each token of the answer is the one that a fresh computation chooses."""
        params, prompt = scenario.request.params, scenario.request.prompt
        output = scenario.done.result(timeout=HANG)
        assert output.error is None, output.error
        rows = len(scenario.answer) + 1
        tokens = np.concatenate((prompt, as_prompt(scenario.answer)))
        state = self._backend.store.open(len(tokens))
        ticket = self._backend.launch([Chunk(state, tokens, rows)])
        ticket.wait()
        logits = ticket.logits
        self._backend.store.release(state)
        sampler = Sampler(params, params.seed or 0, prompt, self._backend.vocab_size)
        constraint = scenario.request.grammar.constraint() if scenario.request.grammar is not None else None

        closer = Closer(len(prompt) + (params.max_tokens or 0))

        def drawn(index: int, mask: IntArray | None = None) -> int:
            row = Row(index, sampler, len(prompt) + index, mask)
            (choice,) = ticket.choose([row]) if self._draws_itself else [row.choose(logits[index])]
            return choice.token

        def choose(index: int) -> int | None:
            if constraint is None:
                return drawn(index)
            token = drawn(index, constraint.mask())
            if constraint.forced() or token in self._stops:
                return token
            return closer.choose(constraint, token, len(prompt) + index)

        for index, token in enumerate(scenario.answer):
            chosen = choose(index)
            assert chosen == token, f"token {index} of {rows - 1}: {token}, afresh {chosen}; {scenario.request}"
            sampler.accept(token)
            if constraint is not None:
                constraint.accept((token,))
        if output.finish_reason == "stop":
            assert (constraint is not None and constraint.finished) or choose(rows - 1) in self._stops
        elif output.finish_reason == "length":
            assert len(scenario.answer) == params.max_tokens or choose(rows - 1) is None
        else:
            assert output.finish_reason == "cancelled"
            assert scenario.cancel_after is not None


def rounds(
    rng: random.Random,
    start: Callable[[], PagedBackend[Any]],
    tokenizer: Tokenizer,
    model: Model,
    longest: int,
    seen: Counter[str],
) -> Generator[list[Scenario], None, None]:
    """Endless rounds of scenarios that run at the same time, on engines of many shapes.

    A scenario adds up to `longest` new tokens to what was said before. Now and then all is ended, and what was kept of
    conversations is read from files by a backend that `start` makes anew, whose memory is empty. `seen` counts what
    happened.
    """
    backend = start()
    compiler = GrammarCompiler(tokenizer, vocab_size=backend.vocab_size, stop_token_ids=model.manifest.stop_token_ids)
    grammars = [compiler.compile(source, param="") for source in GRAMMARS]
    known = min(backend.vocab_size, 49_000)  # tokens that prompts are drawn from
    counts = range(CONTEXT // BLOCK_SIZE + 8, backend.store.capacity // BLOCK_SIZE)
    least = next(count for count in counts if backend.new_store(count).capacity >= CONTEXT)  # states take memory, too
    while True:
        blocks = rng.choice([least, least, least + 15, least + 75, backend.store.capacity // BLOCK_SIZE])
        core = _engine(rng, backend, blocks, tokenizer, model, seen)
        conversations: list[IntArray] = [np.empty(0, np.int32)]
        headroom = patch.object(scheduler, "HEADROOM", rng.choice(HEADROOMS))
        headroom.start()
        try:
            for _ in range(rng.randint(3, 6)):
                scenarios = [_scenario(rng, conversations, grammars, longest, known) for _ in range(rng.randint(1, 9))]
                all_are_there, together = Event(), rng.random() < 0.5
                if together:
                    core.send(Look(lambda _, event=all_are_there: event.wait(HANG)))
                for scenario in scenarios:
                    _submit(core, scenario)
                    if not together:  # the first may be done before the last comes
                        _disturb(rng, core, rng.choice(conversations), known)
                all_are_there.set()
                _disturb(rng, core, rng.choice(conversations), known)
                for scenario in scenarios:
                    counters = scenario.done.result(timeout=HANG).counters
                    assert counters is not None
                    seen.update({"drafted": counters.drafted_tokens, "accepted": counters.accepted_tokens})
                    conversations.append(np.concatenate((scenario.request.prompt, as_prompt(scenario.answer))))
                conversations = [c for c in conversations if len(c) < longest * 6 // 5]
                core.call(Look(lambda kv: kv.check()))
                yield scenarios
                if rng.random() < RESTARTS:
                    with TemporaryDirectory() as folder:
                        parts = _save(rng, core, conversations, SavedKV(Path(folder), backend.fingerprint, 2**30))
                        _end(core, seen)
                        backend = start()
                        core = _engine(rng, backend, blocks, tokenizer, model, seen)
                        _load(core, parts, SavedKV(Path(folder), backend.fingerprint, 2**30))
                    seen.update({"restarts": 1, "parts read from files": len(parts)})
            usage = core.call(Look(_emptied))
            assert usage.free == usage.capacity, "something leaked"
        finally:
            headroom.stop()
            _end(core, seen)


def _engine(
    rng: random.Random,
    backend: PagedBackend[Any],
    blocks: int,
    tokenizer: Tokenizer,
    model: Model,
    seen: Counter[str],
) -> EngineCore:
    return EngineCore(
        NarrowBackend(backend, blocks, rng.choice(STEP_SIZES[2:]), rng.choice(PER_TOKEN), seen),  # type: ignore[arg-type]
        tokenizer,
        context_length=CONTEXT,
        stop_token_ids=frozenset(model.manifest.stop_token_ids),
        step_target=rng.choice([0.001, 0.02, 0.1]),
        max_running=rng.choice([1, 3, 9, 9]),
    )


def _end(core: EngineCore, seen: Counter[str]) -> None:
    stats = core.stats()
    seen.update({"evictions": stats.kv.evictions, "preemptions": stats.preemptions})
    core.shutdown()


def _save(
    rng: random.Random, core: EngineCore, conversations: list[IntArray], files: SavedKV
) -> list[tuple[bytes, IntArray, int]]:
    """Write what memory has of conversations, each in two parts: each one's key, tokens and start."""
    parts = []
    for tokens in conversations:
        computed = core.call(CountComputed([("", tokens)]))[0]
        cut = rng.randint(0, computed)
        for start, end in ((0, cut), (cut, computed)):
            blob = core.export("", tokens[:end], start) if start < end else None
            if blob is not None:
                parts.append((len(parts).to_bytes(16, "big"), tokens[:end], start))
                files.save(*parts[-1][:2], blob)
    return parts


def _load(core: EngineCore, parts: list[tuple[bytes, IntArray, int]], files: SavedKV) -> None:
    """Read what was written; memory takes it as far as there's room."""
    for key, tokens, start in parts:
        blob = files.load(key, tokens)
        assert blob is not None, "what was written is read"
        core.call(Install("", tokens, start, blob))


def _emptied(kv: KVMemory) -> KVUsage:
    """What memory holds when all that may go is gone; at once, before work ahead of time takes some again."""
    kv.unpin("pinned")
    kv.clear()
    return kv.usage()


def _scenario(
    rng: random.Random, conversations: list[IntArray], grammars: list[Grammar], longest: int, known: int
) -> Scenario:
    history = rng.choice(conversations)
    if rng.random() < 0.3:
        history = history[: rng.randint(0, len(history))]
    length = rng.choice([1, 2, 3, 15, 16, 17, 31, 32, 33, rng.randint(1, 200), rng.randint(1, longest)])
    new = np.array([rng.randrange(17, known) for _ in range(length)], np.int32)
    if len(history) > 20 and rng.random() < 0.4:  # something for drafts to find
        start = rng.randrange(len(history) - 10)
        new = np.concatenate((new, history[start : start + 40]))
    params = SamplingParams(max_tokens=60 if rng.random() < 0.2 else rng.randint(1, 24), temperature=0.0)
    grammar = rng.choice(grammars) if rng.random() < 0.4 else None
    if grammar is not None:
        params = replace(params, max_tokens=rng.choice([5, 40, 60]))
    if rng.random() < 0.5:
        params = replace(
            params,
            temperature=rng.choice([0.5, 1.0, 1.5]),
            seed=rng.randrange(2**40),
            top_p=rng.choice([1.0, 0.9]),
            top_k=rng.choice([0, 40]),
            repetition_penalty=rng.choice([1.0, 1.1]),
            presence_penalty=rng.choice([0.0, 0.5]),
        )
    cancel_after = rng.randint(1, 8) if rng.random() < 0.1 else None
    request = EngineRequest(
        prompt=np.concatenate((history, new)),
        params=params,
        grammar=grammar,
        priority=rng.choice([0, 0, 1]),
        reuse=rng.random() < 0.8,
        jump_forward=rng.random() < 0.7,
        speculation=rng.random() < 0.7,
    )
    return Scenario(request, cancel_after)


def _disturb(rng: random.Random, core: EngineCore, tokens: IntArray, known: int) -> None:
    """What happens to KV besides requests: it's computed ahead, pinned, or goes to disk and comes back."""
    if len(tokens) < 2:
        return
    match rng.randrange(8):
        case 0:
            likely = np.concatenate((tokens, as_prompt([rng.randrange(17, known) for _ in range(rng.randint(1, 50))])))
            core.prefill(IdlePrefill("ahead", "", likely, lambda *_: None))
        case 1:
            core.call(Pin("pinned", "", tokens))
        case 2:
            core.call(Look(lambda kv: kv.unpin("pinned")))
        case 3:
            cut = rng.randrange(1, len(tokens))
            parts = core.export("", tokens[:cut]), core.export("", tokens, cut)
            core.call(Look(lambda kv: kv.clear()))
            for start, part in zip((0, cut), parts, strict=True):
                if part is not None:
                    core.call(Install("", tokens[: cut if start == 0 else None], start, part))


def _submit(core: EngineCore, scenario: Scenario) -> None:
    handles: list[ActiveRequest] = []

    def sink(output: Output) -> None:
        scenario.answer.extend(output.token_ids)
        if scenario.cancel_after is not None and len(scenario.answer) >= scenario.cancel_after:
            for active in handles:
                core.cancel(active)
        if output.finish_reason is not None:
            scenario.done.set_result(output)

    handles.append(core.submit(scenario.request, sink))


def run(
    scenarios: int,
    seed: int,
    model: Model,
    processor: Processor = THIS_PROCESSOR,
    *,
    longest: int = 500,
    seen: Counter[str] | None = None,
) -> int:
    """Run and check at least that many scenarios (see `rounds`); returns how many. `seen` counts what happened."""
    oracle = Oracle(model, processor)
    tokenizer = Tokenizer.from_file(model.tokenizer_path)
    checked = 0
    seen = Counter() if seen is None else seen

    def start() -> PagedBackend[Any]:
        return processor.backend(model, kv_memory=256 * 2**20)

    with closing(rounds(random.Random(seed), start, tokenizer, model, longest, seen)) as batches:
        for batch in batches:
            for scenario in batch:
                oracle.check(scenario)
            checked += len(batch)
            if checked >= scenarios:
                break
    return checked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenarios", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--emulate", help="bounds of another processor's classes, of step sizes and logit rows: 1,80:1")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="a name in the store, or a path")
    options = parser.parse_args()
    model = ModelStore().ensure(options.model)
    chunk = 100
    checked, seen = 0, Counter[str]()
    with TemporaryDirectory() as folder:
        processor = THIS_PROCESSOR
        if options.emulate:
            sizes, _, rows = options.emulate.partition(":")
            processor = Processor(Path(folder), _bounds(sizes), _bounds(rows))
        for index in track(range(-(-options.scenarios // chunk)), "Checking"):
            checked += run(chunk, options.seed + index, model, processor, seen=seen)
    print(f"{checked} scenarios, every token the same as computed afresh")
    print(", ".join(f"{name}: {count}" for name, count in sorted(seen.items())))


def _bounds(text: str) -> tuple[int, ...]:
    return tuple(int(bound) for bound in text.split(",") if bound)


if __name__ == "__main__":
    main()
