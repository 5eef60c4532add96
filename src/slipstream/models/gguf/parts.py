"""What layers of every kind are made of: inputs, norms, projections and constants."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino as ov
from openvino import opset13 as ops

from slipstream.models.gguf.families import Decoder
from slipstream.models.gguf.file import GGUF
from slipstream.models.gguf.weights import Weights


class Parts:
    """The inputs and weights of a graph on its way."""

    def __init__(self, file: GGUF, decoder: Decoder) -> None:
        self.decoder = decoder
        self.inputs: dict[str, ov.Node] = {}
        self.weights = Weights(file, decoder)

    def input(self, name: str, shape: Sequence[int], kind: npt.DTypeLike) -> ov.Node:
        """An input of the graph, the same node each time."""
        if name not in self.inputs:
            node = ops.parameter(list(shape), kind, name=name)
            node.output(0).set_names({name})
            self.inputs[name] = node
        return self.inputs[name]

    def norm(self, x: ov.Output, name: str) -> ov.Output:
        """RMS norm over the last axis; `x` itself if there is no such tensor."""
        weight = self.weights.array(name)
        return x if weight is None else ops.multiply(self.normalised(x), weight).output(0)

    def normalised(self, x: ov.Output) -> ov.Output:
        """RMS norm over the last axis, without a weight."""
        squares = ops.reduce_mean(ops.power(x, f32(2)), i64([-1]), True)
        root = ops.sqrt(ops.add(squares, f32(self.decoder.epsilon)))
        return ops.multiply(x, ops.divide(f32(1), root)).output(0)

    def projected(self, x: ov.Output, name: str) -> ov.Output:
        """`x` times a weight, and its bias if there is one."""
        out = self.weights.product(x, f"{name}.weight")
        bias = self.weights.array(f"{name}.bias")
        return out if bias is None else ops.add(out, bias).output(0)

    def activated(self, gate: ov.Output, up: ov.Output) -> ov.Output:
        """What lies between the products of a feed-forward part."""
        kind = self.decoder.family.activation
        if kind == "clamped-silu":  # gpt-oss's: `(up + 1) * gate * sigmoid(1.702 gate)`, both clamped to 7
            gate = ops.swish(ops.minimum(gate, f32(7)), f32(1.702)).output(0)
            up = ops.add(ops.clamp(up, -7, 7), f32(1)).output(0)
            return ops.multiply(up, gate).output(0)
        return ops.multiply(ops.gelu(gate, "tanh") if kind == "gelu" else ops.swish(gate), up).output(0)


def const(value: Any, kind: npt.DTypeLike) -> ov.Node:
    """A constant of a type."""
    return ops.constant(np.asarray(value, kind))


def i64(value: int | Sequence[int]) -> ov.Node:
    """A constant of whole numbers."""
    return const(value, np.int64)


def f32(value: float) -> ov.Node:
    """A constant of one real number."""
    return const(value, np.float32)
