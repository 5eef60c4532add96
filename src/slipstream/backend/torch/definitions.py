"""What norms, rotations of positions and gates are, and which of these a class of `transformers` computes.

Classes differ in where they round and in what they pair. Which kind one is isn't read from its name: it is tried on
random numbers, and has to have the bits of a definition. One that has none's stays as it is.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F

Tensor: TypeAlias = torch.Tensor

_ROWS = 256
"""Rows whose means are taken at a time. By their number, a GPU's library chooses the order of sums; a processor's
doesn't."""


@dataclass(frozen=True, slots=True)
class Norm:
    """How rows are brought to one size, in float32."""

    eps: float
    rounds_first: bool
    """Rows are rounded before they are multiplied by the weight, and again after it; otherwise after it alone."""
    offset: bool
    """One is added to the weight."""
    centred: bool
    """The mean is subtracted first."""


def normed(x: Tensor, weight: Tensor, norm: Norm) -> Tensor:
    """Rows [..., k] by their root mean square, times a weight [k]."""
    wide = x.float()
    if norm.centred:
        wide = wide - _mean(wide)
    wide = wide * torch.rsqrt(_mean(wide.pow(2)) + norm.eps)
    if norm.rounds_first:
        wide = wide.to(x.dtype)
    return ((weight.float() + 1.0 if norm.offset else weight) * wide).to(x.dtype)


def _mean(x: Tensor) -> Tensor:
    return x.mean(-1, keepdim=True) if x.device.type == "cpu" else tiled_mean(x)


def tiled_mean(x: Tensor) -> Tensor:
    """The mean of each row [..., k], in tiles of some rows; [..., 1]."""
    flat = x.reshape(-1, x.shape[-1])
    tiles = F.pad(flat, (0, 0, 0, -len(flat) % _ROWS)).split(_ROWS)
    found = torch.cat([tile.mean(-1) for tile in tiles])
    return found[: len(flat)].view(*x.shape[:-1], 1)


def norm_of(module: Any) -> Norm | None:
    """The norm that a module computes, if it is one of these."""
    weight = dict(module.named_parameters()).get("weight")
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not type(module).__name__.endswith("Norm") or weight is None or weight.dim() != 1 or eps is None:
        return None
    own = deepcopy(module).cpu()
    x = torch.randn(6, len(weight), generator=torch.Generator().manual_seed(0), device="cpu")
    x[3:] *= eps**0.5  # where `eps` matters
    x = x.to(weight.dtype)
    expected = own(x)
    kinds = (Norm(eps, *flags) for flags in product((True, False), repeat=3))
    return next((kind for kind in kinds if _same(normed(x, own.weight, kind), expected)), None)


@dataclass(frozen=True, slots=True)
class Rotation:
    """How a head's elements are turned in pairs, by angles that depend on the token's position."""

    width: int
    """Elements that are turned; those behind them stay."""
    neighbours: bool
    """Pairs are neighbours; otherwise an element of the first half and one of the second."""
    by_pair: bool
    """An angle is that of a pair, the first for the first one; otherwise each element has its own."""
    wide: bool
    """Computed in float32 and rounded once; otherwise each product and their sum are rounded."""


def rotated(x: Tensor, cos: Tensor, sin: Tensor, rotation: Rotation) -> Tensor:
    """Heads [1, heads, n, dim] by angles [1, n, …]."""
    width, half = rotation.width, rotation.width // 2
    place = torch.arange(width, device=x.device)
    if rotation.neighbours:
        other, pair, first = place ^ 1, place // 2, place % 2 == 0
    else:
        other, pair, first = (place + half) % width, place % half, place < half
    turned = x.float() if rotation.wide else x
    across = torch.where(first, -turned[..., other], turned[..., other])
    cos, sin = (each[:, None, :, pair if rotation.by_pair else place] for each in (cos, sin))
    turned = turned[..., :width] * cos + across * sin
    return torch.cat((turned.to(x.dtype), x[..., width:]), -1)


def rotation_of(function: Callable[..., Any], query: Tensor, cos: Tensor) -> Rotation | None:
    """The rotation that a function computes of queries, keys, cosines and sines like these, if it is one of these."""
    if query.dim() != 4 or cos.dim() != 3 or len(query) != 1 or len(cos) != 1:
        return None
    return _rotation(function, query.shape[3], query.dtype, cos.shape[2], cos.dtype)


@cache
def _rotation(
    function: Callable[..., Any], dim: int, dtype: torch.dtype, angles: int, angles_dtype: torch.dtype
) -> Rotation | None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cpu")

    query, key = (random(1, heads, 3, dim).to(dtype) for heads in (2, 1))
    cos, sin = (random(1, 3, angles).to(angles_dtype) for _ in range(2))
    expected = function(query, key, cos, sin)
    widths = (width for width in (angles, 2 * angles) if width <= dim and width % 2 == 0)
    kinds = (Rotation(width, *flags) for width in widths for flags in product((False, True), repeat=3))
    for kind in kinds:
        if (kind.width > angles and not kind.by_pair) or not (kind.wide or angles_dtype == dtype):
            continue
        if all(_same(rotated(x, cos, sin, kind), then) for x, then in zip((query, key), expected, strict=True)):
            return kind
    return None


@dataclass(frozen=True, slots=True)
class ClampedGate:
    """How experts gate neighbours: `x * sigmoid(alpha * x)` times `y + 1`, of `x` up to a limit and `y` within it."""

    alpha: float
    limit: float


def gated(both: Tensor, gate: ClampedGate) -> Tensor:
    """Each first element of two neighbours [..., 2 k] gates the second one; [..., k]."""
    x = both[..., ::2].clamp(max=gate.limit)
    y = both[..., 1::2].clamp(-gate.limit, gate.limit)
    return (y + 1) * (x * torch.sigmoid(x * gate.alpha))


def gate_of(module: Any, dtype: torch.dtype) -> ClampedGate | None:
    """The gate that experts compute in this precision, if it is one of these."""
    function = getattr(module, "_apply_gate", None)
    own = getattr(function, "__self__", None)  # not the module if that took the place of experts
    alpha, limit = getattr(own, "alpha", None), getattr(own, "limit", None)
    if function is None or not isinstance(alpha, float) or not isinstance(limit, float):
        return None
    gate = ClampedGate(alpha, limit)
    both = torch.randn(64, 64, generator=torch.Generator().manual_seed(0), device="cpu") * limit
    return gate if _same(gated(both.to(dtype), gate), function(both.to(dtype))) else None


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and bool(torch.equal(one, other))
