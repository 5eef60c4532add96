"""`Operators` as Triton kernels: how they are launched."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
import torch.nn.functional as F
import triton

from slipstream.backend.torch.definitions import ClampedGate, Norm
from slipstream.backend.torch.held import OPTIONS, Tiling, held_of
from slipstream.backend.torch.kernels import attention, by_row, experts, products
from slipstream.backend.torch.operators import SEGMENT, TOKEN_TILES, Activation, AttentionShape, Rotating, Step, Tensor
from slipstream.backend.torch.plain import Unfused
from slipstream.backend.torch.quantised import Quantised, Weight

KEYS = 64
"""Of attention, at a time."""
QUERY_TILES = (16,) if torch.version.hip else (16, 32, 64)
"""Rows of queries in a tile, the smallest that holds a chunk's: the more, the less often keys are read. For AMD, and
for float32, which no matrix unit multiplies, Triton would sum weights in another order for others."""
_TILE_BYTES = 1 << 14
"""Of a tile's queries: with more of them sums don't fit into registers, or keys beside them into shared memory."""
_PAIRS, _COLUMNS = 1024, 512
"""Pairs of a token and an expert that a program looks at at a time, and columns of a token that one sums."""
TOKENS = 2048
"""Of the vocabulary, among which a program finds the likeliest: 75 of them share a row of 152,000, which is often a
step's only one, and a thread loads its 16 logits at once. One program would load for as long as forty."""
_PARTIAL_SUMS = 1 << 26
"""Floats that attention's sums by segment may take: longer steps are computed in several parts."""

_EVEN = 4
"""Floats in 16 bytes: at other places a kernel is compiled anew, for it depends on how even its arguments are."""

_TILES = 64
"""Of a chunk, that a program notes at a time."""
_GATED = 1024
"""Elements that a program gates."""


