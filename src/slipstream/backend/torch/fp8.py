"""Weights of 8 bits as FP8 checkpoints have them in safetensors: numbers with four bits of exponent (e4m3), and scales.

A scale is for all of a weight, for a row, or for a block of rows and columns. What it is for, and which weights have
one, is read from the tensors themselves, since each tool describes it in its own way. Weights alone are of 8 bits:
activations keep the model's precision, and scales for them are not used.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from slipstream.errors import ModelError

Tensor: TypeAlias = torch.Tensor

_NUMBER = "F8_E4M3"
"""What safetensors call it."""
SCALES = ("weight_scale_inv", "weight_scale")
"""Names of a weight's scales; it is multiplied by either."""


@dataclass(frozen=True, slots=True)
class Scaled:
    """A weight [n, k]: number * scale, in float32, rounded to the model's precision."""

    numbers: Tensor
    """Uint8 [n, k], the bits of each."""
    scales: Tensor
    """Float32 [n / rows, k / columns], rounded up."""
    rows: int
    columns: int
    """That share a scale."""

    @property
    def size(self) -> int:
        """The weight's n."""
        return len(self.numbers)

    @property
    def order(self) -> None:
        """Columns are in order."""

    def unpacked(self, begin: int, end: int, dtype: torch.dtype) -> Tensor:
        """Some rows of the weight."""
        numbers = self.numbers[begin:end].view(torch.float8_e4m3fn).float()
        row = torch.arange(begin, end, device=numbers.device) // self.rows
        column = torch.arange(numbers.shape[1], device=numbers.device) // self.columns
        return (numbers * self.scales[row][:, column]).to(dtype)


class Checkpoint:
    """The dtype and shape of each tensor in a folder of safetensors, and the size of blocks that share a scale."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self._tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
        for path in folder.glob("*.safetensors"):
            with path.open("rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            header.pop("__metadata__", None)
            self._tensors |= {name: (each["dtype"], tuple(each["shape"])) for name, each in header.items()}
        groups = [group["weights"] for group in (config.get("config_groups") or {}).values()]
        blocks = [config.get("weight_block_size"), *(weights.get("block_structure") for weights in groups)]
        self._block: tuple[int, int] | None = next((tuple(each) for each in blocks if each), None)

    def format(self, name: str, n: int, k: int) -> "Format | None":
        """How a layer's weight [n, k] is stored, None if not in 8 bits; raises `ModelError` if that isn't known."""
        if self._tensors.get(f"{name}.weight", ("", ()))[0] != _NUMBER:
            return None
        scales = next((each for each in SCALES if f"{name}.{each}" in self._tensors), None)
        if scales is None:
            raise ModelError(f"{name} has a weight of 8 bits, and no scale")
        shape = self._tensors[f"{name}.{scales}"][1]
        places = {(): (n, k), (1,): (n, k), (1, 1): (n, k), (n,): (1, k), (n, 1): (1, k)}
        if self._block is not None:
            rows, columns = self._block
            places[-(-n // rows), -(-k // columns)] = rows, columns
        if shape not in places:
            raise ModelError(f"{name} has a weight of {n} x {k} in 8 bits, and scales of {shape}")
        return Format(scales, shape, *places[shape])


@dataclass(frozen=True, slots=True)
class Format:
    """How a weight is stored."""

    name: str
    """Of the scales."""
    shape: tuple[int, ...]
    """Of the scales."""
    rows: int
    columns: int
    """That share a scale."""

    def tensors(self, n: int, k: int, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:  # noqa: ARG002
        """Shapes and dtypes of the tensors of a weight [n, k]."""
        return {"weight": ((n, k), torch.float8_e4m3fn), self.name: (self.shape, torch.float32)}

    def packed(self, found: Mapping[str, Tensor]) -> Scaled:
        """A weight from these tensors."""
        numbers = found["weight"].view(torch.uint8)
        scales = found[self.name].reshape(-(-numbers.shape[0] // self.rows), -(-numbers.shape[1] // self.columns))
        return Scaled(numbers, scales, self.rows, self.columns)
