"""An OpenVINO model with paged attention, over KV blocks that are named in each step."""

from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import openvino as ov
from openvino import opset13 as ops
from openvino._offline_transformations import paged_attention_transformation

from slipstream.backend.aligned import zeros_aligned
from slipstream.backend.logits import HostLogits
from slipstream.backend.lowered import ATTENTION, Lowered, Lowering, can_be_lowered, note, open_caches
from slipstream.backend.pages import forget_pages
from slipstream.backend.self_test import OF_PROCESSORS, ROW_COUNTS
from slipstream.backend.slot_memory import SlotMemory
from slipstream.backend.slots import EMPTY_SLOT, FIRST_SLOT, Slots
from slipstream.backend.steps import LONE_TOKEN_SIZE, PagedChunk, StepInputs, lay_out, pieces
from slipstream.backend.store import Blob, Exported
from slipstream.backend.tables import LayerTable, named, set_apart
from slipstream.errors import ModelError, UnsupportedModelError
from slipstream.processor import this_processor
from slipstream.types import IntArray

_SMALL_MODEL_BYTES = 512 * 2**20
"""A larger model is not copied: memory matters more then, and what is saved is less of a step's time."""

_ONE_BY_ONE = {"SNIPPETS_MODE": "DISABLE"}
"""For graphs of one size: the runtime would join their elementwise operations into kernels that round less often than
those for any size, which gives other bits."""


