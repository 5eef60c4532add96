"""The torch backend on plain operators: the contract of a backend, exactness, and agreement with `transformers`."""

import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import slipstream.backend.torch
from slipstream import EngineConfig
from slipstream.backend import Chunk, calibration
from slipstream.backend.paged import PagedBackend
from slipstream.backend.step_cost import StepMeasurements
from slipstream.backend.steps import PagedChunk, StepClass
from slipstream.backend.torch.backend import TorchBackend, operators_for
from slipstream.backend.torch.model import OF_GPUS, TorchModel
from slipstream.backend.torch.operators import CHUNK_LENGTHS, TOKEN_TILES, Step
from slipstream.backend.torch.plain import PlainOperators
from slipstream.errors import ModelError
from slipstream.models import Model, safetensors
from slipstream.runtime import BACKENDS
from slipstream.types import IntArray
from tests.conformance.backends import check_backend
from tests.engine import exactness
from tests.torch_backend.tiny import ARCHITECTURES, OTHERS, tiny_folder

pytestmark = pytest.mark.torch
each = pytest.mark.parametrize("tiny", ARCHITECTURES, indirect=True)
STEPS = StepClass((2, 16, 64, 160, 320), (1, 16, 320))


def backend_of(model: Model, **options: Any) -> PagedBackend[Any]:
    config = EngineConfig.model_validate({"kv_memory": "16MiB"} | options)
    backend = BACKENDS[model.weights](model, config)(lambda _: None)
    assert isinstance(backend, PagedBackend)
    return backend


def random_tokens(count: int, *, seed: int = 0) -> IntArray:
    return np.random.default_rng(seed).integers(17, 49_000, count).astype(np.int32)


def test_every_architecture_that_is_taken_is_tested() -> None:
    assert {*ARCHITECTURES, *OTHERS} == safetensors.ARCHITECTURES


@pytest.mark.parametrize("name", [*ARCHITECTURES, *OTHERS])
def test_logits_are_those_of_transformers_and_the_same_over_cuts(name: str, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, name, vocabulary=320)
    tokens, others = random_tokens(300) % 320, random_tokens(70, seed=1) % 320  # more than a segment
    table, other_table = np.arange(1, 12, dtype=np.int32), np.arange(12, 16, dtype=np.int32)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        expected = reference(input_ids=torch.from_numpy(tokens.astype(np.int64))[None]).logits[0].numpy()
    model = TorchModel.load(folder, torch.device("cpu"), PlainOperators())
    model.allocate(16 * (1 + model.window_tables))
    whole = STEPS.run(model, [PagedChunk(tokens, 0, table, len(tokens))])
    assert np.abs(whole - expected).max() < 1e-5 * np.abs(expected).max()
    model.allocate(16 * (1 + model.window_tables))
    found = []
    for number, (start, end) in enumerate(pairwise((0, 1, 41, 42, 45, 145, 162, 163, 300))):
        beside = PagedChunk(others[number * 7 : (number + 1) * 7], number * 7, other_table, 0)
        chunk = PagedChunk(tokens[start:end], start, table, end - start)
        found.append(STEPS.run(model, [beside, chunk] if number % 2 else [chunk, beside]))
    assert np.array_equal(np.concatenate(found), whole)


@each
def test_it_is_a_backend(tiny: Model) -> None:
    backend = backend_of(tiny)
    assert backend.exact
    check_backend(backend, seed=1, longest=90, rounds=3)


@each
def test_the_same_tokens_whatever_happens(tiny: Model) -> None:
    assert exactness.run(8, 3, tiny, longest=320) >= 8


