"""Blocks of quantised weights, taken apart into codes and scales.

The layouts are those of ggml's block types. A weight is `(code - zero) * scale`, with one scale and one zero for each
group of codes. Codes and groups stay as they are in the file, so a weight takes as much memory as there. Only what
multiplies is rounded: to float16, the precision that the files have themselves.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Groups:
    """Rows of weights as groups of codes: `(codes - zeros) * scales`."""

    codes: npt.NDArray[np.int8] | npt.NDArray[np.uint8]
    """[..., groups, codes of a group]."""
    scales: npt.NDArray[np.float16]
    """[..., groups, 1]."""
    zeros: npt.NDArray[np.float16] | None
    """[..., groups, 1]; None stands for zero."""

    def each(self, change: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]) -> "Groups":
        """With what `change` makes of codes, scales and zeros."""
        return Groups(change(self.codes), change(self.scales), None if self.zeros is None else change(self.zeros))

    @classmethod
    def stacked(cls, groups: Sequence["Groups"]) -> "Groups":
        """Those of several tensors, one below the other."""
        zeros = [each.zeros for each in groups if each.zeros is not None]
        return cls(
            np.concatenate([each.codes for each in groups], axis=-3),
            np.concatenate([each.scales for each in groups], axis=-3),
            np.concatenate(zeros, axis=-3) if zeros else None,
        )

    @property
    def bits(self) -> int:
        """Of a code in memory: 4 or 8."""
        return 4 if self.codes.dtype == np.uint8 and self.codes.max(initial=0) < 16 else 8


def is_exact(kind: GGMLQuantizationType) -> bool:
    """Whether weights of this kind keep their codes; others are quantised anew, to 8 bits."""
    return kind in _LAYOUTS


def remarks(kinds: Iterable[GGMLQuantizationType]) -> list[str]:
    """What a user should know of weights of these kinds: which take more memory than in the file, or change."""
    quantised = sorted({kind for kind in kinds if kind not in _PLAIN}, key=lambda kind: kind.name)
    anew = [kind.name for kind in quantised if not is_exact(kind)]
    wider = [kind.name for kind in quantised if kind in _UNEVEN]
    found = []
    if anew:
        names = ", ".join(anew)
        found.append(f"weights in {names} are quantised anew, to 8 bits: they change a little, and take more memory")
    if wider:
        found.append(f"weights in {', '.join(wider)} take 8 bits each: more memory than in the file")
    return found


def groups_of(kind: GGMLQuantizationType, data: Bytes, shape: tuple[int, ...]) -> Groups:
    """The groups in the bytes of a tensor, whose `shape` has the rows' length last.

    A kind whose layout isn't known here is dequantised and quantised anew: to 8 bits, in groups of 32.
    """
    _, size = GGML_QUANT_SIZES[kind]
    blocks = data.reshape(-1, size)
    if kind in _LAYOUTS:
        codes, scales, minima = _LAYOUTS[kind](blocks)
    else:
        codes, scales, minima = _quantised_anew(dequantize(data, kind))
    groups = codes.reshape(*shape[:-1], -1, codes.shape[-1])
    scales = scales.reshape(*groups.shape[:-1], 1)
    if minima is None:
        return Groups(groups, scales.astype(np.float16), None)
    minima = minima.reshape(scales.shape)
    # A group without spread has a minimum alone, or a scale that float16 can't tell from none.
    flat = np.abs(minima) > 6e4 * np.abs(scales)
    zeros = np.divide(minima, scales, out=np.zeros_like(scales), where=~flat & (scales != 0))
    return Groups(
        np.where(flat, np.uint8(1), groups),
        np.where(flat, -minima, scales).astype(np.float16),
        zeros.astype(np.float16),
    )


_Parts = tuple[npt.NDArray[np.int8] | npt.NDArray[np.uint8], Floats, Floats | None]
"""Codes [blocks, groups, codes], scales and minima [blocks, groups]: a weight is `code * scale - minimum`."""


def _half(blocks: Bytes, at: int) -> Floats:
    """The float16 at a byte of each block, [blocks, 1]."""
    return blocks[:, at : at + 2].copy().view(np.float16).astype(np.float32)


def _nibbles(packed: Bytes, width: int) -> Bytes:
    """Codes of 4 bits: of each `width` bytes first all low halves, then all high ones; [blocks, codes]."""
    parts = packed.reshape(len(packed), -1, 1, width) >> np.array([0, 4], np.uint8).reshape(1, 1, 2, 1)
    return (parts & np.uint8(15)).reshape(len(packed), -1)


def _bits(packed: Bytes, width: int, bits: int) -> Bytes:
    """Codes of 1 or 2 bits that bytes hold `width` apart; [blocks, codes]."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8).reshape(1, 1, -1, 1)
    parts = packed.reshape(len(packed), -1, 1, width) >> shifts
    return (parts & np.uint8((1 << bits) - 1)).reshape(len(packed), -1)


def _fifth_bits(blocks: Bytes, at: int) -> Bytes:
    """One bit for each of 32 codes, from a little-endian word at a byte of each block."""
    return np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little")


def _q8_0(blocks: Bytes) -> _Parts:
    return blocks[:, None, 2:].view(np.int8), _half(blocks, 0), None


def _q4_0(blocks: Bytes) -> _Parts:
    scale = _half(blocks, 0)
    return _nibbles(blocks[:, 2:], 16)[:, None], scale, 8 * scale


def _q4_1(blocks: Bytes) -> _Parts:
    return _nibbles(blocks[:, 4:], 16)[:, None], _half(blocks, 0), -_half(blocks, 2)


