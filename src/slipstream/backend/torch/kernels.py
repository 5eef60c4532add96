"""The same operators as Triton kernels, each with a fixed order of sums.

A kernel's blocks have constant sizes, but for the tile of tokens in products, which grows with the step. Weights take
the tall side of the matrix unit there (`out.T = weight @ x.T`), so a tile of 16 to 128 tokens is the unit's other side
and becomes the same kind of instruction, which adds up in the same order; and 16 tokens waste nothing. Products of
float32 ask for `ieee`, since TF32 is the default. Sizes that differ from step to step are not specialised on: one
program serves all steps.
"""

import triton
import triton.language as tl


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
        found = tl.load(weight + row * stride_n + k[None, :].to(tl.int64) * stride_k, within & (k < end)[None, :], 0)
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
        if NUMBER == "e4m3":
            number = _e4m3(found.to(tl.int32))
        elif NUMBER == "e2m1":
            number = _e2m1(found)
        else:
            number = (found - _spread(tl.load(zeros + place, there, 0).to(tl.int32), BLOCK_N, BLOCK_K, SPAN)).to(
                tl.float32
            )
        found = number * _spread(tl.load(scales + place, there, 0.0).to(tl.float32), BLOCK_N, BLOCK_K, SPAN)
    return found


@triton.jit
def _spread(of_spans, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPAN: tl.constexpr):
    """What spans share, for each of their columns."""
    each = tl.broadcast_to(of_spans[:, :, None], [BLOCK_N, BLOCK_K // SPAN, SPAN])
    return tl.reshape(each, [BLOCK_N, BLOCK_K])


@triton.jit
def _e2m1(code):
    """Float32 of a sign, two bits of exponent and one of fraction."""
    magnitude = code & 7
    large = (((magnitude & 1) + 2) << (magnitude >> 1)).to(tl.float32) * 0.25
    value = tl.where(magnitude < 2, magnitude.to(tl.float32) * 0.5, large)
    return tl.where(code > 7, -value, value)


@triton.jit
def _e4m3(bits):
    """Float32 of a sign, four bits of exponent and three of fraction; not every GPU has an instruction for it."""
    magnitude = bits & 127
    large = ((magnitude << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    value = tl.where(magnitude < 8, magnitude.to(tl.float32) * 0.001953125, large)
    return tl.where(bits > 127, -value, value)


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


@triton.jit(
    do_not_specialize=[
        "head_stride", "row_stride", "key_head_stride", "key_row_stride", "value_head_stride", "value_row_stride",
        "out_head_stride", "out_row_stride", "keys_head_stride", "keys_row_stride",
    ]
)  # fmt: skip
def rotate(
    query, key, value, cos, sin, out, keys, blocks, slots, head_stride, row_stride, key_head_stride, key_row_stride,
    value_head_stride, value_row_stride, out_head_stride, out_row_stride, keys_head_stride, keys_row_stride,
    values_stride, angles,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr, WIDTH: tl.constexpr,
    NEIGHBOURS: tl.constexpr, BY_PAIR: tl.constexpr, WIDE: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """A head of a token's queries turned, or of its keys behind these, as `definitions.rotated` has it.

    `WRITE`: `keys` are KV, of which keys take the token's slot; and so do its values, which come behind them.
    """
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    angle = token * angles
    if head < HEADS:
        row, place = query + token * row_stride + head * head_stride, out + token * out_row_stride
        place += head * out_head_stride
        _turn(row, cos + angle, sin + angle, place, DIM, DIMS, WIDTH, NEIGHBOURS, BY_PAIR, WIDE)
        return
    of_keys = (head - HEADS) % KV_HEADS
    place = keys + of_keys * keys_head_stride
    if WRITE:
        place += tl.load(blocks + token) * keys_row_stride + tl.load(slots + token) * DIM
    else:
        place += token * keys_row_stride
    if head < HEADS + KV_HEADS:
        row = key + token * key_row_stride + of_keys * key_head_stride
        _turn(row, cos + angle, sin + angle, place, DIM, DIMS, WIDTH, NEIGHBOURS, BY_PAIR, WIDE)
    else:
        d = tl.arange(0, DIMS)
        row = value + token * value_row_stride + of_keys * value_head_stride
        tl.store(place + values_stride + d, tl.load(row + d, d < DIM), d < DIM)


@triton.jit
def _turn(
    x, cos, sin, out, DIM: tl.constexpr, DIMS: tl.constexpr, WIDTH: tl.constexpr,
    NEIGHBOURS: tl.constexpr, BY_PAIR: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, DIMS)
    turns = d < WIDTH
    if NEIGHBOURS:
        other, pair, leads = d ^ 1, d // 2, d % 2 == 0
    else:
        other, pair, leads = (d + WIDTH // 2) % WIDTH, d % (WIDTH // 2), d < WIDTH // 2
    angle = pair if BY_PAIR else d
    own = tl.load(x + d, d < DIM, 0.0)
    across = tl.load(x + other, turns, 0.0).to(tl.float32)
    along = own.to(tl.float32) * tl.load(cos + angle, turns, 0.0).to(tl.float32)
    across = tl.where(leads, -across, across) * tl.load(sin + angle, turns, 0.0).to(tl.float32)
    if not WIDE:
        along = along.to(out.dtype.element_ty).to(tl.float32)
        across = across.to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + d, tl.where(turns, (along + across).to(out.dtype.element_ty), own), d < DIM)


@triton.jit
def write(
    kv, key, value, blocks, slots, block_stride, value_stride, head_stride,
    key_stride, key_head_stride, value_row_stride, value_head_stride,
    DIM: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """Put a token's keys and values `[tokens, heads, DIM]` into its slot."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, DIMS)
    place = tl.load(blocks + token) * block_stride + head * head_stride + tl.load(slots + token) * DIM + d
    of_key, of_value = token * key_stride + head * key_head_stride, token * value_row_stride + head * value_head_stride
    tl.store(kv + place, tl.load(key + of_key + d, d < DIM), d < DIM)
    tl.store(kv + value_stride + place, tl.load(value + of_value + d, d < DIM), d < DIM)


@triton.jit(do_not_specialize=["first_token", "end_token", "segments"])
def attend(
    query, kv, table, table_begins, pasts, begins, tiles, part, part_peak, part_sum, first_token, end_token, segments,
    scale, query_stride, query_head_stride, table_stride, block_stride, value_stride, head_stride,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, SEGMENT: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """One tile of queries, a few tokens times the heads that share keys, against one segment of its sequence's keys.

    Of the step's tokens, those from `first_token` to `end_token` are wanted. `table` is a column of the step's tables.
    Leaves, for each token, head and segment, the values summed by weight, the highest score and the sum of weights.
    """
    tile, head, segment = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    TOKENS: tl.constexpr = ROWS // GROUP
    chunk, first = tl.load(tiles + 2 * tile), tl.load(tiles + 2 * tile + 1)
    begin = tl.load(begins + chunk)
    count = tl.load(begins + chunk + 1) - begin
    past = tl.load(pasts + chunk)
    last = past + tl.minimum(first + TOKENS, count)  # keys that the tile's last token sees
    if segment * SEGMENT >= last:
        return
    if (begin + first >= end_token) | (begin + first + TOKENS <= first_token):
        return
    if (WINDOW > 0) & ((segment + 1) * SEGMENT <= past + first + 1 - WINDOW):
        return
    rows = tl.arange(0, ROWS)
    token = first + rows // GROUP
    real = (rows < TOKENS * GROUP) & (token < count)
    position = past + token
    heads = head * GROUP + rows % GROUP
    d = tl.arange(0, DIMS)
    at = (begin + token).to(tl.int64) * query_stride + heads * query_head_stride
    queries = tl.load(query + at[:, None] + d[None, :], real[:, None] & (d < DIM)[None, :], 0.0)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIMS], tl.float32)
    slots = tl.arange(0, BLOCK)
    blocks = table + tl.load(table_begins + chunk) * table_stride
    for start in range(segment * SEGMENT, tl.minimum(last, (segment + 1) * SEGMENT), BLOCK):
        block = tl.load(blocks + start // BLOCK * table_stride).to(tl.int64)
        base = kv + block * block_stride + head * head_stride + slots[:, None] * DIM + d[None, :]
        key = start + slots
        there = (key < last)[:, None] & (d < DIM)[None, :]
        scores = tl.dot(queries, tl.trans(tl.load(base, there, 0.0)), input_precision="ieee") * scale
        if CAP > 0:
            small = tl.exp(-2.0 * tl.abs(scores) / CAP)
            squeezed = (1 - small) / (1 + small)
            scores = CAP * tl.where(scores < 0, -squeezed, squeezed)
        seen = key[None, :] <= position[:, None]
        if WINDOW > 0:
            seen = seen & (key[None, :] > position[:, None] - WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
        top = tl.maximum(peak, tl.max(scores, 1))
        safe = tl.where(top == float("-inf"), 0.0, top)
        weights = tl.exp(scores - safe[:, None])
        fade = tl.exp(peak - safe)
        values = tl.load(base + value_stride, there, 0.0)
        total = total * fade + tl.sum(weights, 1)
        acc = acc * fade[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        peak = top
    real = real & (begin + token >= first_token) & (begin + token < end_token)
    place = ((begin + token - first_token).to(tl.int64) * HEADS + heads) * segments + segment
    tl.store(part + place[:, None] * DIM + d[None, :], acc, real[:, None] & (d < DIM)[None, :])
    tl.store(part_peak + place, peak, real)
    tl.store(part_sum + place, total, real)


@triton.jit(do_not_specialize=["first_token", "segments"])
def combine(
    part, part_peak, part_sum, positions, sinks, out, first_token, segments,
    HEADS: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr, SEGMENT: tl.constexpr, WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
):  # fmt: skip
    """The segments of a token and head, in order: the one place where their sums meet."""
    token, head = tl.program_id(0), tl.program_id(1)
    keys = (tl.load(positions + first_token + token) + 1).to(tl.int32)
    d = tl.arange(0, DIMS)
    row = token.to(tl.int64) * HEADS + head
    peak = float("-inf")
    total = 0.0
    if SINKS:
        peak = tl.load(sinks + head).to(tl.float32)
        total = 1.0
    acc = tl.zeros([DIMS], tl.float32)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(0, keys - WINDOW) // SEGMENT
    for segment in range(first, tl.cdiv(keys, SEGMENT)):
        place = row * segments + segment
        of_segment = tl.load(part_peak + place)
        top = tl.maximum(peak, of_segment)
        safe = tl.where(top == float("-inf"), 0.0, top)
        before, here = tl.exp(peak - safe), tl.exp(of_segment - safe)
        total = total * before + tl.load(part_sum + place) * here
        acc = acc * before + tl.load(part + place * DIM + d, d < DIM, 0.0) * here
        peak = top
    at = ((first_token + token).to(tl.int64) * HEADS + head) * DIM + d
    tl.store(out + at, (acc / total).to(out.dtype.element_ty), d < DIM)


@triton.jit
def argmax_parts(
    logits, row_numbers, masks, peaks, firsts,
    MASKED: tl.constexpr, SIZE: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The highest of a part of a row's logits `[SIZE]`, and the lowest token that has it.

    `MASKED`: of the row that `row_numbers` names, and only of tokens whose bit is set in a mask `[WORDS]`.
    """
    part, number = tl.program_id(0), tl.program_id(1).to(tl.int64)
    token = part * BLOCK + tl.arange(0, BLOCK)
    row = number
    if MASKED:
        row = tl.load(row_numbers + number)
    x = tl.load(logits + row * SIZE + token, token < SIZE, float("-inf")).to(tl.float32)
    x = tl.where(x != x, float("inf"), x)  # noqa: PLR0124  # one that isn't a number comes first, as on the host
    if MASKED:
        allowed = tl.load(masks + number * WORDS + token // 32, token < SIZE, 0) >> (token % 32) & 1
        x = tl.where(allowed == 1, x, float("-inf"))
    peak = tl.max(x, 0)
    place = number * tl.num_programs(0) + part
    tl.store(peaks + place, peak)
    tl.store(firsts + place, tl.min(tl.where(x == peak, token, SIZE), 0))


@triton.jit
def argmax(peaks, firsts, likeliest, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """The token of a row from the highest logits of its parts: where several have it, the lowest one's."""
    row, part = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    there = part < PARTS
    x = tl.load(peaks + row * PARTS + part, there, float("-inf"))
    first = tl.load(firsts + row * PARTS + part, there, 2**31 - 1)
    tl.store(likeliest + row, tl.min(tl.where(x == tl.max(x, 0), first, 2**31 - 1), 0).to(tl.int64))
