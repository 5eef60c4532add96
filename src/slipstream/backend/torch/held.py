"""A weight as the kernels of products take it, and what they are compiled for then."""

from dataclasses import dataclass
from functools import cache
from math import gcd
from typing import Any

import torch

from slipstream.backend.torch.operators import Tensor
from slipstream.backend.torch.quantised import Quantised, Weight


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a product is cut into tiles and spread over a GPU.

    All but what is under way decides the order of sums, so it's the same for every number of rows of `x`.
    """

    block_n: int = 64
    """Rows of the weight in a tile."""
    block_k: int = 64
    """Columns."""
    quantised_k: int = 128
    """Those of a quantised weight, whose tiles have fewer bytes."""
    programs: int = 256
    """That a product is spread over, if there is enough to do for each."""
    part: int = 512
    """Columns that are enough."""
    stages: int = 5
    """Tiles under way. A small step is done when the weights are read, as fast as many bytes are under way."""
    staged_bytes: int = 72 << 10
    """Shared memory that these may take. No GPU that Triton supports has less than 99 KiB."""

    def parts(self, n_size: int, k_size: int) -> int:
        """In how many parts a product with a weight of this shape sums up, a power of two; those of a small step are
        summed by as many programs, or too few would read the weight for a GPU to be busy."""
        wanted = min(self.programs * self.block_n // n_size, k_size // self.part)
        return 1 << max(wanted, 1).bit_length() - 1


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
    columns: int = 0
    """That share a scale; 0 for whole rows."""

    def options(self, tiling: Tiling, tile: int, x: Tensor) -> dict[str, Any]:
        """What a kernel is compiled for that multiplies it with so many rows of `x` at a time."""
        block_k = tiling.quantised_k if self.number and x.itemsize == 2 else tiling.block_k
        most = block_k // 2  # of all columns of a tile, Triton would load a scale for each
        found = {"NUMBER": self.number, "COLUMNS": self.columns, "SPAN": gcd(self.columns or most, most)}
        found |= {"BLOCK_N": tiling.block_n, "BLOCK_M": tile, "BLOCK_K": block_k, **OPTIONS}
        if not torch.version.hip:
            taken = block_k * (tiling.block_n * self.bits // 8 + tile * x.itemsize)
            found["num_stages"] = min(max(tiling.staged_bytes // taken, 2), tiling.stages)
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
        return Held("", shape, (weight,) * 3, strides, 1, (weight.stride(0), 0), bits)
    numbers, scales = weight.numbers, weight.scales
    if weight.number == "e4m3" and has_e4m3(numbers.device):
        numbers = numbers.view(torch.float8_e4m3fn)
    tensors = numbers, scales, scales if weight.zeros is None else weight.zeros
    of_experts = numbers.stride(0), scales.stride(0)
    strides, bits = numbers.stride()[-2:], 8 if weight.number == "e4m3" else 4
    columns = weight.columns if weight.columns < shape[1] else 0
    return Held(weight.number, shape, tensors, strides, weight.rows, of_experts, bits, columns)
