"""Layers with sliding windows have block tables of their own, give blocks back, and keep every bit."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slipstream import EngineConfig
from slipstream.backend import Chunk, self_test
from slipstream.backend.steps import BLOCK_SIZE, ZERO_BLOCK, PagedChunk, StepClass, lay_out
from slipstream.backend.torch import graphs
from slipstream.backend.torch import model as torch_model
from slipstream.backend.torch.backend import TorchBackend
from slipstream.backend.torch.kernel_operators import KernelOperators
from slipstream.backend.torch.layers import seated, windows_of
from slipstream.backend.torch.model import TorchModel
from slipstream.backend.torch.operators import AttentionShape, Operators, Step
from slipstream.backend.torch.plain import PlainOperators
from slipstream.backend.torch.staging import Staging
from slipstream.backend.window_store import WindowState, WindowStore
from slipstream.errors import ModelError
from slipstream.models import Model
from slipstream.runtime import BACKENDS
from slipstream.types import FloatArray, IntArray
from tests.conformance.backends import check_backend
from tests.conformance.windows import check_given_back
from tests.engine import exactness
from tests.torch_backend.test_graphs import FromTensors, Recorder
from tests.torch_backend.tiny import ARCHITECTURES, OTHERS, WINDOW, tiny_folder

pytestmark = pytest.mark.torch
CPU = torch.device("cpu")
STEPS = StepClass((2, 16, 64), (1, 64))
"""Small, so that sequences keep few blocks spare."""
WINDOWED = {"mistral": [WINDOW] * 2, "gemma3_text": [WINDOW, 0, WINDOW], "gpt_oss": [WINDOW, 0]}
OF_OTHERS = {"cohere2": [WINDOW] * 2, "gemma2": [WINDOW, 0], "olmo3": [WINDOW] * 2}
windowed = pytest.mark.parametrize("tiny", WINDOWED, indirect=True)


def tokens(count: int, seed: int = 1) -> IntArray:
    return np.random.default_rng(seed).integers(17, 320, count).astype(np.int32)


def model_of(folder: Path, operators: Operators | None = None) -> TorchModel:
    return TorchModel.load(folder, CPU, operators or PlainOperators())


def backend_of(model: TorchModel) -> TorchBackend:
    return TorchBackend(model, [model.operators], kv_memory=2**24)


@pytest.mark.parametrize("name", [*ARCHITECTURES, *OTHERS])
def test_what_each_layer_sees_is_found_out(name: str, tmp_path: Path) -> None:
    model = model_of(tiny_folder(tmp_path, name, vocabulary=320))
    expected = (WINDOWED | OF_OTHERS).get(name, [0, 0])
    assert windows_of(model._model) == expected
    assert (model.window, model.has_full_attention) == (max(expected), 0 in expected)
    assert model.window_tables == (len(expected) - max(1, expected.count(0)) if any(expected) else 0)


def test_a_window_as_long_as_the_context_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of Ministral 8B is."""
    for window, tables in ((8192, 0), (8191, 1)):
        monkeypatch.setitem(ARCHITECTURES, "mistral", {"sliding_window": window})
        model = model_of(tiny_folder(tmp_path / str(window), "mistral", vocabulary=320))
        assert model.window_tables == tables


def test_layers_lie_side_by_side_in_a_block() -> None:
    assert seated([0, 0, 0]) == [(0, 0), (0, 1), (0, 2)]
    assert seated([9, 9, 0, 9, 9, 0, 9]) == [(1, 0), (1, 1), (0, 0), (2, 0), (2, 1), (0, 1), (3, 0)]
    assert seated([9, 9, 9]) == [(0, 0), (1, 0), (2, 0)]


