"""What is computed row by row: norms, gates, and the likeliest token."""

import triton
import triton.language as tl


@triton.jit
def gate(
    x, factor, out, width, x_stride, factor_stride, BY_TANH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Elements of a row times those of a row `x` through SiLU, or through GELU by its approximation with tanh."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = column < width
    value = tl.load(x + row * x_stride + column, real, 0.0).to(tl.float32)
    inner = value
    if BY_TANH:  # (1 + tanh(y)) / 2 is 1 / (1 + exp(-2 y))
        inner = 1.5957691216057308 * (value + 0.044715 * value * value * value)
    gated = (value / (1.0 + tl.exp(-inner))).to(out.dtype.element_ty).to(tl.float32)
    other = tl.load(factor + row * factor_stride + column, real, 0.0).to(tl.float32)
    tl.store(out + row * width + column, (gated * other).to(out.dtype.element_ty), real)


@triton.jit
def gate_clamped(both, out, width, alpha, limit, BLOCK: tl.constexpr):
    """Rows of neighbours `both[rows, 2 * width]`, of which one gates the other, as `definitions.gated` has it."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = column < width
    place = both + (row * width + column) * 2
    kind = out.dtype.element_ty
    x = tl.minimum(tl.load(place, real, 0.0).to(tl.float32), limit)
    y = tl.minimum(tl.maximum(tl.load(place + 1, real, 0.0).to(tl.float32), -limit), limit)
    share = (1.0 / (1.0 + tl.exp(-(x * alpha).to(kind).to(tl.float32)))).to(kind).to(tl.float32)
    gating = (x * share).to(kind).to(tl.float32)
    tl.store(out + row * width + column, ((y + 1.0).to(kind).to(tl.float32) * gating).to(kind), real)


@triton.jit(do_not_specialize=["rows"])
def norm(
    first, second, total, weight, out, eps, rows, outer_stride, row_stride,
    ADD: tl.constexpr, ROUNDS_FIRST: tl.constexpr, OFFSET: tl.constexpr, CENTRED: tl.constexpr,
    SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row of `[..., rows, SIZE]` normed, of `first`; or of `first + second`, which is left in `total`.

    Strides are those of `first`; what else there is lies row by row. See `definitions.normed`.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    place = row * SIZE + column
    real = column < SIZE
    of_first = row // rows * outer_stride + row % rows * row_stride + column
    x = tl.load(first + of_first, real, 0.0).to(tl.float32)
    if ADD:
        added = (x + tl.load(second + place, real, 0.0).to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + place, added, real)
        x = added.to(tl.float32)
    if CENTRED:
        x = tl.where(real, x - tl.sum(x) / SIZE, 0.0)
    x = x * tl.rsqrt(tl.sum(x * x) / SIZE + eps)
    if ROUNDS_FIRST:
        x = x.to(out.dtype.element_ty).to(tl.float32)
    factor = tl.load(weight + column, real, 0.0).to(tl.float32)
    if OFFSET:
        factor += 1.0
    tl.store(out + place, (factor * x).to(out.dtype.element_ty), real)


@triton.jit(do_not_specialize=["words"])
def argmax_parts(
    logits, row_numbers, masks, peaks, firsts, words, MASKED: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The highest of a part of a row's logits `[SIZE]`, and the lowest token that has it.

    `MASKED`: of the row that `row_numbers` names, and only of tokens whose bit is set in a mask `[words]`; a tokenizer
    may have more of them than there are logits.
    """
    part, number = tl.program_id(0), tl.program_id(1).to(tl.int64)
    token = part * BLOCK + tl.arange(0, BLOCK)
    row = number
    if MASKED:
        row = tl.load(row_numbers + number)
    x = tl.load(logits + row * SIZE + token, token < SIZE, float("-inf")).to(tl.float32)
    x = tl.where(x != x, float("inf"), x)  # noqa: PLR0124  # one that isn't a number comes first, as on the host
    if MASKED:
        allowed = tl.load(masks + number * words + token // 32, token < SIZE, 0) >> (token % 32) & 1
        x = tl.where(allowed == 1, x, float("-inf"))
    peak = tl.max(x, 0)
    place = number * tl.num_programs(0) + part
    tl.store(peaks + place, peak)
    tl.store(firsts + place, tl.min(tl.where(x == peak, token, SIZE), 0))


@triton.jit
def argmax(peaks, firsts, likeliest, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """The token of a row from the highest logits of its parts, where several have it the lowest one's; -1 if it's
    infinite."""
    row, part = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    there = part < PARTS
    x = tl.load(peaks + row * PARTS + part, there, float("-inf"))
    first = tl.load(firsts + row * PARTS + part, there, 2**31 - 1)
    peak = tl.max(x, 0)
    token = tl.min(tl.where(x == peak, first, 2**31 - 1), 0)
    tl.store(likeliest + row, tl.where(tl.abs(peak) < float("inf"), token, -1).to(tl.int64))