class PagedModel:
    """A stateful OpenVINO IR, turned into paged attention and compiled for the CPU.

    KV is kept in bfloat16 where the machine computes in it, else in float16: the plugin's default, u8, quantises a
    block at a time and would let a rejected draft leave a trace.

    Blocks are numbered from 0; there are none before `allocate`. Raises `ModelError` for a file that can't be read.
    """

    gpu: str | None = None
    candidates = OF_PROCESSORS

    def __init__(self, path: Path, *, threads: int | None = None) -> None:
        self.path = path
        self._core = ov.Core()
        bf16 = "BF16" in self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        self.precision = "bf16" if bf16 else "f16"
        """Of the keys and values."""
        self._options: dict[str, object] = {"KV_CACHE_PRECISION": self.precision, "PERFORMANCE_HINT": "LATENCY"}
        if threads:
            self._options["INFERENCE_NUM_THREADS"] = threads
        self._lowered = self._lower() if can_be_lowered(path) else None
        self._model = self._lowered.graph if self._lowered is not None else self._read()
        compiled = self._compile(self._model)
        self.threads = int(compiled.get_property("INFERENCE_NUM_THREADS"))
        self.vocab_size = int(compiled.output(0).partial_shape[-1].get_length())
        self._inputs, self._names = compiled.inputs, names_of(compiled)
        tables = LayerTable.among(self._names)
        self.window_tables = max((table.row for table in tables), default=0)
        """How many block tables layers with sliding windows have; 0 if they share that of the others."""
        self.queues = False
        self.window = max((table.window for table in tables), default=0)
        """Tokens that those layers see."""
        self.has_full_attention = not any(table.window for table in tables if table.row == 0)
        """Whether some layers see everything."""
        states = SlotMemory(compiled.inputs)
        self.states = states if states.slot_bytes else None
        """The memory of recurrent states, if there are any."""
        self._is_mixture = "is_real" in self._names
        self._any_size = compiled.create_infer_request()
        self._copies: dict[int, ov.InferRequest] = {}
        self._running: tuple[ov.InferRequest, StepInputs]
        self._last_size = 0
        self.runs: Counter[int] = Counter()
        """How many steps there were of each size."""
        self.seconds = 0.0
        """What all steps took."""
        self.allocate(0)
        self.block_bytes = self._kv.block_bytes
        """Memory that a block takes, in all layers that it holds."""

    @property
    def settings(self) -> str:
        """All that decides which kernels compute a step, and how KV is stored."""
        return "; ".join(map(str, [*_machine(), self.threads, self.precision]))

    @property
    def is_small(self) -> bool:
        """Whether there is memory to spare for copies of it."""
        weights = self.path.with_suffix(".bin")
        return weights.exists() and weights.stat().st_size <= _SMALL_MODEL_BYTES

    def compile_copy(self, size: int) -> ov.CompiledModel:
        """A copy for steps of `size` tokens alone; takes seconds, on any thread."""
        copy = self._model.clone()
        copy.reshape({"input_ids": [size], "position_ids": [size]})
        return self._compile(copy, **_ONE_BY_ONE)

    def use_copy(self, size: int, copy: ov.CompiledModel) -> None:
        """Run steps of `size` tokens on a copy from now on: they take less time, and need no preparing."""
        request = copy.create_infer_request()
        self._attach(request)
        self._warm_up(request, size)
        self._copies[size] = request

    def drop_copy(self, size: int) -> None:
        """Run steps of `size` tokens as before there was a copy."""
        del self._copies[size]

    def allocate(self, num_blocks: int) -> None:
        """Have so many blocks, all zero, in place of those before; the system gives memory when they are written."""
        self._kv = _Blocks(self._inputs, num_blocks)
        for request in (self._any_size, *self._copies.values()):
            self._attach(request)
        if num_blocks:
            self._warm_up(self._any_size, LONE_TOKEN_SIZE)

    def give_back_files(self) -> None:
        """Take no memory for the pages of weight files: the kernels have weights in an order of their own.

        What is read from there again, such as the embeddings of a token, comes back page by page.
        """
        forget_pages(self.path.with_suffix(".bin"))

    @property
    def prepared(self) -> set[int]:
        """Sizes of steps that have a copy of their own, and that of the last other step."""
        return {self._last_size, *self._copies}

    def start(self, inputs: StepInputs) -> None:
        """Start a step on the copy for its size; see `Runner.start`. Raises `ModelError` if inference fails."""
        size = len(inputs["input_ids"])
        self.runs[size] += 1
        request = self._copies.get(size)
        if request is None:
            request, self._last_size = self._any_size, size
        give(request, inputs, self._names)
        self._running = request, inputs  # whose arrays the step reads
        request.start_async()

    def finish(self) -> HostLogits:
        """Wait for the step; see `Runner.finish`. Raises `ModelError` if inference fails."""
        request, _ = self._running
        try:
            request.wait()
        except RuntimeError as error:
            raise ModelError(f"the forward pass failed: {error}") from error
        self.seconds += request.latency / 1e3
        return HostLogits(request.get_output_tensor(0).data.reshape(-1, self.vocab_size))

    def copy_block(self, source: int, target: int) -> None:
        """Copy the keys and values of one block to another, in all layers."""
        self._kv.copy(source, target)

    def read_blocks(self, blocks: IntArray) -> Exported:
        """A copy of what the blocks hold, uint16 [blocks, ...]."""
        return Exported.here(self._kv.read(blocks))

    def write_blocks(self, blocks: IntArray, contents: Blob) -> None:
        """Fill blocks with what `read_blocks` gave."""
        self._kv.write(blocks, contents)

    def _read(self) -> ov.Model:
        """The model with paged attention, in which a step names the rows that it wants logits of."""
        try:
            self._core.get_property("CPU", "FULL_DEVICE_NAME")  # the plugin brings operators that a graph may have
            model = self._core.read_model(self.path)
        except RuntimeError as error:
            raise ModelError(f"{self.path} is not a readable OpenVINO model: {error}") from error
        model = paged(model)
        set_apart(model)
        return model

    def _lower(self) -> Lowered | None:
        """The same, after the runtime's passes; None if it can't be had."""
        facts = "; ".join(map(str, [*_machine(), this_processor().cores, *self._options.values()]))
        return Lowering(self._core, self.path, self._options, _sample).lowered(facts, self._read)

    def _compile(self, model: ov.Model, **more: object) -> ov.CompiledModel:
        return self._core.compile_model(model, "CPU", {**self._options, **more})

    def _warm_up(self, request: ov.InferRequest, size: int) -> None:
        """Run a step of padding on a mixture, with as many rows of logits as there ever are.

        A step with more of them than any before it had tokens gave other logits: the runtime moves memory that it has
        yet to read.
        """
        if self._is_mixture:
            inputs = lay_out([], size, ROW_COUNTS[-1], recurrent=self.states is not None, windows=self.window_tables)
            give(request, inputs, self._names)
            request.infer()

    def _attach(self, request: ov.InferRequest) -> None:
        """Let a request compute on the blocks."""
        self._kv.attach(request)
        if self.states is not None:
            self.states.attach(request)