@pytest.mark.parametrize("name", WINDOWED)
def test_the_tables_change_no_bit(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, text = tiny_folder(tmp_path, name, vocabulary=320), tokens(300)
    found = []
    for one_table in (False, True):
        if one_table:
            monkeypatch.setattr(torch_model, "seated", lambda windows: [(0, layer) for layer in range(len(windows))])
        model = model_of(folder)
        assert bool(model.window_tables) != one_table
        model.allocate(12 * (1 + model.window_tables))
        table = np.arange(1, 12, dtype=np.int32)
        chunks = [PagedChunk(text[at : at + 60], at, table, 2) for at in range(0, 300, 60)]
        found.append([STEPS.run(model, [chunk]).tobytes() for chunk in chunks])
    assert found[0] == found[1]


@pytest.mark.parametrize("name", WINDOWED)
def test_no_bit_depends_on_cuts_neighbours_and_forks(name: str, tmp_path: Path) -> None:
    model = model_of(tiny_folder(tmp_path, name, vocabulary=320))
    model.allocate(self_test.SELF_TEST_BLOCKS * (1 + model.window_tables))
    assert self_test.holds(model, STEPS)


@pytest.mark.parametrize("name", WINDOWED)
def test_blocks_out_of_sight_are_given_back_and_no_bit_changes(name: str, tmp_path: Path) -> None:
    model = model_of(tiny_folder(tmp_path, name, vocabulary=320))
    backend = backend_of(model)
    store = backend.store
    assert isinstance(store, WindowStore)
    state, check = check_given_back(backend, tokens(2000), step=300, nan=0xFFFF)
    blocks, tables = -(-2000 // BLOCK_SIZE), model.window_tables
    rows = sum(_seen(at) for at in range(store.interval, 2000, store.interval)) + _seen(2000)
    assert store.held([state]) == (blocks + tables * rows) * BLOCK_SIZE
    assert rows < blocks / 2
    fork = store.fork(state, 1500, 2000)
    assert 1500 - store.interval < fork.length < 1500
    check(fork, 300)


def _seen(length: int) -> int:
    """Rows that a window sees from a length."""
    return -(-length // BLOCK_SIZE) - (length // BLOCK_SIZE - -(-WINDOW // BLOCK_SIZE))


@pytest.mark.parametrize(
    ("tiny", "as_on_gpu"), [*((name, False) for name in WINDOWED), ("gemma3_text", True)], indirect=["tiny"]
)
def test_the_same_tokens_whatever_happens(tiny: Model, as_on_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    given_back: Counter[str] = Counter()
    drop, recorder = WindowStore._drop, Recorder()

    def counted(store: WindowStore, state: WindowState, dropped: np.ndarray) -> None:
        given_back["rows"] += int((dropped & (state.rows[:, 0] > 0)).sum())
        drop(store, state, dropped)

    def load(model: Model, config: Any) -> Callable[..., TorchBackend]:
        loaded = model_of(model.path, FromTensors() if as_on_gpu else None)
        loaded.queues = as_on_gpu
        if as_on_gpu:
            loaded.record_with(recorder)
        return lambda progress: TorchBackend(loaded, [loaded.operators], kv_memory=config.kv_memory, progress=progress)

    monkeypatch.setattr(graphs, "WORTH", 1)
    monkeypatch.setattr(WindowStore, "_drop", counted)
    monkeypatch.setitem(BACKENDS, "safetensors", load)
    small_steps, seen = exactness.Processor(step_class=STEPS), Counter[str]()
    assert exactness.run(16, 3, tiny, small_steps, longest=800, seen=seen) >= 16
    assert seen["forks before the end"]
    assert given_back["rows"] > 10
    assert bool(recorder.replayed) == as_on_gpu
    backend = load(tiny, EngineConfig.model_validate({"kv_memory": "16MiB"}))(lambda _: None)
    backend.step_class = STEPS
    check_backend(backend, seed=1, longest=300, rounds=3)


@windowed
def test_a_queued_step_that_fails_takes_states_back_to_where_they_can_go_on(
    tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step behind it may have given back what they would see."""
    model = model_of(tiny.path)
    model.queues = True
    backend = backend_of(model)
    backend.step_class = STEPS
    store, text = backend.new_store(1000), tokens(1500)
    state = store.open(1500)

    def compute(end: int, rows: int = 0) -> FloatArray:
        while state.length < end:
            chunk = text[state.length : min(end, state.length + 60)]
            ticket = backend.launch([Chunk(state, chunk, min(rows, len(chunk)))])
            ticket.wait()
        return ticket.logits.copy()

    compute(900)
    tickets = [backend.launch([Chunk(state, text[at : at + 60], 0)]) for at in (900, 960)]
    assert state.length == 1020

    def fail(clock: Any) -> float:
        raise RuntimeError("the device is on fire")

    with monkeypatch.context() as patch:
        patch.setattr(type(model._under_way[0][1]), "seconds", fail)
        for ticket in tickets:
            with pytest.raises(ModelError):
                ticket.wait()
    store.check([state])
    assert 0 < state.length < 900
    found = compute(1000, rows=1)
    store.release(state)
    state = store.open(1500)
    assert np.array_equal(compute(1000, rows=1), found)


def test_the_kernels_take_a_table_of_several() -> None:
    """In which a block of zeros stands for those that no token sees."""
    heads, kv_heads, dim, window = 6, 2, 24, 40
    generator = torch.Generator().manual_seed(0)
    kv = torch.randn(40, 2, kv_heads, BLOCK_SIZE, dim, generator=generator)
    kv[ZERO_BLOCK] = 0
    rows = np.arange(20, 40, dtype=np.int32).reshape(10, 2)
    rows[: (290 - window) // BLOCK_SIZE] = 0
    chunks = [
        PagedChunk(np.ones(3, np.int32), 290, np.arange(2, 12, dtype=np.int32), 1, windows=rows),
        PagedChunk(np.ones(9, np.int32), 0, np.array([12], np.int32), 1, windows=np.array([[13, 14]], np.int32)),
    ]
    step = Step.of(lay_out(chunks, 14, 2, windows=2), BLOCK_SIZE, Staging(CPU))
    query = torch.randn(14, heads, dim, generator=generator)
    found = []
    for table in range(3):
        shape = AttentionShape(0.2, window if table else 0, table=table)
        plain = PlainOperators().attend(query, kv, step, shape, None)
        torch.testing.assert_close(KernelOperators().attend(query, kv, step, shape, None), plain, atol=1e-5, rtol=1e-5)
        found.append(plain)
    assert not torch.equal(found[1], found[2])
