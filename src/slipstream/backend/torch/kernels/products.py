"""Products with weights, whole or quantised."""

import triton
import triton.language as tl

_E4M3, _E2M1 = tl.constexpr(2.0**120), tl.constexpr(2.0**126)
"""What the bias of a float32's exponent differs by from that of such numbers."""


@triton.jit(do_not_specialize=["rows"])
def linear(
    x, weight, scales, zeros, bias, out, parts, rows, n_size, k_size, stride_n, stride_k, scale_rows, scale_columns,
    NUMBER: tl.constexpr, BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    SPAN: tl.constexpr, SPLIT: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """`out[rows, n] = x[rows, k] @ weight[n, k].T + bias[n]`; k in SPLIT parts, summed apart and added in order.

    `APART`: each program sums one of them into `parts[SPLIT, rows, n]`, and `add_parts` adds them to the same bits. For
    the others see `unpacked`.
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
        acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for start in range(split * part, end, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            left = unpacked(
                weight, scales, zeros, n, start, end, n_size, k_size, stride_n, stride_k, scale_rows, scale_columns,
                NUMBER, BLOCK_N, BLOCK_K, SPAN,
            ).to(x.dtype.element_ty)  # fmt: skip
            of_x = m[None, :].to(tl.int64) * k_size + k[:, None]
            right = tl.load(x + of_x, (m < rows)[None, :] & (k < end)[:, None], 0.0)
            acc = tl.dot(left, right, acc, input_precision="ieee")
        total += acc
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
def unpacked(
    weight, scales, zeros, n, start, end, n_size, k_size, stride_n, stride_k, scale_rows, scale_columns,
    NUMBER: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Columns `start` to `end`, at most BLOCK_K, of rows `n` of a weight, 0 beyond them: as it is, or, if `NUMBER` says
    how it's quantised, in float32 (see `Quantised`).

    Strides are those of what is held: of eight codes, if numbers have 4 bits. Each is loaded once. A block of
    `scale_rows, scale_columns` shares a scale and a zero; so do SPAN neighbours, the most of which that is always true.
    """
    row = n[:, None].to(tl.int64)
    within = (n < n_size)[:, None]
    if NUMBER == "" or NUMBER == "e4m3":  # noqa: PLR1714  # Triton knows no `in`
        k = start + tl.arange(0, BLOCK_K)
        found = tl.load(weight + row * stride_n + k[None, :].to(tl.int64) * stride_k, within & (k < end)[None, :], 0.0)
    else:
        held = start // BLOCK_K * (BLOCK_K // 8) + tl.arange(0, BLOCK_K // 8)
        place = weight + row * stride_n + held[None, :].to(tl.int64) * stride_k
        codes = tl.load(place, within & (held * 8 < end)[None, :], 0)
        shifts = tl.arange(0, 8) * 4
        found = tl.reshape((codes[:, :, None] >> shifts[None, None, :]) & 15, [BLOCK_N, BLOCK_K])
    if NUMBER != "":
        span = start + tl.arange(0, BLOCK_K // SPAN) * SPAN
        of_row = (n // scale_rows)[:, None].to(tl.int64) * tl.cdiv(k_size, scale_columns)
        place = of_row + (span // scale_columns)[None, :]
        there = within & (span < end)[None, :]
        if found.dtype == tl.float8e4nv:
            number = found.to(tl.float32)
        elif NUMBER == "e4m3":
            number = _number(found.to(tl.int32), 3, 7, _E4M3)
        elif NUMBER == "e2m1":
            number = _number(found, 1, 3, _E2M1)
        else:
            zero = _spread(tl.load(zeros + place, there, 0).to(tl.int32), BLOCK_N, BLOCK_K, SPAN)
            number = (found - zero).to(tl.float32)
        found = number * _spread(tl.load(scales + place, there, 0.0).to(tl.float32), BLOCK_N, BLOCK_K, SPAN)
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
