"""The floor under a turn: what this machine takes to read the weights and to multiply with them, and nothing else.

A turn has to compute its delta, in one pass, and the tokens that its grammar leaves open, in one pass each. A pass
reads all weights and the KV of the context from memory. It multiplies each of its tokens with the weights, and each
query with the keys and values of its context. It takes as long as the slower of the two. Padding, whatever is not a
product of matrices, sampling, HTTP and templates count for nothing.
"""

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openvino as ov
from openvino import opset13 as ops

from slipstream_bench.records import FloorRates

_STREAM_BYTES = 256 * 2**20
"""For each core; far more than caches hold."""
_MATRIX = 2048
_REPEATS = 20
_KV_ELEMENT_BYTES = 2


def measure(ir_path: Path) -> FloorRates:
    """The machine's best rates, and what a pass of the model needs; takes some seconds of all cores."""
    rates = {"bytes_per_second": _read_rate(), "operations_per_second": _matrix_rate()}
    return FloorRates.model_validate({**rates, **_needs(ir_path)})


def pass_seconds(rates: FloorRates, tokens: int, context: int) -> float:
    """The least time for a pass over the last so many tokens of a context, with the logits of the last one."""
    size = rates.layer_bytes + rates.head_bytes + context * rates.kv_bytes_per_token
    pairs = tokens * (context - (tokens - 1) / 2)
    operations = 2 * (rates.layer_weights * tokens + rates.head_weights) + rates.operations_per_pair * pairs
    return max(size / rates.bytes_per_second, operations / rates.operations_per_second)


def turn_seconds(rates: FloorRates, *, delta: int, free: int, context: int) -> float:
    """The least time for a turn whose prompt ends at `context`: a pass over the delta, and one for each free token."""
    return pass_seconds(rates, delta, context) + free * pass_seconds(rates, 1, context)


def _read_rate() -> float:
    """Bytes a second that all cores together read from memory."""
    cores = len(os.sched_getaffinity(0))
    parts = [np.ones(_STREAM_BYTES // 8, np.int64) for _ in range(cores)]
    with ThreadPoolExecutor(cores) as pool:
        best = _best(lambda: list(pool.map(np.bitwise_or.reduce, parts)))
    return cores * _STREAM_BYTES / best


def _matrix_rate() -> float:
    """Operations a second in a large matrix product in bf16, as the runtime computes it."""
    left = ops.parameter([_MATRIX, _MATRIX], np.float32)
    right = ops.constant(np.ones((_MATRIX, _MATRIX), np.float32))
    product = ov.Model([ops.matmul(left, right, False, False)], [left], "product")
    request = ov.Core().compile_model(product, "CPU", {"INFERENCE_PRECISION_HINT": "bf16"}).create_infer_request()
    request.set_input_tensor(ov.Tensor(np.ones((_MATRIX, _MATRIX), np.float32)))
    return 2 * _MATRIX**3 / _best(request.infer)


def _best(work: Callable[[], object]) -> float:
    """The least seconds of some runs: others on the machine can only slow it down."""
    seconds = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _needs(ir_path: Path) -> dict[str, int]:
    """Bytes and weights of the model's matrices, KV bytes of a token, and operations of attention."""
    core = ov.Core()
    core.get_property("CPU", "FULL_DEVICE_NAME")  # the plugin brings paged attention
    model = core.read_model(ir_path)
    vocabulary = int(model.output("logits").partial_shape[-1].get_length())
    needs = dict.fromkeys(("layer_bytes", "layer_weights", "head_bytes", "head_weights", "kv_bytes_per_token"), 0)
    needs["operations_per_pair"] = 0
    for node in model.get_ops():
        if node.get_type_name() == "MatMul" and (shape := node.input(1).get_partial_shape()).is_static:
            part = "head" if vocabulary in (rows_and_columns := list(shape.to_shape())) else "layer"
            needs[f"{part}_weights"] += int(np.prod(rows_and_columns))
            needs[f"{part}_bytes"] += sum(_constants(node.input_value(1).get_node()))
        elif node.get_type_name() == "ReadValue" or (
            node.get_type_name() == "Parameter" and "_cache." in node.get_friendly_name()
        ):
            _, heads, _, size = node.output(0).get_partial_shape()
            needs["kv_bytes_per_token"] += heads.get_length() * size.get_length() * _KV_ELEMENT_BYTES
        elif node.get_type_name() == "PagedAttentionExtension":
            needs["operations_per_pair"] += 2 * 2 * node.input(0).get_partial_shape()[1].get_length()
        elif node.get_type_name() == "ScaledDotProductAttention":
            _, heads, _, size = node.input(0).get_partial_shape()
            needs["operations_per_pair"] += 2 * 2 * heads.get_length() * size.get_length()
    return needs


def _constants(node: ov.Node) -> Iterator[int]:
    """Bytes of the constants that a matrix is unpacked from."""
    if node.get_type_name() == "Constant":
        yield node.get_byte_size()
    for source in node.input_values():
        yield from _constants(source.get_node())
