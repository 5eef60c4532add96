"""Kernels of mixtures by themselves, in Triton's interpreter: pairs sorted into tiles, gates, and sums of experts."""

from typing import Any

import pytest
import torch

from slipstream.backend.torch.definitions import ClampedGate, gate_of, gated
from slipstream.backend.torch.held import OPTIONS
from slipstream.backend.torch.kernel_operators import TOKEN_TILES, KernelOperators, expert_pairs
from slipstream.backend.torch.kernels import experts

pytestmark = pytest.mark.torch
TILE = TOKEN_TILES[0]
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # the interpreter cuts bfloat16 off


def tiles_of(index: torch.Tensor, count: int) -> tuple[torch.Tensor, list[list[int]]]:
    """What `expert_pairs` has to find: the order of pairs, and the tiles that aren't empty."""
    order = index.flatten().argsort(stable=True)
    tiles, end = [], 0
    for expert, pairs in enumerate(index.flatten().bincount(minlength=count).tolist()):
        begin, end = end, end + pairs
        tiles += [[expert, first, min(first + TILE, end)] for first in range(begin, end, TILE)]
    return order, tiles


@pytest.mark.parametrize("count", [8, 40])
@pytest.mark.parametrize(("tokens", "top"), [(1, 2), (1, 8), (2, 1), (16, 8), (17, 8), (129, 2), (300, 1), (140, 8)])
@pytest.mark.parametrize("spread", [True, False], ids=["spread", "alike"])
def test_pairs_by_expert(count: int, top: int, tokens: int, spread: bool) -> None:
    """In the order of tokens; if these choose alike, the last experts have all pairs, and the others none."""
    torch.manual_seed(tokens)
    index = count - 1 - torch.rand(tokens, count if spread else top).topk(top).indices
    pairs = expert_pairs(index, count)
    pairs.order.fill_(-1)
    pairs.tiles.copy_(torch.tensor([0, 0, 1]))  # a tile that nobody writes isn't empty
    experts.expert_tiles[count,](index, pairs.order, pairs.tiles, index.numel(), TILE=TILE, BLOCK=256)
    order, tiles = tiles_of(index, count)
    assert torch.equal(pairs.order, order.int())
    assert [tile for tile in pairs.tiles.tolist() if tile[1] < tile[2]] == tiles
    assert len(pairs.tiles) == min(index.numel(), count + index.numel() // TILE), "known from shapes"


@pytest.mark.parametrize("top", [1, 2, 8])
@dtypes
def test_sums_of_experts_are_rounded_in_the_order_of_the_router(top: int, dtype: torch.dtype) -> None:
    torch.manual_seed(top)
    parts, weights = torch.randn(7, top, 700).to(dtype), torch.randn(7, top).to(dtype)
    out = torch.empty(7, 700, dtype=dtype)
    experts.sum_experts[7, 2](parts, weights, out, 700, TOP=top, BLOCK=512, **OPTIONS)
    total = torch.zeros(7, 700)
    for choice in range(top):
        total += parts[:, choice].float() * weights[:, choice, None].float()
    assert torch.equal(out, total.to(dtype))


@dtypes
def test_gates(dtype: torch.dtype) -> None:
    """Some are beyond the limit, on either side; a row's bits are its own."""
    gate = ClampedGate(1.702, 3.0)
    both = (4 * torch.randn(5, 1300, generator=torch.Generator().manual_seed(0))).to(dtype)
    found = KernelOperators().gate_clamped(both, gate)
    torch.testing.assert_close(found, gated(both, gate))
    assert torch.equal(KernelOperators().gate_clamped(both[2:3], gate), found[2:3])


def test_gates_that_are_not_known_stay_as_they_are() -> None:
    class Odd(torch.nn.Module):  # type: ignore[misc]
        alpha, limit = 1.702, 7.0

        def _apply_gate(self, both: Any) -> Any:
            return gated(both, ClampedGate(self.alpha, self.limit)) + 1

    assert gate_of(Odd(), torch.float32) is None
    assert gate_of(torch.nn.Linear(1, 1), torch.float32) is None