class KernelOperators:
    """`Operators` for a GPU that Triton compiles for."""

    name = f"kernels 7, triton {triton.__version__}, {KEYS}, {SEGMENT}, {Tiling()}"
    recordable = True
    may_be_slower = False
    _query_tiles: tuple[int, ...] = QUERY_TILES

    def __init__(self, tiling: Tiling = Tiling()) -> None:  # noqa: B008  # it's frozen
        self._tiling = tiling
        self.name = self.name.replace(str(Tiling()), str(tiling))
        self._tiles: tuple[Step, int, Tensor] | None = None

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        """See `Operators.linear`."""
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        n_size, k_size = weight.shape
        held = held_of(weight)
        out = x.new_empty(len(rows), n_size)
        tile, split = token_tile(len(rows)), self._tiling.parts(n_size, k_size)
        grid = triton.cdiv(n_size, self._tiling.block_n), triton.cdiv(len(rows), tile)
        apart = split > 1 and grid[1] == 1
        parts = x.new_empty(split, *out.shape, dtype=torch.float32) if apart else out
        common = {"BIAS": bias is not None, "SPLIT": split}
        biases = out if bias is None else bias
        products.linear[*grid, split if apart else 1](
            rows, *held.tensors, biases, out, parts, len(rows), n_size, k_size, *held.strides, held.scale_rows,
            APART=apart, **common, **held.options(self._tiling, tile, x),
        )  # fmt: skip
        if apart:
            products.add_parts[grid](
                parts, biases, out, len(rows), n_size, BLOCK_N=self._tiling.block_n, BLOCK_M=tile, **common, **OPTIONS
            )
        return out.view(*x.shape[:-1], n_size)

    def activate(self, given: Activation) -> Tensor:
        """See `Operators.activate`: on a GPU all elements are computed alike."""
        return given.function(given.x, **given.options)

    def gate(self, given: Activation, x: Tensor) -> Tensor:
        """See `Operators.gate`."""
        by_tanh = given.function is F.gelu and given.options.get("approximate") == "tanh"
        if given.function is not F.silu and not by_tanh:
            return self.activate(given) * x
        width = x.shape[-1]
        gates, factors = given.x.reshape(-1, width), x.reshape(-1, width)
        assert gates.stride(1) == factors.stride(1) == 1
        out = x.new_empty(x.shape)
        by_row.gate[len(gates), triton.cdiv(width, _GATED)](
            gates, factors, out, width, gates.stride(0), factors.stride(0), BY_TANH=by_tanh, BLOCK=_GATED, **OPTIONS
        )
        return out

    def gate_clamped(self, both: Tensor, gate: ClampedGate) -> Tensor:
        """See `Operators.gate_clamped`."""
        rows, width = len(both), both.shape[1] // 2
        out = both.new_empty(rows, width)
        by_row.gate_clamped[rows, triton.cdiv(width, _GATED)](
            both.contiguous(), out, width, gate.alpha, gate.limit, BLOCK=_GATED, **OPTIONS
        )
        return out

    def attend(self, query: Tensor, kv: Tensor, step: Step, shape: AttentionShape, sinks: Tensor | None) -> Tensor:
        """See `Operators.attend`."""
        count, heads, dim = query.shape
        _, _, kv_heads, block, _ = kv.shape
        group = heads // kv_heads
        dims = triton.next_power_of_2(dim)
        rows = max(self._query_rows(step.longest * group, dims, query.itemsize), triton.next_power_of_2(group))
        tiles, segments = self._tiles_of(step, rows // group), step.segments
        most = max(1, min(count, _PARTIAL_SUMS // (heads * segments * dim)))  # tokens at a time
        size = -(-most * heads * segments // _EVEN) * _EVEN
        part = query.new_empty(size * (dim + 2), dtype=torch.float32)
        sums, peaks, totals = part[: size * dim], part[size * dim : size * (dim + 1)], part[size * (dim + 1) :]
        out, table = query.new_empty(query.shape), step.tables[:, shape.table]
        assert query.stride(2) == 1
        common = {"HEADS": heads, "DIM": dim, "DIMS": dims, "SEGMENT": SEGMENT}
        for first in range(0, count, most):
            end = min(first + most, count)
            attention.attend[len(tiles), kv_heads, segments](
                query, kv, table, step.table_begins, step.pasts, step.begins, tiles, sums, peaks, totals, first, end,
                segments, shape.scale, *query.stride()[:2], table.stride(0), *kv.stride()[:3],
                GROUP=group, BLOCK=block, KEYS=KEYS, ROWS=rows, WINDOW=shape.window, CAP=shape.softcap,
                **common, **OPTIONS,
            )  # fmt: skip
            attention.combine[end - first, heads](
                sums, peaks, totals, step.positions, query if sinks is None else sinks, out, first, segments,
                WINDOW=shape.window, SINKS=sinks is not None, **common, **OPTIONS,
            )  # fmt: skip
        return out

    def write(self, kv: Tensor, key: Tensor, value: Tensor, blocks: Tensor, slots: Tensor) -> None:
        """See `Operators.write`."""
        count, heads, dim = key.shape
        assert key.stride(2) == value.stride(2) == 1
        attention.write[count, heads](
            kv, key, value, blocks, slots, *kv.stride()[:3], *key.stride()[:2], *value.stride()[:2],
            DIM=dim, DIMS=triton.next_power_of_2(dim), **OPTIONS,
        )  # fmt: skip

    def experts(self, module: Any, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """See `Operators.experts`."""
        top, size = index.shape[1], x.shape[1]
        pairs = expert_pairs(index, module.num_experts)
        up = self._experts_linear(module, "gate_up_proj", x.contiguous(), top, pairs)
        parts = self._experts_linear(module, "down_proj", module._apply_gate(up).contiguous(), 1, pairs)
        out = x.new_empty(x.shape)
        grid = len(x), triton.cdiv(size, _COLUMNS)
        experts.sum_experts[grid](parts, weights.contiguous(), out, size, TOP=top, BLOCK=_COLUMNS, **OPTIONS)
        return out

    def norm(self, x: Tensor, weight: Tensor, norm: Norm, terms: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """See `Operators.norm`."""
        first, second = terms or (x, x)
        out, size = x.new_empty(x.shape), len(weight)
        block = triton.next_power_of_2(size)
        assert first.stride(-1) == 1
        assert all(length == 1 for length in x.shape[:-3])
        by_row.norm[x.numel() // size,](
            first, second, x, weight, out, norm.eps, x.shape[-2], *(0, *first.stride())[-3:-1],
            ADD=terms is not None, ROUNDS_FIRST=norm.rounds_first, OFFSET=norm.offset, CENTRED=norm.centred,
            SIZE=size, BLOCK=block, num_warps=min(max(block // 512, 1), 16), **OPTIONS,
        )  # fmt: skip
        return out

    def rotate(self, given: Rotating, query: Tensor, key: Tensor) -> None:
        """See `Operators.rotate`."""
        _rotate(given, query, key, key.stride()[1:3])

    def rotate_and_write(self, given: Rotating, value: Tensor, kv: Tensor, blocks: Tensor, slots: Tensor) -> Tensor:
        """See `Operators.rotate_and_write`."""
        block, of_values, head = kv.stride()[:3]
        query = torch.empty_like(given.query)
        _rotate(given, query, kv, (head, block), (value, of_values, blocks, slots))
        return query

    def argmax(self, logits: Tensor, masked: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """See `Operators.argmax`; by parts of the vocabulary, and then of these."""
        logits = logits.contiguous()
        size = logits.shape[1]
        parts = triton.cdiv(size, TOKENS)
        rows, masks = masked or (logits, logits)
        count = len(rows)
        peaks = logits.new_empty(count, parts, dtype=torch.float32)
        firsts = logits.new_empty(count, parts, dtype=torch.int32)
        tokens = logits.new_empty(count, dtype=torch.int64)
        by_row.argmax_parts[parts, count](
            logits, rows, masks, peaks, firsts, masks.shape[1],
            MASKED=masked is not None, SIZE=size, BLOCK=TOKENS, **OPTIONS,
        )  # fmt: skip
        by_row.argmax[count,](
            peaks, firsts, tokens, PARTS=parts, BLOCK=triton.next_power_of_2(parts), num_warps=1, **OPTIONS
        )
        return tokens

    def _experts_linear(self, module: Any, name: str, x: Tensor, share: int, pairs: "Pairs") -> Tensor:
        """`[pairs, n]`, in the order of tokens and of each one's experts."""
        weight = getattr(module, name)
        held = held_of(weight.mT if module.is_transposed else weight)
        bias = getattr(module, f"{name}_bias") if module.has_bias else None
        n_size, k_size = held.shape
        out = x.new_empty(len(pairs.order), n_size)
        experts.experts_linear[triton.cdiv(n_size, self._tiling.block_n), len(pairs.tiles)](
            x, *held.tensors, x if bias is None else bias, out, pairs.order, pairs.tiles, n_size, k_size,
            *held.strides, held.scale_rows, *held.expert_strides, share,
            BIAS=bias is not None, **held.options(self._tiling, TOKEN_TILES[0], x),
        )  # fmt: skip
        return out

    def _query_rows(self, wanted: int, dims: int, itemsize: int) -> int:
        """Those of a tile for a chunk that has so many, of so many elements."""
        tiles = self._query_tiles if itemsize == 2 else QUERY_TILES[:1]
        fitting = [rows for rows in tiles if rows * dims * itemsize <= _TILE_BYTES] or QUERY_TILES[:1]
        return next((rows for rows in fitting if wanted <= rows), fitting[-1])

    def _tiles_of(self, step: Step, tokens: int) -> Tensor:
        """Chunks in tiles of so many tokens: see `query_tiles`; once for all layers of a step."""
        if self._tiles is None or self._tiles[0] is not step or self._tiles[1] != tokens:
            self._tiles = step, tokens, query_tiles(step.begins, step.tokens.shape[1], tokens)
        return self._tiles[2]


class LibraryOperators(KernelOperators):
    """The same, but for products of whole weights of 16 bits, which are a library's that sums up a row in one part.

    A self-test shows whether its kernels for all numbers of rows add up in the same order, as Hopper's may.
    """

    name = f"library's products, {KernelOperators.name}"
    may_be_slower = True

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        """See `Operators.linear`."""
        if isinstance(weight, Quantised) or weight.itemsize != 2:
            return super().linear(x, weight, bias)
        with _in_one_part():
            return F.linear(x.contiguous(), weight, bias)


class UnfusedOperators(Unfused, KernelOperators):
    """The same, but for norms, rotations and gates, which are torch's own: several kernels in place of one."""

    name = f"unfused {KernelOperators.name}"
    _query_tiles = QUERY_TILES[:1]


_SET = Lock()
"""Held while torch is told something for the whole process."""


@contextmanager
def _in_one_part() -> Iterator[None]:
    """Products are cuBLASLt's, and none splits its sums: other libraries can't be told that. Other threads wait."""
    matmul = torch.backends.cuda.matmul
    kinds = "allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction"
    with _SET:
        library = torch.backends.cuda.preferred_blas_library()
        before = [(kind, (getattr(matmul, kind), getattr(matmul, f"{kind}_split_k"))) for kind in kinds]
        torch.backends.cuda.preferred_blas_library("cublaslt")
        try:
            for kind in kinds:
                setattr(matmul, kind, (False, False))
            yield
        finally:
            for kind, allowed in before:
                setattr(matmul, kind, allowed)
            torch.backends.cuda.preferred_blas_library(library)


def _rotate(
    given: Rotating,
    out: Tensor,
    keys: Tensor,
    keys_strides: Sequence[int],
    written: tuple[Tensor, int, Tensor, Tensor] | None = None,
) -> None:
    """Turn queries into `out`, and keys into `keys`: into slots there, if values and their stride, blocks and slots are
    given."""
    query, key, rotation = given.query, given.key, given.rotation
    value, of_values, blocks, slots = written or (key, 0, key, key)
    _, heads, count, dim = query.shape
    kv_heads = key.shape[1]
    assert all(each.stride(3) == 1 for each in (query, key, value, out))
    cos, sin = given.cos, given.sin
    assert cos.stride() == sin.stride()
    attention.rotate[count, heads + kv_heads * (1 if written is None else 2)](
        query, key, value, cos, sin, out, keys, blocks, slots, *query.stride()[1:3], *key.stride()[1:3],
        *value.stride()[1:3], *out.stride()[1:3], *keys_strides, of_values, *cos.stride()[1:],
        HEADS=heads, KV_HEADS=kv_heads, DIM=dim, DIMS=triton.next_power_of_2(dim), WIDTH=rotation.width,
        NEIGHBOURS=rotation.neighbours, BY_PAIR=rotation.by_pair, WIDE=rotation.wide, WRITE=written is not None,
        num_warps=1, **OPTIONS,
    )  # fmt: skip


def _most_tiles(groups: int, elements: int, tile: int) -> int:
    """How many tiles so many groups have places for; see `kernels.tiles`."""
    return min(elements, groups + elements // tile)


def query_tiles(begins: Tensor, count: int, tokens: int) -> Tensor:
    """The chunk and the first token in it of each tile, int32 [tiles, 2], of chunks that have `count` tokens together.

    How many there are is bounded by shapes alone, so the host need not know.
    """
    chunks = len(begins) - 1
    tiles = begins.new_empty(_most_tiles(chunks, count, tokens), 2)
    attention.query_tiles[chunks,](begins, tiles, TOKENS=tokens, BLOCK=_TILES, **OPTIONS)
    return tiles


def token_tile(rows: int) -> int:
    """The tile that a product of so many rows is computed in."""
    return next((tile for tile in TOKEN_TILES if rows <= tile), TOKEN_TILES[-1])


@dataclass(frozen=True, slots=True)
class Pairs:
    """Pairs of a token and one of its experts, int32; see `experts.expert_tiles`."""

    order: Tensor
    tiles: Tensor


def expert_pairs(index: Tensor, count: int) -> Pairs:
    """Those of a router's choices. How many tiles there are is bounded by shapes alone, so the host need not wait."""
    size, tile = index.numel(), TOKEN_TILES[0]
    order = index.new_empty(size, dtype=torch.int32)
    tiles = index.new_empty(_most_tiles(count, size, tile), 3, dtype=torch.int32)
    experts.expert_tiles[count,](index.contiguous(), order, tiles, size, TILE=tile, BLOCK=_PAIRS, **OPTIONS)
    return Pairs(order, tiles)
