"""Kernels of mixtures: pairs of a token and one of its experts, by expert for products, and by token for their sum."""

import triton
import triton.language as tl

from slipstream.backend.torch.kernels.products import multiplied
from slipstream.backend.torch.kernels.tiles import first_tile


@triton.jit(do_not_specialize=["pairs"])
def expert_tiles(index, order, tiles, pairs, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """One expert's pairs, in the order of tokens, and its tiles; `index[pairs]` has the expert of each pair.

    `order[pairs]` has the pairs by expert, and `tiles[tiles, 3]` an expert, and where in that order a tile begins and
    ends. For their places see `tiles`; what an expert doesn't fill is empty.
    """
    expert, experts = tl.program_id(0), tl.num_programs(0)
    place = tl.arange(0, BLOCK)
    before = tl.zeros([BLOCK], tl.int32)
    up_to = tl.zeros([BLOCK], tl.int32)
    for start in range(0, pairs, BLOCK):
        found = tl.load(index + start + place, start + place < pairs, experts)
        before += (found < expert).to(tl.int32)
        up_to += (found <= expert).to(tl.int32)
    begin, end = tl.sum(before), tl.sum(up_to)
    rank = begin
    for start in range(0, pairs, BLOCK):
        own = (tl.load(index + start + place, start + place < pairs, experts) == expert).to(tl.int32)
        tl.store(order + rank + tl.cumsum(own) - own, start + place, own > 0)
        rank += tl.sum(own)
    first = first_tile(expert, begin, TILE)
    count = first_tile(expert + 1, end, TILE) - first
    for start in range(0, count, BLOCK):
        number = start + place
        tile, begins = tiles + 3 * (first + number), begin + number * TILE
        tl.store(tile, expert, number < count)
        tl.store(tile + 1, begins, number < count)
        tl.store(tile + 2, tl.minimum(begins + TILE, end), number < count)


@triton.jit
def experts_linear(
    x, weight, scales, zeros, bias, out, order, tiles, n_size, k_size, stride_n, stride_k, scale_rows,
    stride_e, stride_scales, share,
    NUMBER: tl.constexpr, BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    COLUMNS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """The product of each pair of a token and one of its experts with that expert's weight: `out[pair, n]`.

    For the order and tiles of pairs see `expert_tiles`. `share` pairs have the same row of `x`. For the weights see
    `multiplied`.
    """
    tile = tiles + 3 * tl.program_id(1)
    expert, begin, end = tl.load(tile).to(tl.int64), tl.load(tile + 1), tl.load(tile + 2)
    if begin >= end:
        return
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    place = begin + tl.arange(0, BLOCK_M)
    real = place < end
    pair = tl.load(order + place, real, 0).to(tl.int64)
    acc = multiplied(
        x, pair // share, real, weight + expert * stride_e, scales + expert * stride_scales,
        zeros + expert * stride_scales, n, 0, k_size, n_size, k_size, stride_n, stride_k, scale_rows,
        NUMBER, BLOCK_N, BLOCK_M, BLOCK_K, COLUMNS, SPAN,
    )  # fmt: skip
    if BIAS:
        acc += tl.load(bias + expert * n_size + n, n < n_size, 0.0).to(tl.float32)[:, None]
    tl.store(
        out + pair[None, :] * n_size + n[:, None], acc.to(out.dtype.element_ty), real[None, :] & (n < n_size)[:, None]
    )


@triton.jit
def sum_experts(parts, weights, out, n_size, TOP: tl.constexpr, BLOCK: tl.constexpr):
    """A token's `parts[tokens, TOP, n]`, weighted and summed in the router's order, in float32: `out[tokens, n]`."""
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for choice in tl.static_range(TOP):  # unrolled, so that no load waits for the one before
        pair = token * TOP + choice
        part = tl.load(parts + pair * n_size + n, n < n_size, 0.0).to(tl.float32)
        total += part * tl.load(weights + pair).to(tl.float32)
    tl.store(out + token * n_size + n, total.to(out.dtype.element_ty), n < n_size)
