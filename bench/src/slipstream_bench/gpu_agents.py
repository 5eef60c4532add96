"""Agents on models of random weights that are made on the device: what a turn takes, and how much of it is the host's.

The model computes every step, a script chooses (`scripted.py`): so masks, forced tokens and drafts cost what they cost
in service, and drafts come true as often as with a model that makes sense.
"""

import gc
import json
import random
import shutil
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from slipstream import Engine, EngineConfig, SamplingParams, TurnRequest, runtime
from slipstream.backend.torch.backend import TorchBackend, operators_for
from slipstream.backend.torch.hooks import NAME
from slipstream.backend.torch.model import TorchModel
from slipstream.chat import Message
from slipstream.errors import SlipstreamError
from slipstream.models import DEFAULT_MODEL, Manifest, Model, ModelStore
from slipstream.models.manifest import MANIFEST_FILE
from slipstream_bench.coding import coding_script
from slipstream_bench.conversation import Answer, Conversation, prescribed_answer
from slipstream_bench.prescribed import scripted
from slipstream_bench.script import Script


def random_model(device: torch.device, dtype: torch.dtype, sizes: Mapping[str, int], attention: str = NAME) -> Any:
    """A Qwen3 of `transformers` with random weights, made on the device."""
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(
            Qwen3Config(**sizes), dtype=dtype, attn_implementation=attention, experts_implementation=NAME
        ).eval()


@dataclass(frozen=True)
class Mode:
    """What of Slipstream is on."""

    name: str
    idle: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    """Of each turn's request."""


_ALONE: dict[str, Any] = {"jump_forward": False, "speculation": False, "response_cache": False}
MODES = (
    Mode("slipstream", idle=True, options={"response_cache": False}),
    Mode("prefix reuse alone", options=_ALONE),  # what vLLM does
    Mode("nothing", options=_ALONE | {"reuse": False}),
)


@dataclass(frozen=True)
class Turns:
    """What came of some agents' turns; times are in seconds."""

    seconds: tuple[float, ...]
    """Of each turn but each agent's first."""
    tokens: tuple[tuple[int, int], ...]
    """Of each turn's prompt and answer."""
    steps: int
    busy: float
    """Of the engine's thread, with something to do."""
    device: float
    """Of this, that of steps on the device."""

    @property
    def median(self) -> float:
        """Of later turns."""
        return statistics.median(self.seconds)

    @property
    def host_share(self) -> float:
        """What of the engine's time is not the device's."""
        return max(0.0, 1 - self.device / self.busy)


