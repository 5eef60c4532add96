"""A weight as the kernels of products take it, and what they are compiled for then."""

from dataclasses import dataclass
from functools import cache
from math import gcd
from typing import Any

import torch

from slipstream.backend.torch.operators import Tensor
from slipstream.backend.torch.quantised import Quantised, Weight

BLOCK_N, BLOCK_K, QUANTISED_K = 64, 64, 128
"""Of products: rows of the weight in a tile, and columns, or those of a quantised one, whose tiles have fewer bytes."""
_MOST_SPANNED = QUANTISED_K // 2
"""Of these, those that share a scale; if all did, Triton would load it for each."""
_MOST_STAGES, _STAGED_BYTES = 5, 72 << 10
"""Tiles under way, and the shared memory that they may take. A small step is done when the weights are read, and that
is as fast as many bytes are under way. No GPU that Triton supports has less than 99 KiB."""

OPTIONS: dict[str, Any] = {"enable_fp_fusion": False} | ({"matrix_instr_nonkdim": 16} if torch.version.hip else {})
"""Of the compiler. It must not choose where a product and a sum become one operation with one rounding; and AMD's takes
another matrix instruction for other tiles, unless it is told which."""


@dataclass(frozen=True, slots=True)
class Held:
    """A weight [n, k], or one for each expert, as the kernels take it."""

    number: str
    shape: tuple[int, int]
    tensors: tuple[Tensor, Tensor, Tensor]
    """What is held, scales and zeros; or the first in place of what there isn't."""
    strides: tuple[int, int]
    scale_rows: int
    """That share a scale."""
    expert_strides: tuple[int, int]
    bits: int
    """Of a number."""
    block_k: int = QUANTISED_K
    columns: int = 0
    """That share a scale; 0 for whole rows."""

    def options(self, tile: int, x: Tensor) -> dict[str, Any]:
        """What a kernel is compiled for that multiplies it with so many rows of `x` at a time.

        Sums don't depend on how many tiles are asked for ahead.
        """
        span = gcd(self.columns or _MOST_SPANNED, _MOST_SPANNED)
        found = {"NUMBER": self.number, "BLOCK_K": self.block_k, "COLUMNS": self.columns, "SPAN": span, **OPTIONS}
        if not torch.version.hip:
            taken = self.block_k * (BLOCK_N * self.bits // 8 + tile * x.itemsize)
            found["num_stages"] = min(max(_STAGED_BYTES // taken, 2), _MOST_STAGES)
        return found


@cache
def has_e4m3(device: torch.device) -> bool:
    """Whether a device has an instruction for such numbers, so that they need not be taken apart by others."""
    nvidia = device.type == "cuda" and not torch.version.hip
    return nvidia and torch.cuda.get_device_capability(device) >= (8, 9)


def held_of(weight: Weight) -> Held:
    """A weight as the kernels take it."""
    shape = weight.shape[-2:]
    if not isinstance(weight, Quantised):
        strides, bits = weight.stride()[-2:], 8 * weight.itemsize
        return Held("", shape, (weight,) * 3, strides, 1, (weight.stride(0), 0), bits, BLOCK_K)
    numbers, scales = weight.numbers, weight.scales
    if weight.number == "e4m3" and has_e4m3(numbers.device):
        numbers = numbers.view(torch.float8_e4m3fn)
    tensors = numbers, scales, scales if weight.zeros is None else weight.zeros
    of_experts = numbers.stride(0), scales.stride(0)
    strides, bits = numbers.stride()[-2:], 8 if weight.number == "e4m3" else 4
    columns = weight.columns if weight.columns < shape[1] else 0
    return Held(weight.number, shape, tensors, strides, weight.rows, of_experts, bits, columns=columns)