@pytest.mark.parametrize("tiny", ["llama"], indirect=True)
def test_the_same_tokens_in_steps_as_a_gpu_has_them(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    queued = []

    def load(model: Model, config: Any) -> Any:
        loaded = TorchModel.load(model.path, torch.device("cpu"), PlainOperators())
        loaded.queues, loaded.candidates = True, OF_GPUS
        launch = TorchBackend.launch

        def noted(backend: TorchBackend, chunks: Any) -> Any:
            ticket = launch(backend, chunks)
            queued.append(ticket.queued)
            return ticket

        monkeypatch.setattr(TorchBackend, "launch", noted)
        return lambda progress: TorchBackend(loaded, [loaded.operators], kv_memory=config.kv_memory, progress=progress)

    monkeypatch.setitem(BACKENDS, "safetensors", load)
    assert exactness.run(8, 7, tiny, longest=700) >= 8
    assert any(queued)
    backend = load(tiny, EngineConfig.model_validate({"kv_memory": "16MiB"}))(lambda _: None)
    assert backend.step_class == OF_GPUS
    check_backend(backend, seed=2, longest=90, rounds=4)


@pytest.mark.parametrize("tiny", ["llama"], indirect=True)
def test_a_queued_step_that_fails_leaves_its_states_as_they_were(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = backend_of(tiny)
    model = backend.model
    model.queues = True
    tokens = random_tokens(70)
    state = backend.store.open(80)
    backend.launch([Chunk(state, tokens[:20], 0)]).wait()
    first, second = (backend.launch([Chunk(state, tokens[at : at + 20], 0)]) for at in (20, 40))
    assert state.length == 60

    def fail(clock: Any) -> float:
        raise RuntimeError("the device is on fire")

    monkeypatch.setattr(type(model._under_way[0][1]), "seconds", fail)
    for ticket, message in ((first, "on fire"), (second, "another that was under way")):
        with pytest.raises(ModelError, match=message):
            ticket.wait()
        assert state.length == 20


@pytest.mark.parametrize("tiny", ["llama"], indirect=True)
def test_saved_state_is_read_back(tiny: Model) -> None:
    backend = backend_of(tiny)
    tokens = random_tokens(70)
    state = backend.store.open(80)
    backend.launch([Chunk(state, tokens, 1)]).wait()
    blob = backend.store.export(state, 0, 64).wait()
    copy = backend.store.open(80)
    backend.store.install(copy, 64, blob)
    assert np.array_equal(backend.store.export(copy, 0, 64).wait(), blob)
    logits = []
    backend.store.rewind(state, 64)
    for each_state in (state, copy):
        ticket = backend.launch([Chunk(each_state, tokens[64:], 2)])
        ticket.wait()
        logits.append(ticket.logits.copy())
    assert np.array_equal(*logits)


class ByPlace(PlainOperators):
    """Operators whose results depend on where in a step a token stands."""

    name = "by place"

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        found = super().linear(x, weight, bias)
        places = torch.arange(found.numel() // found.shape[-1], dtype=found.dtype) * 1e-3
        return found + places.view(*found.shape[:-1], 1)


class NormsByPlace(PlainOperators):
    """The same for norms alone."""

    name = "norms by place"

    def norm(self, x: torch.Tensor, *more: Any) -> torch.Tensor:
        found = super().norm(x, *more)
        return found + torch.arange(found.shape[1]).view(1, -1, *[1] * (found.dim() - 2)) * 1e-3


class RotationsByPlace(PlainOperators):
    """The same for rotations alone."""

    name = "rotations by place"

    def rotate_and_write(self, *given: Any) -> torch.Tensor:
        query = super().rotate_and_write(*given)
        return query + torch.arange(query.shape[2])[:, None] * 1e-3


@pytest.mark.parametrize("tiny", ["llama"], indirect=True)
@pytest.mark.parametrize("kind", [ByPlace, NormsByPlace, RotationsByPlace])
def test_the_next_operators_are_taken_if_the_first_are_not_exact(tiny: Model, kind: type[PlainOperators]) -> None:
    model = TorchModel.load(tiny.path, torch.device("cpu"), kind())
    backend = TorchBackend(model, [kind()], kv_memory=2**24)
    assert not backend.exact
    backend = TorchBackend(model, [kind(), PlainOperators()], kv_memory=2**24)
    assert backend.exact
    assert model.operators.name == PlainOperators.name


class Rival(PlainOperators):
    """Operators that are exact, but perhaps slower than others."""

    name = "rival"
    may_be_slower = True


class RivalByPlace(ByPlace):
    """The same, but not exact."""

    may_be_slower = True


@pytest.mark.parametrize(
    ("kinds", "taken"),
    [
        ({Rival: 1.0, PlainOperators: 2.0}, Rival),
        ({Rival: 2.0, PlainOperators: 1.0}, PlainOperators),
        ({RivalByPlace: 1.0, PlainOperators: 2.0}, PlainOperators),
        ({Rival: 2.0, ByPlace: 1.0}, Rival),
    ],
)
def test_the_faster_operators_are_taken_of_those_that_are_exact(
    kinds: dict[type[PlainOperators], float],
    taken: type[PlainOperators],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    seconds = {kind.name: took for kind, took in kinds.items()}
    folder = tiny_folder(tmp_path, "llama", vocabulary=320)

    def measure(runner: Any, step_class: StepClass, _: Any) -> StepMeasurements:
        took = seconds[runner.operators.name]
        return StepMeasurements(((step_class.sizes[0], took), (step_class.sizes[-1], took)))

    monkeypatch.setattr(calibration, "measure", measure)
    for _ in range(2):  # the second time it's known
        model = TorchModel.load(folder, torch.device("cpu"), PlainOperators())
        backend = TorchBackend(model, [kind() for kind in kinds], kv_memory=2**24)
        assert backend.exact
        assert type(model.operators) is taken
        assert backend.fingerprint.startswith(f"{model.settings}; ")
        assert backend.cost.measured.turn == pytest.approx(
            seconds[taken.name] * (8 + 256 / backend.step_class.sizes[-1])
        )
    assert ("not exact" in caplog.text) == (ByPlace in kinds)


class TooLarge(PlainOperators):
    """Operators with a kernel that this device has no room for."""

    name = "too large"

    def attend(self, *_: Any) -> torch.Tensor:
        raise RuntimeError("out of resource: shared memory")


class NoMasks(PlainOperators):
    """Operators whose choice under a mask can't be compiled."""

    name = "no masks"

    def argmax(self, logits: torch.Tensor, masked: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
        if masked is not None:
            raise type("CompilationError", (Exception,), {})("at 3:14")
        return super().argmax(logits)


@pytest.mark.parametrize("tiny", ["llama"], indirect=True)
def test_the_next_operators_are_taken_if_the_first_cant_be_used(tiny: Model, caplog: pytest.LogCaptureFixture) -> None:
    model = TorchModel.load(tiny.path, torch.device("cpu"), PlainOperators())
    model.gpu = "none, in truth"
    assert TorchBackend(model, [TooLarge(), NoMasks(), PlainOperators()], kv_memory=2**24).exact
    assert model.operators.name == PlainOperators.name
    assert "too large can't be used here" in caplog.text
    assert "no masks can't be used here: the forward pass failed: at 3:14" in caplog.text
    backend = TorchBackend(model, [TooLarge(), ByPlace(), TooLarge()], kv_memory=2**24)
    assert not backend.exact
    assert model.operators.name == ByPlace.name
    with pytest.raises(ModelError, match="shared memory"):
        TorchBackend(model, [TooLarge(), TooLarge()], kv_memory=2**24)


class Noting(PlainOperators):
    """Operators that note how many rows their products have, and choices under masks as `MASKED`."""

    MASKED = -1

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.longest: list[int] = []

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        self.rows.append(x.numel() // x.shape[-1])
        return super().linear(x, weight, bias)

    def argmax(self, logits: torch.Tensor, masked: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
        self.rows += [] if masked is None else [self.MASKED]
        return super().argmax(logits, masked)

    def attend(self, query: torch.Tensor, kv: torch.Tensor, step: Step, *more: Any) -> torch.Tensor:
        self.longest.append(step.longest)
        return super().attend(query, kv, step, *more)


@pytest.mark.parametrize("tiny", ["llama"], indirect=True)
def test_on_a_processor_a_step_is_computed_when_it_is_waited_for(tiny: Model) -> None:
    """Or what the step before brought would be given out after it."""
    operators = Noting()
    model = TorchModel.load(tiny.path, torch.device("cpu"), operators)
    backend = TorchBackend(model, [operators], kv_memory=2**24)
    operators.rows.clear()
    ticket = backend.launch([Chunk(backend.store.open(20), random_tokens(9), 1)])
    assert not operators.rows
    ticket.wait()
    assert operators.rows


@pytest.mark.parametrize("tiny", ["llama"], indirect=True)
def test_on_a_gpu_kernels_are_compiled_before_steps_are_measured(tiny: Model) -> None:
    operators = Noting()
    model = TorchModel.load(tiny.path, torch.device("cpu"), operators)
    model.gpu = "none, in truth"
    assert TorchBackend(model, [operators], kv_memory=2**24).exact
    sizes = [CHUNK_LENGTHS[0], *TOKEN_TILES, TOKEN_TILES[-1] + 1]  # the last in several tiles, summed by one program
    assert [*dict.fromkeys(operators.longest)][:3] == [*CHUNK_LENGTHS]
    compiled = [*dict.fromkeys(operators.rows)][: len(sizes) + 1]
    assert compiled == [*sizes, Noting.MASKED], "of all products, those for logits among them, and of masked choices"


def test_a_gpu_without_triton(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "slipstream.backend.torch.kernel_operators", None)
    monkeypatch.delattr(slipstream.backend.torch, "kernel_operators", raising=False)
    assert [type(each) for each in operators_for(torch.device("cuda"))] == [PlainOperators]
    assert "without kernels" in caplog.text


@pytest.mark.parametrize("tiny", ["llama"], indirect=True)
def test_a_gpu_that_is_not_there(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match="leave out device"):
        backend_of(tiny, device="cuda")


@pytest.mark.parametrize("tiny", ["llama"], indirect=True)
@pytest.mark.parametrize("error", [RuntimeError, type("CompilationError", (Exception,), {})])
def test_what_was_queued_with_a_step_that_fails_is_nobodys_result(
    tiny: Model, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """A chunk of several steps of which one can't be started, or fails while others are under way."""
    backend = backend_of(tiny)
    backend.step_class = STEPS
    model = backend.model
    model.queues = True
    tokens = random_tokens(900)

    def logits() -> Any:
        state = backend.store.open(60)
        ticket = backend.launch([Chunk(state, tokens[:40], 1)])
        ticket.wait()
        backend.store.release(state)
        return ticket.logits.copy()

    expected, state, compute = logits(), backend.store.open(900), model._compute

    def compute_first(step: Any) -> Any:
        if model._under_way:
            raise error("the device is full")
        return compute(step)

    with monkeypatch.context() as patch:
        patch.setattr(model, "_compute", compute_first)
        with pytest.raises(ModelError, match="full"):
            backend.launch([Chunk(state, tokens, 0)])
    assert np.array_equal(logits(), expected)

    def fail(clock: Any) -> float:
        raise RuntimeError("the device is on fire")

    ticket = backend.launch([Chunk(state, tokens, 0)])
    with monkeypatch.context() as patch:
        patch.setattr(type(model._under_way[0][1]), "seconds", fail)
        with pytest.raises(ModelError, match="on fire"):
            ticket.wait()
    assert np.array_equal(logits(), expected)
