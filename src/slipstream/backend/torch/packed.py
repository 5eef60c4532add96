"""Weights of 4 bits as AWQ and GPTQ leave them in safetensors: eight codes in an integer, a scale and a zero by group.

Each format packs in its own way (AutoAWQ's `gemm` layout, AutoGPTQ's). They are brought into one when a model is
loaded, in which a row of a weight is contiguous; products take it apart tile by tile.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

Tensor: TypeAlias = torch.Tensor

CODES = 8
"""In an integer of 32 bits; each has four of them."""

_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where AWQ puts the first of eight neighbours, the second, …, counted in codes from the lowest bits."""


@dataclass(frozen=True, slots=True)
class Packed:
    """A weight [n, k]: (code - zero) * scale, in float32, rounded to the model's precision."""

    codes: Tensor
    """Int32 [n, k / 8], the first code in the lowest bits."""
    scales: Tensor
    """[n, k / group]."""
    zeros: Tensor
    """Int8 [n, k / group]."""
    order: Tensor | None = None
    """Int64 [k], the columns of `x` as the weight has them; None if they are in order."""

    @property
    def size(self) -> int:
        """The weight's n."""
        return len(self.codes)

    @property
    def group(self) -> int:
        """Columns that share a scale and a zero."""
        return int(self.codes.shape[1] * CODES // self.scales.shape[1])

    def unpacked(self, begin: int, end: int, dtype: torch.dtype) -> Tensor:
        """Some rows of the weight."""
        codes = _codes(self.codes[begin:end]).view(end - begin, -1, self.group)
        zeros, scales = self.zeros[begin:end, :, None], self.scales[begin:end, :, None]
        return ((codes - zeros).float() * scales.float()).to(dtype).view(end - begin, -1)


@dataclass(frozen=True, slots=True)
class Format:
    """How a checkpoint packs weights."""

    method: str
    group: int
    zero_offset: int = 0
    """What is added to zeros as they are stored."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Format":
        """What the `quantization_config` of a `config.json` says, as `slipstream.models.safetensors` has checked it."""
        method = str(config["quant_method"])
        older = method == "gptq" and config.get("checkpoint_format", "gptq") == "gptq"
        return cls(method, int(config["group_size"]), int(older))

    def tensors(self, n: int, k: int, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shapes and dtypes of the tensors of a weight [n, k] of a model of some precision."""
        group = k if self.group == -1 else self.group
        common = {"qzeros": ((k // group, n // CODES), torch.int32), "scales": ((k // group, n), dtype)}
        if self.method == "awq":
            return {"qweight": ((k, n // CODES), torch.int32), **common}
        return {"qweight": ((k // CODES, n), torch.int32), **common, "g_idx": ((k,), torch.int32)}

    def packed(self, found: Mapping[str, Tensor]) -> Packed:
        """A weight from these tensors."""
        order = None
        if self.method == "awq":
            place = torch.tensor(_AWQ_ORDER, device=found["qweight"].device)
            codes, zeros = (_codes(found[name])[..., place].flatten(1).T for name in ("qweight", "qzeros"))
        else:
            codes = _codes(found["qweight"].T.contiguous()).flatten(1)
            zeros = _codes(found["qzeros"]).flatten(1).T + self.zero_offset
            by_group = torch.argsort(found["g_idx"], stable=True)
            if not torch.equal(by_group, torch.arange(len(by_group), device=by_group.device)):
                order, codes = by_group, codes[:, by_group]
        return Packed(pack(codes), found["scales"].T.contiguous(), zeros.to(torch.int8).contiguous(), order)


def pack(codes: Tensor) -> Tensor:
    """Codes of 0 to 15 [n, k], eight in an int32 [n, k / 8]."""
    eight = codes.reshape(len(codes), -1, CODES).to(torch.int64)
    joined = (eight << torch.arange(0, 4 * CODES, 4, device=codes.device)).sum(-1)
    return joined.to(torch.int32)  # keeps the lower bits


def _codes(packed: Tensor) -> Tensor:
    """Int32 [n, m] as int32 [n, m, 8], each code by itself."""
    return (packed[..., None] >> torch.arange(0, 4 * CODES, 4, device=packed.device, dtype=torch.int32)) & 15