def _q5_0(blocks: Bytes) -> _Parts:
    codes = _nibbles(blocks[:, 6:], 16) | _fifth_bits(blocks, 2) << 4
    return (codes.astype(np.int8) - 16)[:, None].astype(np.int8), _half(blocks, 0), None


def _q5_1(blocks: Bytes) -> _Parts:
    codes = _nibbles(blocks[:, 8:], 16) | _fifth_bits(blocks, 4) << 4
    return codes[:, None], _half(blocks, 0), -_half(blocks, 2)


def _six_bit_pairs(packed: Bytes) -> tuple[Bytes, Bytes]:
    """Eight scales and eight minima of 6 bits each, from the 12 bytes that hold them."""
    first, second, mixed = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([first & 63, (mixed & 15) | (first >> 6) << 4], axis=1)
    minima = np.concatenate([second & 63, (mixed >> 4) | (second >> 6) << 4], axis=1)
    return scales, minima


def _q4_k(blocks: Bytes) -> _Parts:
    scales, minima = _six_bit_pairs(blocks[:, 4:16])
    codes = _nibbles(blocks[:, 16:], 32).reshape(-1, 8, 32)
    return codes, _half(blocks, 0) * scales, _half(blocks, 2) * minima


def _q5_k(blocks: Bytes) -> _Parts:
    scales, minima = _six_bit_pairs(blocks[:, 4:16])
    codes = _nibbles(blocks[:, 48:], 32) | _bits(blocks[:, 16:48], 32, 1) << 4
    return codes.reshape(-1, 8, 32), _half(blocks, 0) * scales, _half(blocks, 2) * minima


def _q6_k(blocks: Bytes) -> _Parts:
    codes = _nibbles(blocks[:, :128], 64) | _bits(blocks[:, 128:192], 32, 2) << 4
    scales = blocks[:, 192:208].view(np.int8).astype(np.float32)
    return (codes.astype(np.int8) - 32).astype(np.int8).reshape(-1, 16, 16), _half(blocks, 208) * scales, None


def _q3_k(blocks: Bytes) -> _Parts:
    high = _bits(blocks[:, :32], 32, 1)
    codes = (_bits(blocks[:, 32:96], 32, 2) | high << 2).astype(np.int8) - 4
    packed = blocks[:, 96:108]
    scales = _nibbles(packed[:, :8], 8) | _bits(packed[:, 8:], 4, 2) << 4
    return codes.astype(np.int8).reshape(-1, 16, 16), _half(blocks, 108) * (scales.astype(np.float32) - 32), None


def _q2_k(blocks: Bytes) -> _Parts:
    codes, scales = _bits(blocks[:, 16:80], 32, 2).reshape(-1, 16, 16), blocks[:, :16]
    return codes, _half(blocks, 80) * (scales & 15), _half(blocks, 82) * (scales >> 4)


_IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)
_FP4 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)
"""Twice the values of 4-bit floats (E2M1)."""


def _iq4_nl(blocks: Bytes) -> _Parts:
    return _IQ4[_nibbles(blocks[:, 2:], 16)][:, None], _half(blocks, 0), None


def _iq4_xs(blocks: Bytes) -> _Parts:
    low = _nibbles(blocks[:, 4:8].reshape(-1, 1), 1).reshape(-1, 8)
    high = _bits(blocks[:, 2:4].reshape(-1, 1), 1, 2).reshape(-1, 8)
    scales = (low | high << 4).astype(np.float32) - 32
    return _IQ4[_nibbles(blocks[:, 8:], 16)].reshape(-1, 8, 32), _half(blocks, 0) * scales, None


def _mxfp4(blocks: Bytes) -> _Parts:
    return _FP4[_nibbles(blocks[:, 1:], 16)][:, None], np.ldexp(0.5, blocks[:, :1].astype(np.int32) - 127), None


_LAYOUTS: dict[GGMLQuantizationType, Callable[[Bytes], _Parts]] = {
    GGMLQuantizationType.Q8_0: _q8_0,
    GGMLQuantizationType.Q4_0: _q4_0,
    GGMLQuantizationType.Q4_1: _q4_1,
    GGMLQuantizationType.Q5_0: _q5_0,
    GGMLQuantizationType.Q5_1: _q5_1,
    GGMLQuantizationType.Q2_K: _q2_k,
    GGMLQuantizationType.Q3_K: _q3_k,
    GGMLQuantizationType.Q4_K: _q4_k,
    GGMLQuantizationType.Q5_K: _q5_k,
    GGMLQuantizationType.Q6_K: _q6_k,
    GGMLQuantizationType.IQ4_NL: _iq4_nl,
    GGMLQuantizationType.IQ4_XS: _iq4_xs,
    GGMLQuantizationType.MXFP4: _mxfp4,
}


_UNEVEN = {GGMLQuantizationType.IQ4_NL, GGMLQuantizationType.IQ4_XS, GGMLQuantizationType.MXFP4}
"""Kinds of 4 bits whose steps are uneven, so that they are kept in 8."""
_PLAIN = {GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16}


def _quantised_anew(weights: Floats) -> _Parts:
    """8 bits around zero, in groups of 32."""
    groups = weights.reshape(-1, 1, 32)
    scales = np.abs(groups).max(axis=-1, keepdims=True) / 127
    codes = np.rint(np.divide(groups, scales, out=np.zeros_like(groups), where=scales > 0))
    return codes.astype(np.int8), scales[..., 0], None
