"""Products with weights, whole or quantised."""

import triton
import triton.language as tl

_E4M3, _E2M1 = tl.constexpr(2.0**120), tl.constexpr(2.0**126)
"""What the bias of a float32's exponent differs by from that of such numbers."""
_CODES, _APART = tl.constexpr(8), tl.constexpr(64)
"""Codes of 4 bits in an integer, and columns that it has them of, each the eighth part of these apart."""


@triton.jit(do_not_specialize=["rows"])
def linear(
    x, weight, scales, zeros, bias, out, parts, rows, n_size, k_size, stride_n, stride_k, scale_rows,
    NUMBER: tl.constexpr, BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    COLUMNS: tl.constexpr, SPAN: tl.constexpr, SPLIT: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """`out[rows, n] = x[rows, k] @ weight[n, k].T + bias[n]`; k in SPLIT parts, summed apart and added in order.

    `APART`: each program sums one of them into `parts[SPLIT, rows, n]`, and `add_parts` adds them to the same bits. For
    the others see `multiplied`.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    part = tl.cdiv(tl.cdiv(k_size, BLOCK_K), SPLIT) * BLOCK_K
    first = 0
    if APART:
        first = tl.program_id(2)
    for split in range(first, first + 1 if APART else SPLIT):
        end = tl.minimum(k_size, (split + 1) * part)
        total += multiplied(
            x, m, m < rows, weight, scales, zeros, n, split * part, end, n_size, k_size, stride_n, stride_k, scale_rows,
            NUMBER, BLOCK_N, BLOCK_M, BLOCK_K, COLUMNS, SPAN,
        )  # fmt: skip
    if APART:
        _finish(parts + tl.program_id(2).to(tl.int64) * rows * n_size, total, bias, n, m, n_size, rows, False)
    else:
        _finish(out, total, bias, n, m, n_size, rows, BIAS)


@triton.jit
def _finish(out, acc, bias, n, m, n_size, rows, BIAS: tl.constexpr):
    """Add the bias to a tile `acc[n, m]` of a product, and put it into `out[m, n]`."""
    if BIAS:
        acc += tl.load(bias + n, n < n_size, 0.0).to(tl.float32)[:, None]
    place = out + m[None, :].to(tl.int64) * n_size + n[:, None]
    tl.store(place, acc.to(out.dtype.element_ty), (m < rows)[None, :] & (n < n_size)[:, None])


@triton.jit(do_not_specialize=["rows"])
def add_parts(
    parts, bias, out, rows, n_size,
    BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """The second half of `linear` if its parts are summed apart."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for split in range(SPLIT):
        place = parts + (split * rows + m[None, :]).to(tl.int64) * n_size + n[:, None]
        total += tl.load(place, (m < rows)[None, :] & (n < n_size)[:, None], 0.0)
    _finish(out, total, bias, n, m, n_size, rows, BIAS)


@triton.jit
def multiplied(
    x, row, real, weight, scales, zeros, n, begin, end, n_size, k_size, stride_n, stride_k, scale_rows,
    NUMBER: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    COLUMNS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Rows `n` of a weight times rows `row` of `x`, if they are `real`: a sum of the columns from `begin` to `end`,
    float32 [BLOCK_N, BLOCK_M].

    `NUMBER` says how the weight is quantised, if it is (see `Quantised`), and strides are those of what is held.
    `scale_rows` rows share a scale and a zero for COLUMNS columns, or for whole rows if these are 0; so do SPAN
    neighbours, the most of which that is always true.
    """
    within = (n < n_size)[:, None]
    of_weight = weight + n[:, None].to(tl.int64) * stride_n
    of_scales = (n // scale_rows)[:, None].to(tl.int64)
    if COLUMNS != 0:
        of_scales *= tl.cdiv(k_size, COLUMNS)
    of_x = x + row[None, :].to(tl.int64) * k_size
    nothing = (n_size < 0).to(tl.int32)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    scale = 0
    zero = 0
    if NUMBER != "":
        scale = _shared(scales, of_scales, within, begin, end, BLOCK_K, COLUMNS, SPAN)
    if NUMBER == "int4":
        zero = _shared(zeros, of_scales, within, begin, end, BLOCK_K, COLUMNS, SPAN)
    for start in range(begin, end, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        if NUMBER == "int4" or NUMBER == "e2m1":  # noqa: PLR1714  # Triton knows no `in`
            words = tl.arange(0, BLOCK_K // _CODES)
            place = of_weight + (words + start // BLOCK_K * (BLOCK_K // _CODES))[None, :].to(tl.int64) * stride_k
            held = tl.load(place, within & (words // _CODES * _APART + start < end)[None, :], 0)
        else:
            held = tl.load(of_weight + k[None, :].to(tl.int64) * stride_k, within & (k < end)[None, :], 0.0)
        right = tl.load(of_x + k[:, None], real[None, :] & (k < end)[:, None], 0.0)
        if NUMBER == "":
            left = held
        else:
            left = _unpacked(held, scale, zero, nothing, NUMBER, BLOCK_N, BLOCK_K, SPAN).to(x.dtype.element_ty)
            # Asked for ahead of their use: they are too small for Triton to do that, and all would wait for them.
            scale = _shared(scales, of_scales, within, start + BLOCK_K, end, BLOCK_K, COLUMNS, SPAN)
            if NUMBER == "int4":
                zero = _shared(zeros, of_scales, within, start + BLOCK_K, end, BLOCK_K, COLUMNS, SPAN)
        acc = tl.dot(left, right, acc, input_precision="ieee")
    return acc


@triton.jit
def _shared(values, of_row, within, start, end, BLOCK_K: tl.constexpr, COLUMNS: tl.constexpr, SPAN: tl.constexpr):
    """What the spans of a tile's rows share, from column `start` on."""
    column = start + tl.arange(0, BLOCK_K // SPAN) * SPAN
    group = column // COLUMNS if COLUMNS != 0 else column * 0
    return tl.load(values + of_row + group[None, :], within & (column < end)[None, :], 0)


@triton.jit
def _unpacked(
    held, scale, zero, nothing, NUMBER: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPAN: tl.constexpr
):
    """What a tile [n, k] of a quantised weight stands for, in float32: see `Quantised`."""
    scale = _spread(scale, BLOCK_N, BLOCK_K, SPAN)
    if NUMBER == "e4m3":
        number = held.to(tl.float32) if held.dtype == tl.float8e4nv else _number(held.to(tl.int32), 3, 7, _E4M3)
        found = number * scale.to(tl.float32)
    else:
        words = tl.reshape(held, [BLOCK_N, BLOCK_K // _APART, 1, _CODES])
        scale = tl.reshape(scale, [BLOCK_N, BLOCK_K // _APART, _CODES, _CODES])
        code = tl.arange(0, _CODES)[None, None, :, None]
        if NUMBER == "e2m1":
            found = _number(words >> 4 * code, 1, 3, _E2M1) * scale.to(tl.float32)
        else:
            zero = tl.reshape(_spread(zero, BLOCK_N, BLOCK_K, SPAN).to(tl.float32), scale.shape)
            found = _integers(words, code, scale, zero, nothing)
        found = tl.reshape(found, [BLOCK_N, BLOCK_K])
    return found


@triton.jit
def _integers(words, code, scale, zero, nothing):
    """(code - zero) * scale, in float32, of the codes at these places of words.

    A code lies among the bits of a float32's fraction where it adds as many to a power of two. If the scale has few
    bits, subtracting that power with the zero, and multiplying, is one operation without a rounding. Few operations
    matter here: small steps take as long as they do. `nothing` is a 0 that the assembler can't know: it would put a
    constant mask into a register anew for each code.
    """
    odd = code % 2 == 1
    first = tl.where(odd, 12, 16)
    moved = (words << tl.maximum(first - 4 * code, 0)) >> tl.maximum(4 * code - first, 0)
    mask, power = tl.where(odd, 15 << 12, 15 << 16) + nothing, tl.where(odd, 2048.0, 128.0)
    number = (moved & mask | tl.where(odd, 0x45000000, 0x43000000)).to(tl.float32, bitcast=True)
    if scale.dtype == tl.float32:
        found = (number - (power + zero)) * scale
    else:
        found = tl.fma(number, scale.to(tl.float32), -(power + zero) * scale.to(tl.float32))
    return found


@triton.jit
def _spread(of_spans, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPAN: tl.constexpr):
    """What spans share, for each of their columns."""
    each = tl.broadcast_to(of_spans[:, :, None], [BLOCK_N, BLOCK_K // SPAN, SPAN])
    return tl.reshape(each, [BLOCK_N, BLOCK_K])


@triton.jit
def _number(code, FRACTION: tl.constexpr, SIZE: tl.constexpr, REBIAS: tl.constexpr):
    """Float32 of a sign and SIZE bits, FRACTION of them of fraction and the others of exponent.

    These are bits of a float32, too, whose exponent has another bias; it may be subnormal, as the number is then. Few
    operations matter here: small steps take as long as they do. And not every GPU has an instruction for it.
    """
    magnitude = (code & ((1 << SIZE) - 1)) << (23 - FRACTION)
    sign = (code & (1 << SIZE)) << (31 - SIZE)
    return (magnitude | sign).to(tl.float32, bitcast=True) * REBIAS
