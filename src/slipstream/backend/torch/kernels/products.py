"""Products with weights, whole or quantised."""

import triton
import triton.language as tl

_E4M3, _E2M1 = tl.constexpr(2.0**120), tl.constexpr(2.0**14)
"""What such numbers are multiplied by if their bits are taken for those of a float32, or a float16."""
_CODES, _WORDS = tl.constexpr(8), tl.constexpr(4)
"""Codes of 4 bits in an integer, and integers that have those of 32 columns: see `quantised.interleaved`."""


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
    nothing = 0
    if NUMBER == "int4" or NUMBER == "e2m1":  # noqa: PLR1714  # Triton knows no `in`
        nothing = (k_size < 0).to(tl.int32)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    scale = 0
    zero = 0
    if NUMBER != "":
        scale = _shared(scales, of_scales, within, begin, end, BLOCK_K, COLUMNS, SPAN)
    if NUMBER == "int4":
        zero = _shared(zeros, of_scales, within, begin, end, BLOCK_K, COLUMNS, SPAN)
    for start in range(begin, end, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        if NUMBER == "int4" or NUMBER == "e2m1":  # noqa: PLR1714
            words = tl.arange(0, BLOCK_K // _CODES)
            place = of_weight + (words + start // BLOCK_K * (BLOCK_K // _CODES))[None, :].to(tl.int64) * stride_k
            held = tl.load(place, within & (words // _WORDS * _WORDS * _CODES + start < end)[None, :], 0)
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
        number = held.to(tl.float32) if held.dtype == tl.float8e4nv else _number(held.to(tl.int32))
        found = number * scale.to(tl.float32)
    else:
        shape: tl.constexpr = [BLOCK_N, BLOCK_K // 32, 4, _WORDS, 2]
        words = tl.reshape(held, [BLOCK_N, BLOCK_K // 32, 1, _WORDS, 1])
        scale = tl.reshape(scale, shape)
        place = tl.arange(0, 4)[None, None, :, None, None]
        half = tl.arange(0, 2)[None, None, None, None, :]
        if NUMBER == "e2m1":
            found = _floats(words, place, half, nothing).to(tl.float32) * (scale.to(tl.float32) * _E2M1)
        else:
            zero = tl.reshape(_spread(zero, BLOCK_N, BLOCK_K, SPAN).to(tl.float32), shape)
            found = _integers(words, place + 4 * half, scale, zero, nothing)
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
    mask, power = tl.where(odd, 15 << 12, 15 << 16) + nothing, tl.where(odd, 2048.0, 128.0)
    number = _moved(words, first - 4 * code) & mask | tl.where(odd, 0x45000000, 0x43000000)
    number = number.to(tl.float32, bitcast=True)
    if scale.dtype == tl.float32:
        found = (number - (power + zero)) * scale
    else:
        found = tl.fma(number, scale.to(tl.float32), -(power + zero) * scale.to(tl.float32))
    return found


@triton.jit
def _floats(words, place, half, nothing):
    """Codes at such places of halves of words, a sign, two bits of exponent and one of fraction each, divided by _E2M1:
    bits of float16, too, whose exponent has another bias; it may be subnormal, as the number is then.

    Two codes take the operations of one.
    """
    magnitude = _moved(words, 9 - 4 * place) & (0x0E000E00 + nothing)
    sign = (words << 12 - 4 * place) & (-0x7FFF8000 + nothing)
    both = (magnitude | sign) >> 16 * half
    return both.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _moved(words, left):
    """Bits moved to the left, or to the right."""
    return (words << tl.maximum(left, 0)) >> tl.maximum(-left, 0)


@triton.jit
def _spread(of_spans, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPAN: tl.constexpr):
    """What spans share, for each of their columns."""
    each = tl.broadcast_to(of_spans[:, :, None], [BLOCK_N, BLOCK_K // SPAN, SPAN])
    return tl.reshape(each, [BLOCK_N, BLOCK_K])


@triton.jit
def _number(code):
    """Float32 of a sign, four bits of exponent and three of fraction, as `_floats` does it: not every GPU has an
    instruction for that."""
    magnitude, sign = (code & 127) << 20, (code & 128) << 24
    return (magnitude | sign).to(tl.float32, bitcast=True) * _E4M3
