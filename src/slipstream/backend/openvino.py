"""OpenVINO backend: paged attention over KV blocks that the engine hands out."""

import bisect
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import numpy as np
import numpy.typing as npt
import openvino as ov
from openvino import opset13 as ops
from openvino._offline_transformations import paged_attention_transformation

from slipstream.backend.base import BlockContents, FloatArray, IntArray, Piece, StepMeasurements
from slipstream.errors import ModelError, UnsupportedModelError

BLOCK_SIZE = 32
"""KV slots per block: what OpenVINO's paged attention kernel for CPUs is written for."""

SCRATCH_BLOCK = 0
"""Takes the KV of padding tokens; its content is never read by a real token."""

# A step whose token count differs from the one before costs about 5 ms of preparation, and a count never seen about
# 8 ms more. So steps come in these sizes only; padding is at most an eighth of a large step.
STEP_SIZES = (
    *(2, 8, 16, 24),
    *range(32, 256, 16),
    *range(256, 513, 64),
)
ROW_COUNTS = (1, 2, 4, 8, 16, 32, 64)

_FIXED_SIZES = (2, 8, 16)
"""Those of steps that decode for one or two conversations: of a small model there is a copy for each, compiled for
that size alone. Its steps take 2 to 3 ms less, and need no preparing between the large steps of prompts."""
_SMALL_MODEL_BYTES = 512 * 2**20
"""A larger model is not copied: memory matters more then, and what is saved is less of a step's time."""

_TIMED_SIZES = (2, 16, 64, 128, 512)
"""What other sizes take is read off between these."""
_TIMED_RUNS = 3
_MEASURED_CONTEXT = 2048
"""Tokens of context at which it is measured what contexts cost."""

_ALIGNMENT = 64

_Inputs = dict[str, npt.NDArray[np.int32 | np.int64]]
"""A step as the model takes it, by name."""