def paged(model: ov.Model) -> ov.Model:
    """A model as it was read, made ready to be compiled: with paged attention, and logits of chosen rows alone."""
    if any(node.get_type_name() == ATTENTION for node in model.get_ops()):
        _note_heads(model)
    else:
        paged_attention_transformation(model)
        _gather_before_vocabulary(model)
    return model


class _Blocks:
    """Keys and values of a model's layers, in lanes: one array for all lanes that have blocks of one size.

    Layers may differ in how many heads they have and how large these are, and keys from values. Layers with tables of
    their own share the lanes of the others; see `LayerTable`.
    """

    def __init__(self, inputs: Sequence[ov.ConstOutput], num_blocks: int) -> None:
        tables = {
            layer: table for table in LayerTable.among(port.any_name for port in inputs) for layer in table.layers
        }
        seated: Counter[tuple[LayerTable | None, str]] = Counter()
        lanes: dict[tuple[str, int], list[tuple[ov.ConstOutput, int]]] = {}
        for port in inputs:
            if "_cache." not in port.any_name:
                continue
            kind, _, layer = port.any_name.partition("_cache.")
            table = tables.get(layer)
            lane = kind, seated[table, kind]
            seated[table, kind] += 1
            lanes.setdefault(lane, []).append((port, table.of if table is not None else 1))
        by_size: dict[int, list[list[tuple[ov.ConstOutput, int]]]] = {}
        for ports in lanes.values():
            port, of = ports[0]
            elements = int(np.prod([size.get_length() for size in list(port.partial_shape)[1:]]))
            by_size.setdefault(elements * of, []).append(ports)
        self.block_bytes = 2 * sum(elements * len(lanes) for elements, lanes in by_size.items())
        """Memory that a block takes, in all lanes."""
        self._groups = [
            (lanes, zeros_aligned((len(lanes), num_blocks, elements))) for elements, lanes in by_size.items()
        ]

    def attach(self, request: ov.InferRequest) -> None:
        """Let a request compute on them."""
        for lanes, arrays in self._groups:
            for ports, storage in zip(lanes, arrays, strict=True):
                for port, of in ports:
                    shape = [len(storage) * of, *(d.get_length() for d in list(port.partial_shape)[1:])]
                    tensor = ov.Tensor(storage.reshape(shape), ov.Shape(shape), port.element_type)
                    request.set_tensor(port.any_name, tensor)

    def copy(self, source: int, target: int) -> None:
        """Copy one block to another."""
        for _, arrays in self._groups:
            arrays[:, target] = arrays[:, source]

    def read(self, blocks: IntArray) -> Blob:
        """A copy of blocks, [blocks, caches, elements], or [blocks, all elements] if caches differ in size."""
        parts = [arrays[:, blocks].swapaxes(0, 1) for _, arrays in self._groups]
        if len(parts) == 1:
            return np.ascontiguousarray(parts[0])
        return np.concatenate([part.reshape(len(blocks), -1) for part in parts], axis=1)

    def write(self, blocks: IntArray, contents: Blob) -> None:
        """Fill blocks with what `read` gave."""
        begin, rows = 0, contents.reshape(len(blocks), -1)
        for _, arrays in self._groups:
            count, _, elements = arrays.shape
            part = rows[:, begin : begin + count * elements].reshape(len(blocks), count, elements)
            arrays[:, blocks] = part.swapaxes(0, 1)
            begin += count * elements