class Fleet:
    """An engine on the device that agents talk to; use it in a `with` statement.

    `make` makes the model, of the vocabulary size that it is given. Raises `ModelError` if the default model, whose
    vocabulary and template it has, was not pulled and can't be.
    """

    def __init__(self, folder: Path, make: Callable[[int], Any], *, kv_memory: int, vocab_size: int) -> None:
        self.model = model_folder(folder, vocab_size)
        self._made: list[TorchModel] = []

        def load(model: Model, config: EngineConfig) -> runtime.Measure:
            module = make(model.manifest.vocab_size)
            operators = operators_for(module.device)
            self._made.append(TorchModel(module, model.path / MANIFEST_FILE, operators[0]))
            return lambda progress: TorchBackend(
                self._made[-1], operators, kv_memory=config.kv_memory, progress=progress
            )

        self.load = load
        with loading(scripted(load, prescribed_answer)):
            self._engine = Engine(self.model, EngineConfig.model_validate({"kv_memory": kv_memory}))
        self._prefill = self._engine.core.prefill

    def __enter__(self) -> "Fleet":
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.close()
        self._made.clear()
        del self._engine
        gc.collect()  # what the device had of it is free for the next

    @property
    def exact(self) -> bool:
        """Whether steps are exact."""
        return self._engine.exact

    def run(self, mode: Mode, agents: int, turns: int, seed: str) -> Turns:
        """Have some agents talk at once, each of another task."""
        rng = random.Random(f"{seed} {mode.name} {agents} {turns}")
        scripts = [coding_script(rng, turns, lines=(1, 4)) for _ in range(agents)]
        core, model = self._engine.core, self._made[-1]
        core.prefill = self._prefill if mode.idle else lambda *_: None  # type: ignore[method-assign]
        before, device_before = core.stats(), model.seconds
        found: list[list[tuple[float, int, int]]] = [[] for _ in scripts]
        errors: list[Exception] = []

        def follow(script: Script, took: list[tuple[float, int, int]]) -> None:
            try:
                took += self._follow(script, mode)
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=follow, args=each) for each in zip(scripts, found, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        after = core.stats()
        return Turns(
            seconds=tuple(seconds for took in found for seconds, _, _ in took[1:]),
            tokens=tuple((prompt, answer) for took in found for _, prompt, answer in took),
            steps=after.steps - before.steps,
            busy=after.busy_seconds - before.busy_seconds,
            device=model.seconds - device_before,
        )

    def _follow(self, script: Script, mode: Mode) -> Iterator[tuple[float, int, int]]:
        """The seconds, and the tokens of prompt and answer, of each turn."""
        conversation = Conversation(script, "prescribed")
        for turn in range(len(script.turns)):
            body = conversation.request(turn)
            request = TurnRequest(
                prompt=tuple(Message(each["role"], each["content"]) for each in body["messages"]),
                params=SamplingParams(temperature=0, max_tokens=body["max_tokens"]),
                response_schema=body["response_format"]["json_schema"]["schema"],
                **mode.options,
            )
            started = time.perf_counter()
            completion = self._engine.answer(request)[0]
            seconds = time.perf_counter() - started
            answer = Answer(completion.text)
            if not conversation.is_valid(turn, answer):
                raise SlipstreamError(f"an answer was not the one that was prescribed: {completion.text!r}")
            conversation.answered(answer)
            yield seconds, completion.counters.prompt_tokens, completion.counters.completion_tokens


@contextmanager
def loading(load: runtime.Load) -> Iterator[None]:
    """Have models in safetensors loaded so."""
    before = runtime.BACKENDS["safetensors"]
    runtime.BACKENDS["safetensors"] = load
    try:
        yield
    finally:
        runtime.BACKENDS["safetensors"] = before


def check_scenarios(folder: Path, make: Callable[[int], Any], count: int, until: float) -> tuple[int, str | None]:
    """How many random scenarios gave the same tokens as a computation from scratch, and what was wrong with one.

    No more are begun `until` then, by `time.monotonic`. None are run where the repository's tests are not at hand.
    """
    try:
        from tests.engine import exactness  # an installed package has no tests
    except ImportError:
        return 0, None
    model = model_folder(folder, 0)
    module, checked = make(model.manifest.vocab_size), 0

    def load(model: Model, config: EngineConfig) -> runtime.Measure:
        operators = operators_for(module.device)
        loaded = TorchModel(module, model.path / MANIFEST_FILE, operators[0])
        return lambda progress: TorchBackend(loaded, operators, kv_memory=config.kv_memory, progress=progress)

    with loading(load):
        while checked < count and time.monotonic() < until:
            try:
                checked += exactness.run(min(100, count - checked), checked, model)
            except AssertionError as error:
                return checked, f"after {checked} scenarios: {error}"
    return checked, None


def model_folder(folder: Path, vocab_size: int) -> Model:
    """A model without weights, of the default model's vocabulary, filled up to a width, and its template."""
    default = ModelStore().ensure(DEFAULT_MODEL)
    files = [default.tokenizer_path, *default.path.glob("chat_template.jinja")]
    for path in files:
        shutil.copy(path, folder)
    facts = json.loads(default.manifest.model_dump_json()) | {
        "name": "random",
        "sha256": "0" * 64,
        "vocab_size": max(vocab_size, default.manifest.vocab_size),
        "context_length": 16_384,
        "files": {path.name: path.stat().st_size for path in files},
    }
    manifest = Manifest.model_validate(facts)
    manifest.save(folder)
    return Model(folder, manifest)


def generated(model: Any, turns: Sequence[tuple[int, int]]) -> float:
    """The median of the seconds that `transformers`' own generation takes for turns of so many tokens."""
    taken = []
    for prompt, answer in turns:
        tokens = torch.ones((1, prompt), dtype=torch.int64, device=model.device)
        started = time.perf_counter()
        model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            min_new_tokens=answer,
            max_new_tokens=answer,
            do_sample=False,
            pad_token_id=0,
        )[0, -1].item()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)
