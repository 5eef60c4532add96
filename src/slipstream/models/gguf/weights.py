"""Tensors of a GGUF file as constants of a graph, compressed as they are in the file."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino as ov
from gguf import GGMLQuantizationType as Kind
from openvino import opset13 as ops

from slipstream.errors import ModelError
from slipstream.models.gguf.families import Decoder
from slipstream.models.gguf.file import GGUF
from slipstream.models.gguf.quantised import Groups, groups_of

Contents = Groups | npt.NDArray[Any]
"""Of tensors: groups of codes, or plain values."""

_PLAIN = {Kind.F32: np.float32, Kind.F16: np.float16, Kind.BF16: np.uint16}


class Weights:
    """The tensors of a file, and which of them a graph has taken.

    Rows of queries and keys come so that the values of a head that are turned together stand half a head apart,
    wherever the family has them: then one form of rotation, which the runtime has a kernel for, serves all.
    """

    def __init__(self, file: GGUF, decoder: Decoder) -> None:
        self._file = file
        self._left = {name for name in file.tensors if not name.startswith("rope_")}
        self._layers = len(decoder.layers)
        self._head_size = decoder.head_size
        rotation = next((layer.rotation for layer in decoder.layers if layer.rotation is not None), None)
        self._latent = decoder.latent
        self._interleaved = 2 * len(rotation.frequencies) if decoder.family.interleaved and rotation else 0

    def __contains__(self, name: str) -> bool:
        return name in self._file.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, innermost last."""
        return self._file.tensors[name].shape

    def array(self, name: str) -> npt.NDArray[np.float32] | None:
        """A norm's weight, a bias, or what else is small; None if there is no such tensor."""
        self._left.discard(name)
        values = self._file.array(name)
        return None if values is None else self._in_halves(name, values)

    def product(self, x: ov.Output, *names: str) -> ov.Output:
        """`x`, [..., tokens, in], times the tensor [..., out, in]; of several tensors, their outputs side by side."""
        return ops.matmul(x, self.matrix(*names), False, True).output(0)

    def matrix(self, *names: str) -> ov.Output:
        """A tensor as float32 [..., out, in], decompressed by the graph; several are stacked along their outputs.

        Raises:
            ModelError: there is no such tensor, or several differ in their quantisation.
        """
        return _constant(*self._contents(names))

    def matrices(self, name: str) -> list[ov.Output]:
        """A tensor [count, out, in] as `count` matrices, each as `matrix` gives one."""
        kind, contents = self._contents((name,))

        def part(number: int) -> Contents:
            return contents.each(lambda rows: rows[number]) if isinstance(contents, Groups) else contents[number]

        return [_constant(kind, part(number)) for number in range(self.shape(name)[0])]

    def check_all_used(self) -> None:
        """Raise `ModelError` if a tensor was left over: the graph would compute another model.

        Layers behind the model's own are those that draft tokens, and may be left.
        """
        unused = sorted(name for name in self._left if not self._is_behind(name))
        if unused:
            raise ModelError(f"the GGUF has tensors that its architecture doesn't know here: {', '.join(unused[:5])}")

    def _contents(self, names: Sequence[str]) -> tuple[Kind, Contents]:
        """Tensors stacked along their outputs: as they are, or as groups of codes if they are quantised."""
        self._left.difference_update(names)
        try:
            tensors = [self._file.tensors[name] for name in names]
        except KeyError as error:
            raise ModelError(f"the GGUF has no tensor {error}: it is not a whole language model") from error
        kind, shape = tensors[0].kind, tensors[0].shape
        if any(tensor.kind != kind for tensor in tensors):
            raise ModelError(f"{' and '.join(names)} differ in their quantisation")
        data = [tensor.read() for tensor in tensors]
        if kind in _PLAIN:
            rows = np.concatenate([each.view(_PLAIN[kind]).reshape(shape) for each in data], axis=-2)
            return kind, self._in_halves(names[0], rows)
        groups = Groups.stacked([groups_of(kind, each, shape) for each in data])
        return kind, groups.each(lambda rows: self._in_halves(names[0], rows))

    def _is_behind(self, name: str) -> bool:
        parts = name.split(".")
        return parts[0] == "blk" and int(parts[1]) >= self._layers

    def _in_halves(self, name: str, rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
        size, turned, first = self._head_size, self._interleaved, 0
        part = name.rsplit(".", 2)[-2]
        if self._latent is not None:
            size = self._latent.rank + turned if part == "attn_kv_a_mqa" else size
            first = size - turned  # behind what isn't turned
        if not turned or part not in ("attn_q", "attn_k", "attn_q_b", "attn_kv_a_mqa"):
            return rows
        order = np.arange(size)
        order[first : first + turned] = first + np.concatenate([np.arange(0, turned, 2), np.arange(1, turned, 2)])
        return rows.reshape(-1, size, *rows.shape[1:])[:, order].reshape(rows.shape)


def _constant(kind: Kind, contents: Contents) -> ov.Output:
    return compressed(contents) if isinstance(contents, Groups) else _plain(contents, kind)


def _plain(values: npt.NDArray[Any], kind: Kind) -> ov.Output:
    if kind == Kind.F32:
        return ops.constant(np.ascontiguousarray(values)).output(0)
    wide = _of_type(ov.Type.bf16 if kind == Kind.BF16 else ov.Type.f16, values.shape, values)
    return ops.convert(wide, "f32").output(0)


def compressed(groups: Groups) -> ov.Output:
    """Weights in the form that the runtime's kernels decompress while they multiply."""
    shape = groups.codes.shape
    if groups.bits == 4:
        pairs = groups.codes.reshape(-1, 2)
        codes = _of_type(ov.Type.u4, shape, pairs[:, 0] | pairs[:, 1] << np.uint8(4))
    else:
        codes = ops.constant(np.ascontiguousarray(groups.codes))
    weight = ops.convert(codes, "f16")
    if groups.zeros is not None:
        weight = ops.subtract(weight, ops.constant(groups.zeros))
    weight = ops.multiply(weight, ops.constant(groups.scales))
    inner = np.array([*shape[:-2], shape[-2] * shape[-1]], np.int64)
    return ops.convert(ops.reshape(weight, ops.constant(inner), False), "f32").output(0)


def _of_type(kind: ov.Type, shape: Sequence[int], contents: npt.NDArray[Any]) -> ov.Node:
    """A constant in memory of its own: the runtime would share that of an array without keeping it."""
    tensor = ov.Tensor(kind, ov.Shape(shape))
    tensor.data[:] = contents.view(tensor.data.dtype).reshape(tensor.data.shape)
    return ops.constant(tensor)
