"""How checkpoints in safetensors store weights of 4 and 8 bits: AWQ, GPTQ, compressed-tensors, MXFP4 and FP8.

Each packs in its own way (AutoAWQ's `gemm` layout, AutoGPTQ's). They are brought into one, `Quantised`, when a model is
loaded. Which weights are quantised, and what a scale of 8 bits is for, is read from the tensors themselves, since each
tool describes it in its own way. Activations keep the model's precision, and scales for them are not used.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch

from slipstream.backend.torch.quantised import CODES, Quantised, Weight, codes, pack
from slipstream.errors import ModelError

Tensor: TypeAlias = torch.Tensor
Tensors: TypeAlias = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Shapes and dtypes, by name."""

SCALES = ("weight_scale_inv", "weight_scale")
"""Names of the scales of a weight of 8 bits; it is multiplied by either."""
_PRECISIONS = {"BF16": torch.bfloat16, "F16": torch.float16}
"""Of scales, if it isn't float32; that of the model may be another, and have fewer bits of fraction."""
_BLOCK = 32
"""Numbers of MXFP4 that share a scale."""
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where AWQ puts the first of eight neighbours, the second, …, counted in codes from the lowest bits."""


class Format(Protocol):
    """How a weight is stored."""

    def tensors(self, *shape: int) -> Tensors:
        """Those of a weight of this shape."""
        ...

    def weight(self, found: Mapping[str, Tensor]) -> Weight:
        """The weight from these tensors."""
        ...


class Checkpoint:
    """The dtype and shape of each tensor in a folder of safetensors, and what its `config.json` says of them."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self._tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
        for path in folder.glob("*.safetensors"):
            with path.open("rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            header.pop("__metadata__", None)
            self._tensors |= {name: (each["dtype"], tuple(each["shape"])) for name, each in header.items()}
        self._codes = Codes.of(config) if config["quant_method"] in ("awq", "gptq") else None
        groups = [group["weights"] for group in (config.get("config_groups") or {}).values()]
        blocks = [config.get("weight_block_size"), *(weights.get("block_structure") for weights in groups)]
        self._block: tuple[int, int] | None = next((tuple(each) for each in blocks if each), None)

    def format(self, name: str, n: int, k: int) -> Format | None:
        """How a layer's weight [n, k] is stored, None if as it is; raises `ModelError` if that isn't known."""
        if self._codes is not None and f"{name}.qweight" in self._tensors:
            _, precision, _ = self._scales(name, "scales")
            return replace(self._codes, precision=precision)
        if f"{name}.weight_packed" in self._tensors:
            _, precision, shape = self._scales(name, "weight_scale")
            if len(shape) != 2 or k % shape[1]:
                raise ModelError(f"{name} has a weight of {n} x {k} in 4 bits, and scales of {shape}")
            others = [each for each in ("weight_zero_point", "weight_g_idx") if f"{name}.{each}" in self._tensors]
            return _Compressed(shape[1], precision, tuple(others))
        if self._tensors.get(f"{name}.weight", ("", ()))[0] != "F8_E4M3":
            return None
        scales, precision, shape = self._scales(name, *SCALES)
        places = {(): (n, k), (1,): (n, k), (1, 1): (n, k), (n,): (1, k), (n, 1): (1, k)}
        if self._block is not None:
            rows, columns = self._block
            places[-(-n // rows), -(-k // columns)] = rows, columns
        if shape not in places:
            raise ModelError(f"{name} has a weight of {n} x {k} in 8 bits, and scales of {shape}")
        return _Fp8(scales, precision, shape, *places[shape])

    def _scales(self, name: str, *names: str) -> tuple[str, torch.dtype, tuple[int, ...]]:
        """The name, dtype and shape of a weight's scales, which have one of these names."""
        found = next((each for each in names if f"{name}.{each}" in self._tensors), None)
        if found is None:
            raise ModelError(f"{name} has a quantised weight, and no scale")
        dtype, shape = self._tensors[f"{name}.{found}"]
        return found, _PRECISIONS.get(dtype, torch.float32), shape

    def joined(self, name: str) -> dict[str, Format]:
        """How a layer's experts are stored, by product; empty unless they are joined and quantised."""
        products = "gate_up_proj", "down_proj"
        quantised = any(f"{name}.{product}_blocks" in self._tensors for product in products)
        return {product: _Mxfp4(product) for product in products} if quantised else {}


@dataclass(frozen=True, slots=True)
class Whole:
    """As it is."""

    precision: torch.dtype

    def tensors(self, *shape: int) -> Tensors:
        """See `Format.tensors`."""
        return {"weight": (shape, self.precision)}

    def weight(self, found: Mapping[str, Tensor]) -> Weight:
        """See `Format.weight`."""
        return found["weight"]


@dataclass(frozen=True, slots=True)
class Codes:
    """AWQ and GPTQ: eight codes in an integer, a scale and a zero by group."""

    method: str
    group: int
    zero_offset: int = 0
    """What is added to zeros as they are stored."""
    precision: torch.dtype = torch.float32
    """Of scales."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Codes":
        """What the `quantization_config` of a `config.json` says, as `slipstream.models.safetensors` has checked it."""
        method = str(config["quant_method"])
        older = method == "gptq" and config.get("checkpoint_format", "gptq") == "gptq"
        return cls(method, int(config["group_size"]), int(older))

    def tensors(self, *shape: int) -> Tensors:
        """See `Format.tensors`."""
        n, k = shape
        group = k if self.group == -1 else self.group
        common = {"qzeros": ((k // group, n // CODES), torch.int32), "scales": ((k // group, n), self.precision)}
        if self.method == "awq":
            return {"qweight": ((k, n // CODES), torch.int32), **common}
        return {"qweight": ((k // CODES, n), torch.int32), **common, "g_idx": ((k,), torch.int32)}

    def weight(self, found: Mapping[str, Tensor]) -> Quantised:
        """See `Format.weight`."""
        order = None
        if self.method == "awq":
            place = torch.tensor(_AWQ_ORDER, device=found["qweight"].device)
            numbers, zeros = (codes(found[name])[..., place].flatten(1).T for name in ("qweight", "qzeros"))
            held = pack(numbers)
        else:
            zeros = codes(found["qzeros"]).flatten(1).T + self.zero_offset
            order, held = _by_group(found["g_idx"], found["qweight"].T.contiguous())
        scales = found["scales"].T.contiguous()
        group = held.shape[1] * CODES // scales.shape[1]
        return Quantised.of_codes("int4", held, scales, group, zeros.to(torch.int8).contiguous(), order)


def _by_group(groups: Tensor, held: Tensor) -> tuple[Tensor | None, Tensor]:
    """The order of columns that brings those of a group together, None if they are, and the codes in that order."""
    order = torch.argsort(groups, stable=True)
    if torch.equal(order, torch.arange(len(order), device=order.device)):
        return None, held
    return order, pack(codes(held).flatten(1)[:, order])


@dataclass(frozen=True, slots=True)
class _Compressed:
    """`pack-quantized` of compressed-tensors: eight codes in an integer, each 8 more than its number."""

    groups: int
    """Of columns, each with a scale."""
    precision: torch.dtype
    """Of scales."""
    others: tuple[str, ...]
    """Which of zeros and groups of columns there are."""

    def tensors(self, *shape: int) -> Tensors:
        """See `Format.tensors`."""
        n, k = shape
        sizes = {"weight_zero_point": (-(-n // CODES), self.groups), "weight_g_idx": (k,)}
        packed = {"weight_packed": ((n, k // CODES), torch.int32), "weight_scale": ((n, self.groups), self.precision)}
        return packed | {name: (sizes[name], torch.int32) for name in self.others}

    def weight(self, found: Mapping[str, Tensor]) -> Quantised:
        """See `Format.weight`."""
        held, scales = found["weight_packed"], found["weight_scale"]
        if "weight_zero_point" in found:
            zeros = codes(found["weight_zero_point"].T.contiguous()).flatten(1)[:, : len(held)].T
        else:
            zeros = torch.full_like(scales, 8)
        order = None
        if "weight_g_idx" in found:
            order, held = _by_group(found["weight_g_idx"], held)
        columns = held.shape[1] * CODES // self.groups
        return Quantised.of_codes("int4", held, scales, columns, zeros.to(torch.int8).contiguous(), order)


@dataclass(frozen=True, slots=True)
class _Fp8:
    """Numbers with four bits of exponent, and a scale for all of a weight, for a row, or for a block."""

    name: str
    """Of the scales."""
    precision: torch.dtype
    """Of the scales."""
    shape: tuple[int, ...]
    """Of the scales."""
    rows: int
    columns: int
    """That share a scale."""

    def tensors(self, *shape: int) -> Tensors:
        """See `Format.tensors`."""
        return {"weight": (shape, torch.float8_e4m3fn), self.name: (self.shape, self.precision)}

    def weight(self, found: Mapping[str, Tensor]) -> Quantised:
        """See `Format.weight`."""
        numbers = found["weight"].view(torch.uint8)
        scales = found[self.name].reshape(-(-numbers.shape[0] // self.rows), -(-numbers.shape[1] // self.columns))
        return Quantised("e4m3", numbers, scales, self.rows, self.columns)


@dataclass(frozen=True, slots=True)
class _Mxfp4:
    """OCP Microscaling Formats (MX) v1.0: 32 neighbours of 4 bits share a power of two; for all experts at once."""

    product: str

    def tensors(self, *shape: int) -> Tensors:
        """See `Format.tensors`."""
        *rows, k = shape
        blocks = (*rows, k // _BLOCK)
        return {
            f"{self.product}_blocks": ((*blocks, _BLOCK // 2), torch.uint8),
            f"{self.product}_scales": (blocks, torch.uint8),
        }

    def weight(self, found: Mapping[str, Tensor]) -> Quantised:
        """See `Format.weight`."""
        numbers, exponents = (found[f"{self.product}_{part}"] for part in ("blocks", "scales"))
        scales = (exponents.to(torch.int32) << 23).view(torch.float32).bfloat16()  # exact: they are bits of exponent
        return Quantised.of_codes("e2m1", numbers.flatten(-2).view(torch.int32), scales, _BLOCK)