class OpenVINOBackend:
    """A stateful OpenVINO IR, turned into paged attention and compiled for the CPU.

    `num_blocks` bounds the KV memory; pages of it become resident when first written. KV is kept in bfloat16 where the
    machine computes in it, else in float16: the plugin's default, u8, quantises a block at a time and would let a
    rejected draft leave a trace. Raises `UnsupportedModelError` for a model whose layers differ in KV shape.
    """

    def __init__(self, ir_path: Path, *, kv_memory: int, threads: int | None = None) -> None:
        core = ov.Core()
        try:
            model = core.read_model(ir_path)
        except RuntimeError as error:
            raise ModelError(f"{ir_path} is not a readable OpenVINO model: {error}") from error
        paged_attention_transformation(model)
        _gather_before_vocabulary(model)
        bf16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        options: dict[str, object] = {
            "KV_CACHE_PRECISION": "bf16" if bf16 else "f16",
            "PERFORMANCE_HINT": "LATENCY",
        }
        if threads:
            options["INFERENCE_NUM_THREADS"] = threads
        small = ir_path.with_suffix(".bin").stat().st_size <= _SMALL_MODEL_BYTES
        fixed = _FIXED_SIZES if small else ()
        with ThreadPoolExecutor() as pool:  # a compilation doesn't use all cores
            models = [model, *(_for_size(model, size) for size in fixed)]
            compiled, *copies = pool.map(lambda each: core.compile_model(each, "CPU", options), models)
        self._any_size = compiled.create_infer_request()
        self._one_size = {size: copy.create_infer_request() for size, copy in zip(fixed, copies, strict=True)}
        self._last_size = 0
        settings = [
            ov.get_version(),
            core.get_property("CPU", "FULL_DEVICE_NAME"),
            compiled.get_property("INFERENCE_NUM_THREADS"),
            options["KV_CACHE_PRECISION"],
        ]
        self.fingerprint = "; ".join(map(str, settings))

        self.vocab_size = int(compiled.output(0).partial_shape[-1].get_length())
        self.block_size = BLOCK_SIZE
        caches = [port for port in compiled.inputs if "_cache." in port.any_name]
        self.block_bytes = len(caches) * 2 * _block_elements(caches)
        self.num_blocks = kv_memory // self.block_bytes - 1
        if self.num_blocks < 2:
            raise ModelError(
                f"KV memory of {kv_memory:,} bytes holds no two blocks of {self.block_bytes:,}: raise --kv-memory"
            )
        self._kv = _zeros_aligned((len(caches), self.num_blocks + 1, _block_elements(caches)))
        for storage, port in zip(self._kv, caches, strict=True):
            shape = [self.num_blocks + 1, *(d.get_length() for d in list(port.partial_shape)[1:])]
            tensor = ov.Tensor(storage.reshape(shape), ov.Shape(shape), port.element_type)
            for request in (self._any_size, *self._one_size.values()):
                request.set_tensor(port.any_name, tensor)

    def forward(self, pieces: Sequence[Piece]) -> FloatArray:
        """Run one step; see `Backend.forward`. Raises `ModelError` when inference fails."""
        inputs, rows = _pack(pieces)
        return self._infer(inputs)[:rows]

    @property
    def prepared(self) -> Collection[int]:
        """Sizes of steps that have a copy of their own, and that of the last other step."""
        return {self._last_size, *self._one_size}

    def copy_block(self, source: int, target: int) -> None:
        """Copy the keys and values of one block to another, in all layers."""
        self._kv[:, target] = self._kv[:, source]

    def read_blocks(self, blocks: IntArray) -> BlockContents:
        """A copy of what the blocks hold, uint16 [blocks, layers * 2, elements]."""
        return np.ascontiguousarray(self._kv[:, blocks].swapaxes(0, 1))

    def write_blocks(self, blocks: IntArray, contents: BlockContents) -> None:
        """Fill blocks with what `read_blocks` gave."""
        self._kv[:, blocks] = contents.swapaxes(0, 1)

    def warm_up(self, progress: Callable[[float], None] | None = None) -> StepMeasurements:
        """Run each copy and time some step sizes, on the scratch block; see `Backend.warm_up`."""
        tokens = np.zeros(STEP_SIZES[-1], np.int32)
        scratch = np.full((_MEASURED_CONTEXT + STEP_SIZES[-1]) // BLOCK_SIZE + 1, SCRATCH_BLOCK, np.int32)

        def run(size: int, past: int = 0) -> float:
            started = time.perf_counter()
            self._infer(_pack([Piece(tokens[:size], past, scratch, 1)])[0])
            return time.perf_counter() - started

        def shortest(size: int, past: int = 0) -> float:
            return min(run(size, past) for _ in range(_TIMED_RUNS))  # the first prepares the size

        timed = {}
        sizes = sorted({*_TIMED_SIZES, *self._one_size})
        for done, size in enumerate(sizes, start=1):
            timed[size] = shortest(size)
            if progress is not None:
                progress(done / len(sizes))
        small, _, large, larger, _ = _TIMED_SIZES
        alternating = min(run(large) + run(larger) for _ in range(_TIMED_RUNS))
        change = max(0.0, alternating - timed[large] - timed[larger]) / 2
        added = [shortest(size, _MEASURED_CONTEXT) - timed[size] for size in (small, large)]
        per_pair = max(0.0, added[1] - added[0]) / (large - small) / _MEASURED_CONTEXT
        per_context = max(0.0, added[0] / _MEASURED_CONTEXT - small * per_pair)
        seconds = np.interp(STEP_SIZES, list(timed), list(timed.values()))
        return StepMeasurements(tuple(zip(STEP_SIZES, seconds.tolist(), strict=True)), change, per_context, per_pair)

    def _infer(self, inputs: _Inputs) -> FloatArray:
        """Run a step on the copy for its size; a row of logits for each of `logit_rows`."""
        size = len(inputs["input_ids"])
        request = self._one_size.get(size)
        if request is None:
            request, self._last_size = self._any_size, size
        for name, array in inputs.items():
            request.set_tensor(name, ov.Tensor(array, shared_memory=True))
        try:
            request.infer()
        except RuntimeError as error:
            raise ModelError(f"the forward pass failed: {error}") from error
        logits: FloatArray = request.get_output_tensor(0).data.reshape(-1, self.vocab_size)
        return logits


def _pack(pieces: Sequence[Piece]) -> tuple[_Inputs, int]:
    """Lay the pieces out as the model's inputs; also returns how many logit rows are wanted.

    A piece of one token takes another kernel than longer ones and gives other logits, so it gets a dummy second
    token: its KV slot is overwritten later, its logits are not read. What is missing to the next step size is a
    sequence of dummies in the scratch block. Both were measured to leave every other logit as it is, to the bit.
    """
    lengths = [max(2, len(piece.tokens)) for piece in pieces]
    pasts = [piece.past for piece in pieces]
    total = sum(lengths)
    size = _bucket(STEP_SIZES, total)
    input_ids = np.zeros(size, np.int64)
    position_ids = np.zeros(size, np.int64)
    wanted: list[int] = []
    tables: list[IntArray] = []
    begin = 0
    for piece, length in zip(pieces, lengths, strict=True):
        real = len(piece.tokens)
        input_ids[begin : begin + real] = piece.tokens
        position_ids[begin : begin + length] = np.arange(piece.past, piece.past + length)
        wanted.extend(range(begin + real - piece.logit_rows, begin + real))
        tables.append(piece.block_table[: -(-(piece.past + length) // BLOCK_SIZE)])
        begin += length
    if padding := size - total:
        position_ids[total:] = np.arange(padding)
        lengths.append(padding)
        pasts.append(0)
        tables.append(np.full(-(-padding // BLOCK_SIZE), SCRATCH_BLOCK, np.int32))
    rows = np.full(_bucket(ROW_COUNTS, len(wanted)), wanted[-1] if wanted else 0, np.int64)
    rows[: len(wanted)] = wanted
    inputs: _Inputs = {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "past_lens": np.array(pasts, np.int32),
        "subsequence_begins": _offsets(lengths),
        "block_indices": np.concatenate(tables, dtype=np.int32),
        "block_indices_begins": _offsets([len(table) for table in tables]),
        "max_context_len": np.array(max(p + n for p, n in zip(pasts, lengths, strict=True)), np.int32),
        "logit_rows": rows,
    }
    return inputs, len(wanted)


def _bucket(sizes: Sequence[int], count: int) -> int:
    """The smallest of the rising `sizes` that holds `count`, or `count` itself beyond them."""
    index = bisect.bisect_left(sizes, count)
    return sizes[index] if index < len(sizes) else count


def _offsets(lengths: Sequence[int]) -> IntArray:
    return np.fromiter(chain((0,), lengths), np.int32, len(lengths) + 1).cumsum(dtype=np.int32)


def _for_size(model: ov.Model, size: int) -> ov.Model:
    """A model for steps of `size` tokens alone; it shares the weights until it is compiled."""
    copy = model.clone()
    copy.reshape({"input_ids": [size], "position_ids": [size]})
    return copy


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


def _block_elements(caches: Sequence[ov.ConstOutput]) -> int:
    """Elements in one block of one key or value cache, the same in all layers."""
    sizes = {tuple(d.get_length() for d in list(port.partial_shape)[1:]) for port in caches}
    if len({int(np.prod(size)) for size in sizes}) != 1:
        raise UnsupportedModelError(f"the model's layers differ in the shape of their KV cache: {sorted(sizes)}")
    return int(np.prod(sizes.pop()))


def _zeros_aligned(shape: tuple[int, ...]) -> npt.NDArray[np.uint16]:
    """Zeroed 16-bit storage whose first element starts a cache line; pages become resident when written."""
    count = int(np.prod(shape))
    raw = np.zeros(count * 2 + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + count * 2].view(np.uint16).reshape(shape)