def _sample(compiled: ov.CompiledModel) -> bytes:
    """The bits that a compiled model gives for a few steps, logits and KV."""
    request, names = compiled.create_infer_request(), names_of(compiled)
    windows = max((table.row for table in LayerTable.among(names)), default=0)
    blocks = pieces(np.arange(4, dtype=np.int32), windows).ravel()
    kv = _Blocks(compiled.inputs, blocks.max() + 1)
    kv.attach(request)
    states = SlotMemory(compiled.inputs)
    states.allocate(FIRST_SLOT + 1)
    states.attach(request)
    recurrent, slot = states.slot_bytes > 0, FIRST_SLOT
    table, found, past = np.arange(1, 4, dtype=np.int32), [], 0
    for size in (64, 2, 8):
        tokens = np.arange(past + 1, past + 1 + size, dtype=np.int32)
        slots = Slots(slot if past else EMPTY_SLOT, ((past + size, slot),))
        chunk = PagedChunk(tokens, past, table, 2, slots)
        inputs = lay_out([chunk], size, 8, recurrent=recurrent, windows=windows)  # tensors share its memory
        give(request, inputs, names)
        request.infer()
        found.append(request.get_output_tensor(0).data.tobytes())
        past += size
    state = [states.read(slot).tobytes()] if recurrent else []
    return b"".join((*found, kv.read(blocks).tobytes(), *state))


def give(request: ov.InferRequest, inputs: StepInputs, names: Collection[str]) -> None:
    """Let a request read a step's inputs, those of these names, and the tables of layers that have their own."""
    for name, array in named(inputs, names).items():
        request.set_tensor(name, ov.Tensor(array, shared_memory=name in inputs))


def names_of(compiled: ov.CompiledModel) -> set[str]:
    """The inputs that a model has; mixtures alone ask which tokens are real."""
    return {port.any_name for port in compiled.inputs}


def _machine() -> list[str]:
    """The runtime and the processor: what kernels are chosen by, and what passes make of a graph."""
    processor = this_processor()
    return [ov.get_version(), processor.name, " ".join(processor.instruction_sets)]


def _note_heads(model: ov.Model) -> None:
    """Let the plugin lay out the caches of a model that has paged attention already.

    The shapes of its caches say how many heads there are and how large they are; the plugin wants that as notes on the
    operations, and caches of any shape.
    """
    for node in model.get_ops():
        if node.get_type_name() == ATTENTION:
            for kind, cache in (("k", 3), ("v", 4)):
                _, heads, _, size = node.input_value(cache).get_partial_shape()
                note(node, {f"num_{kind}_heads": heads.get_length(), f"{kind}_head_size": size.get_length()})
    open_caches(model)
    model.validate_nodes_and_infer_types()


def _gather_before_vocabulary(model: ov.Model) -> None:
    """Let only the rows named by a new input `logit_rows` i64 reach the projection to the vocabulary."""
    node = model.get_results()[0].input_value(0).get_node()
    while node.get_type_name() != "MatMul":
        if node.get_input_size() == 0:
            raise UnsupportedModelError("the model's output is not a projection to a vocabulary")
        node = node.input_value(0).get_node()
    rows = ops.parameter([-1], np.int64, name="logit_rows")
    rows.output(0).set_names({"logit_rows"})
    gathered = ops.gather(node.input_value(0), rows, ops.constant(np.int64(0)))
    node.input(0).replace_source_output(gathered.output(0))
    model.add_parameters([rows])
    model.validate_nodes_and_infer_types()
