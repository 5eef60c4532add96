"""Layers with sliding windows have block tables of their own, give blocks back, and keep every bit."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops
from openvino.op import _PagedAttentionExtension as PagedAttention

from slipstream.backend import paged_model, self_test
from slipstream.backend.openvino import OpenVINOBackend
from slipstream.backend.paged_model import PagedModel
from slipstream.backend.steps import BLOCK_SIZE, PagedChunk, StepClass, lay_out
from slipstream.backend.tables import LayerTable, set_apart
from slipstream.backend.window_store import WindowState, WindowStore
from slipstream.models import Model, ModelStore
from slipstream.types import FloatArray, IntArray
from slipstream_bench import random_models
from slipstream_bench.random_models import Shape
from tests.conformance.windows import check_given_back
from tests.engine import exactness

WINDOW = 20
SMALL = {kind: Shape(64, 96, 6, 2, 1, 32, 49_152, kind, window=WINDOW) for kind in ("gemma3", "llama")}
"""Of a Gemma 3 five of six layers have windows, of a Mistral all: five tables for either."""
STEPS = StepClass((8, 16, 64), (8,))


@pytest.fixture(scope="module", params=SMALL, ids=["some layers", "all layers"])
def small(model: Model, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Model:
    """A model of random weights of which some layers have windows, or all."""
    folder = tmp_path_factory.mktemp("windows")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(random_models.SHAPES, "small", SMALL[request.param])
        random_models.write("small", folder / "small.gguf")
    return ModelStore(folder / "store").ensure(str(folder / "small.gguf"))


@pytest.fixture(params=[False, True], ids=["as it is", "lowered"])
def paged(small: Model, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> PagedModel:
    monkeypatch.setattr("slipstream.backend.paged_model.can_be_lowered", lambda _: request.param)
    return PagedModel(small.ir_path)


def tokens(count: int, seed: int = 1) -> IntArray:
    return np.random.default_rng(seed).integers(17, 40_000, count).astype(np.int32)


def test_a_block_holds_what_one_layer_keeps_in_full(paged: PagedModel) -> None:
    assert (paged.window_tables, paged.window) == (5, WINDOW)
    assert paged.block_bytes == 2 * 2 * 32 * BLOCK_SIZE


def test_the_tables_change_no_bit(small: Model, paged: PagedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_model, "set_apart", lambda _: None)
    monkeypatch.setattr("slipstream.backend.paged_model.can_be_lowered", lambda _: False)
    one_table = PagedModel(small.ir_path)
    assert one_table.window_tables == 0
    text = tokens(300)
    found = []
    for model in (one_table, paged):
        model.allocate(12 * (1 + model.window_tables))
        table = np.arange(1, 12, dtype=np.int32)
        chunks = [PagedChunk(text[at : at + 60], at, table, 2) for at in range(0, 300, 60)]
        found.append([STEPS.run(model, [chunk]).tobytes() for chunk in chunks])
    assert found[0] == found[1]


def test_no_bit_depends_on_cuts_neighbours_and_forks(paged: PagedModel) -> None:
    paged.allocate(self_test.SELF_TEST_BLOCKS * (1 + paged.window_tables))
    assert self_test.holds(paged, STEPS)


def test_blocks_out_of_sight_are_given_back_and_no_bit_changes(small: Model) -> None:
    model = PagedModel(small.ir_path)
    backend = OpenVINOBackend(model, kv_memory=2**24)
    store = backend.store
    assert isinstance(store, WindowStore)
    state, check = check_given_back(backend, tokens(3000), step=400, nan=0x7FFF)
    blocks = -(-3000 // BLOCK_SIZE)
    rows = 3000 // store.interval + 2
    assert store.held([state]) == (blocks + 5 * rows) * BLOCK_SIZE
    assert store.interval == 4 * BLOCK_SIZE * (5 if model.has_full_attention else 1)
    assert rows < blocks / 3
    fork = store.fork(state, 2000, 3000)
    assert 2000 - store.interval < fork.length < 2000
    check(fork, 300)


def test_a_sequence_is_promised_steps_of_the_class_and_no_larger_ones(small: Model) -> None:
    backend = OpenVINOBackend(PagedModel(small.ir_path), kv_memory=2**24)
    before = backend.new_store(1000).open_cost(10_000)
    backend.step_class = STEPS
    assert backend.new_store(1000).open_cost(10_000) < before


def test_every_token_is_as_computed_afresh(small: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    given_back: Counter[str] = Counter()
    drop = WindowStore._drop

    def counted(store: WindowStore, state: WindowState, dropped: np.ndarray) -> None:
        given_back["rows"] += int((dropped & (state.rows[:, 0] > 0)).sum())
        drop(store, state, dropped)

    monkeypatch.setattr(WindowStore, "_drop", counted)
    seen: Counter[str] = Counter()
    small_steps = exactness.Processor(
        step_class=StepClass(STEPS.sizes, (64,))
    )  # so that sequences keep few blocks spare
    assert exactness.run(30, 1, small, small_steps, longest=500, seen=seen) >= 30
    assert seen["forks before the end"]
    assert given_back["rows"] > 20


# Attention alone: what the kernel does with blocks that no token of a step sees, and layers of several sizes


class Attention:
    """Attention operations of the runtime, each with so many heads and such a window, that all get the same values."""

    def __init__(self, *layers: tuple[int, int], apart: bool = False) -> None:
        sizes = {"past_lens": [-1], "subsequence_begins": [-1], "block_indices": [-1], "block_indices_begins": [-1]}
        self._inputs: list[ov.Node] = []
        step = [self._input(name, shape, np.int32) for name, shape in (*sizes.items(), ("max_context_len", []))]
        nodes = [self._attention(number, *layer, step) for number, layer in enumerate(layers)]
        model = paged_model.paged(ov.Model([ops.result(ops.concat(nodes, 1))], self._inputs, "attention"))
        if apart:
            set_apart(model)
        options = {"KV_CACHE_PRECISION": "f16", "PERFORMANCE_HINT": "LATENCY"}
        self._compiled = ov.Core().compile_model(model, "CPU", options)
        self._request, self._names = self._compiled.create_infer_request(), paged_model.names_of(self._compiled)
        self.tables = LayerTable.among(self._names)

    def _attention(self, number: int, heads: int, window: int, step: Sequence[ov.Node]) -> ov.Output:
        given = [self._input(f"{name}.{number}", [-1, heads * SIZE], np.float32) for name in "qkv"]
        shape = [-1, heads, BLOCK_SIZE, SIZE]
        caches = [self._input(f"{kind}_cache.{number}", shape, np.float16) for kind in ("key", "value")]
        none_i, none_f, zero = (ops.constant(np.array(*each)) for each in (([], "i4"), ([], "f4"), (0, "i4")))
        scale, seen = ops.constant(np.float32(SIZE**-0.5)), ops.constant(np.int32(window))
        sinks, no_bytes = ops.constant(np.zeros((0, 0, 0, 0), np.float32)), ops.constant(np.array([], np.uint8))
        nodes = [*given, *caches, *step[:4], scale, seen, none_f, step[4], none_i, none_i, none_i, none_f, none_f]
        nodes += [zero, zero, sinks, zero, none_i, none_i, none_i, none_i, no_bytes, none_i]
        return PagedAttention([each.output(0) for each in nodes]).output(0)

    def _input(self, name: str, shape: Sequence[int], kind: type) -> ov.Node:
        node = ops.parameter(list(shape), kind, name=name)
        node.output(0).set_names({name})
        self._inputs.append(node)
        return node

    def run(self, past: int, count: int, hidden: Sequence[int] = (), fill: float = 0.0) -> bytes:
        """What `count` tokens see after `past`, where the table names for `hidden` blocks one that is filled so."""
        values = np.random.default_rng(past).normal(size=(past + count, 2 * SIZE)).astype(np.float32)
        last, windows = -(-(past + count) // BLOCK_SIZE) + 1, max((table.row for table in self.tables), default=0)
        kv = paged_model._Blocks(self._compiled.inputs, (last + 1) * (1 + windows))
        kv.attach(self._request)
        table = np.arange(1, last, dtype=np.int32)
        self._step(values[:past], 0, table, windows)
        if hidden:
            contents = kv.read(table[:1])
            kv.write(np.array([last], np.int32), np.full_like(contents, self._word(fill)))
            table[list(hidden)] = last
        return self._step(values[past:], past, table, windows)

    def _word(self, value: float) -> int:
        """A number as keys and values are kept."""
        (kind,) = {port.element_type for port in self._compiled.inputs if "_cache." in port.any_name}
        half = kind == ov.Type.f16
        return int(np.float16(value).view(np.uint16)) if half else int(np.float32(value).view(np.uint32)) >> 16

    def _step(self, values: FloatArray, past: int, table: IntArray, windows: int) -> bytes:
        chunk = PagedChunk(np.zeros(len(values), np.int32), past, table, 1)
        inputs = lay_out([chunk], max(2, len(values)), 1, windows=windows)
        paged_model.give(self._request, inputs, self._names)
        for node in self._inputs:
            name, _, number = node.get_friendly_name().partition(".")
            if name in "qkv":
                width = node.get_partial_shape()[1].get_length()
                own = values[:, :width] * np.float32({"q": 0.3, "k": 0.5, "v": 1.0}[name] + 0.1 * int(number))
                own = np.resize(own, (max(2, len(own)), width))
                self._request.set_tensor(node.get_friendly_name(), ov.Tensor(own))
        self._request.infer()
        found: bytes = self._request.get_output_tensor(0).data.tobytes()
        return found


SIZE = 32
"""Of a head."""


@pytest.mark.parametrize("layers", ["full and half", "half and full", "alike", "few windows"])
def test_layers_of_all_sizes_find_their_keys_and_values(layers: str) -> None:
    """Gemma 4's layers without windows have blocks half as large as the others'."""
    full, windowed = {"full and half": ((2, 0), (1, 50)), "half and full": ((1, 0), (2, 50))}.get(
        layers, ((2, 0), (2, 50))
    )
    kinds = [full, *[windowed] * 3] * (1 if layers == "alike" else 2) + [full] * 3
    if layers == "few windows":
        kinds = [full, windowed, full, full]
    alone, apart = Attention(*kinds), Attention(*kinds, apart=True)
    assert apart.tables
    for past, count in ((33, 3), (100, 60), (200, 2)):
        assert apart.run(past, count) == alone.run(past, count)


@pytest.mark.parametrize("window", [64, 50])
def test_blocks_outside_the_window_are_read_for_nothing_but_must_hold_numbers(window: int) -> None:
    """So tables name a block of zeros for them."""
    attention, past = Attention((2, window)), 200
    outside = (past - window + 1) // BLOCK_SIZE
    for count in (1, 2, 16, 90):
        expected = attention.run(past, count)
        assert all(attention.run(past, count, range(outside), fill) == expected for fill in (0.0, 1.0, -300.0))
        assert attention.run(past, count, range(outside + 1), 0.0) != expected, "the next one is seen"
        assert attention.run(past, count, range(outside), np.nan) != expected
