"""`Operators` as Triton kernels: how they are launched."""

from typing import Any

import torch
import triton

from slipstream.backend.torch import kernels
from slipstream.backend.torch.operators import SEGMENT, TOKEN_TILES, AttentionShape, Step, Tensor

BLOCK_N, BLOCK_K = 64, 64
"""Of products: rows of the weight, and elements of a row, that are multiplied at a time."""
QUERY_ROWS = 16
"""Rows of queries in a tile, which is one tile for steps of any size."""
_PARTIAL_SUMS = 1 << 26
"""Floats that attention's sums by segment may take: longer steps are computed in several parts."""

OPTIONS: dict[str, Any] = {"enable_fp_fusion": False} | ({"matrix_instr_nonkdim": 16} if torch.version.hip else {})
"""Of the compiler. It must not choose where a product and a sum become one operation with one rounding; and AMD's takes
another matrix instruction for other tiles, unless it is told which."""


class KernelOperators:
    """`Operators` for a GPU that Triton compiles for."""

    name = f"kernels 1, triton {triton.__version__}, {BLOCK_N}, {BLOCK_K}, {QUERY_ROWS}, {SEGMENT}"

    def __init__(self) -> None:
        self._tiles: tuple[Step, int, Tensor, list[int]] | None = None

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `Operators.linear`."""
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        weight = weight.contiguous()
        out = x.new_empty(len(rows), len(weight))
        tile = token_tile(len(rows))
        grid = triton.cdiv(len(weight), BLOCK_N), triton.cdiv(len(rows), tile)
        kernels.linear[grid](
            rows, weight, weight if bias is None else bias, out, len(rows), len(weight), rows.shape[1],
            BIAS=bias is not None, BLOCK_N=BLOCK_N, BLOCK_M=tile, BLOCK_K=BLOCK_K, SPLIT=1, **OPTIONS,
        )  # fmt: skip
        return out.view(*x.shape[:-1], len(weight))

    def attend(self, query: Tensor, kv: Tensor, step: Step, shape: AttentionShape, sinks: Tensor | None) -> Tensor:
        """See `Operators.attend`."""
        count, heads, dim = query.shape
        _, _, kv_heads, block, _ = kv.shape
        group = heads // kv_heads
        rows = max(QUERY_ROWS, triton.next_power_of_2(group))
        tiles, starts = self._tiles_of(step, rows // group)
        segments = max(-(-(past + length) // SEGMENT) for past, length, _ in step.chunks)
        most = max(1, _PARTIAL_SUMS // (heads * segments * dim) // (rows // group))  # tiles at a time
        part = query.new_empty(min(count, most * (rows // group)) * heads * segments * (dim + 2), dtype=torch.float32)
        out = torch.empty_like(query)
        common = {"HEADS": heads, "DIM": dim, "DIMS": triton.next_power_of_2(dim), "SEGMENT": SEGMENT}
        for at in range(0, len(tiles), most):
            some = tiles[at : at + most]
            first, end = starts[at], starts[at + len(some)]
            size = (end - first) * heads * segments
            sums, peaks, totals = part[: size * dim], part[size * dim : size * (dim + 1)], part[size * (dim + 1) :]
            kernels.attend[len(some), kv_heads, segments](
                query, kv, step.table, step.table_begins, step.pasts, step.begins, some, sums, peaks, totals, first,
                segments, shape.scale, *kv.stride()[:3],
                GROUP=group, BLOCK=block, ROWS=rows, WINDOW=shape.window, CAP=shape.softcap,
                **common, **OPTIONS,
            )  # fmt: skip
            kernels.combine[end - first, heads](
                sums, peaks, totals, step.positions, query if sinks is None else sinks, out, first, segments,
                WINDOW=shape.window, SINKS=sinks is not None, **common, **OPTIONS,
            )  # fmt: skip
        return out

    def write(self, kv: Tensor, key: Tensor, value: Tensor, step: Step) -> None:
        """See `Operators.write`."""
        count, heads, dim = key.shape
        assert key.stride(2) == value.stride(2) == 1
        kernels.write[count, heads](
            kv, key, value, step.blocks, step.slots, *kv.stride()[:3], *key.stride()[:2], *value.stride()[:2],
            DIM=dim, DIMS=triton.next_power_of_2(dim), **OPTIONS,
        )  # fmt: skip

    def experts(self, module: Any, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """See `Operators.experts`."""
        of_tiles = _expert_tiles(index, module.num_experts)
        up = _experts_linear(module, "gate_up_proj", x.contiguous(), index.shape[1], of_tiles)
        gated = module._apply_gate(up).contiguous()
        parts = _experts_linear(module, "down_proj", gated, 1, of_tiles).view(*index.shape, -1)
        total = torch.zeros_like(x, dtype=torch.float32)
        for choice in range(index.shape[1]):
            total += parts[:, choice].float() * weights[:, choice, None]
        return total.to(x.dtype)

    def _tiles_of(self, step: Step, tokens: int) -> tuple[Tensor, list[int]]:
        """Chunks in tiles of so many tokens: the chunk and first token of each, and where it begins in the step."""
        if self._tiles is None or self._tiles[0] is not step or self._tiles[1] != tokens:
            found, starts, begin = [], [], 0
            for chunk, (_, length, _) in enumerate(step.chunks):
                firsts = range(0, length, tokens)
                found += [(chunk, first) for first in firsts]
                starts += [begin + first for first in firsts]
                begin += length
            on_device = torch.tensor(found, dtype=torch.int32).to(step.table.device, non_blocking=True)
            self._tiles = step, tokens, on_device, [*starts, begin]
        return self._tiles[2:]


def token_tile(rows: int) -> int:
    """The tile that a product of so many rows is computed in."""
    return next((tile for tile in TOKEN_TILES if rows <= tile), TOKEN_TILES[-1])


_Tiles = tuple[Tensor, Tensor, Tensor, Tensor]


def _expert_tiles(index: Tensor, experts: int) -> _Tiles:
    """Pairs of token and expert by expert, and tiles of them: the expert of each, and where in the order it lies.

    How many tiles there are is bounded by shapes alone, so that the host need not wait; surplus ones are empty.
    """
    flat = index.reshape(-1)
    tile = TOKEN_TILES[0]
    order = torch.argsort(flat, stable=True).to(torch.int32)
    counts = (flat[:, None] == torch.arange(experts, device=flat.device)).sum(0)  # `bincount` would wait for the GPU
    ends, tile_ends = counts.cumsum(0), ((counts + tile - 1) // tile).cumsum(0)
    number = torch.arange(min(len(flat), experts + len(flat) // tile), device=flat.device)
    expert = torch.searchsorted(tile_ends, number, right=True).clamp(max=experts - 1)
    begins = ends[expert] - counts[expert]
    begin = begins + (number - (tile_ends[expert] - (counts[expert] + tile - 1) // tile)) * tile
    end = torch.minimum(begin + tile, ends[expert])
    return order, expert.to(torch.int32), begin.to(torch.int32), end.to(torch.int32)


def _experts_linear(module: Any, name: str, x: Tensor, share: int, of_tiles: _Tiles) -> Tensor:
    """`[pairs, n]`, in the order of tokens and of each one's experts."""
    weight = getattr(module, name)
    weight = weight.mT if module.is_transposed else weight  # [experts, n, k]
    bias = getattr(module, f"{name}_bias") if module.has_bias else None
    order, *tiles = of_tiles
    _, n_size, k_size = weight.shape
    out = x.new_empty(len(order), n_size)
    kernels.experts_linear[triton.cdiv(n_size, BLOCK_N), len(tiles[0])](
        x, weight, weight if bias is None else bias, out, order, *tiles, n_size, k_size, *weight.stride(), share,
        BIAS=bias is not None, BLOCK_N=BLOCK_N, BLOCK_M=TOKEN_TILES[0], BLOCK_K=BLOCK_K, **OPTIONS,
    )  # fmt: skip
    return out
