"""Kernels of attention: positions and writes of keys, and a fixed tree of sums over segments of them."""

import triton
import triton.language as tl

from slipstream.backend.torch.kernels.tiles import first_tile


@triton.jit(
    do_not_specialize=[
        "head_stride", "row_stride", "key_head_stride", "key_row_stride", "value_head_stride", "value_row_stride",
        "out_head_stride", "out_row_stride", "keys_head_stride", "keys_row_stride",
    ]
)  # fmt: skip
def rotate(
    query, key, value, cos, sin, out, keys, blocks, slots, head_stride, row_stride, key_head_stride, key_row_stride,
    value_head_stride, value_row_stride, out_head_stride, out_row_stride, keys_head_stride, keys_row_stride,
    values_stride, angles_row_stride, angles_stride,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr, WIDTH: tl.constexpr,
    NEIGHBOURS: tl.constexpr, BY_PAIR: tl.constexpr, WIDE: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """A head of a token's queries turned, or of its keys behind these, as `definitions.rotated` has it.

    `WRITE`: `keys` are KV, of which keys take the token's slot; and so do its values, which come behind them. For
    values that aren't finite see `Operators.write`.
    """
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    angle = token * angles_row_stride
    if head < HEADS:
        row, place = query + token * row_stride + head * head_stride, out + token * out_row_stride
        place += head * out_head_stride
        _turn(row, cos + angle, sin + angle, angles_stride, place, True, DIM, DIMS, WIDTH, NEIGHBOURS, BY_PAIR, WIDE)
        return
    of_keys = (head - HEADS) % KV_HEADS
    place = keys + of_keys * keys_head_stride
    row = key + token * key_row_stride + of_keys * key_head_stride
    if WRITE:
        place += tl.load(blocks + token) * keys_row_stride + tl.load(slots + token) * DIM
        d = tl.arange(0, DIMS)
        found = tl.load(value + token * value_row_stride + of_keys * value_head_stride + d, d < DIM, 0.0)
        sound = _sound(found)
        if head >= HEADS + KV_HEADS:
            tl.store(place + values_stride + d, _unless(sound, found, 0.0), d < DIM)
            return
    else:
        place += token * keys_row_stride
        sound = True
    _turn(row, cos + angle, sin + angle, angles_stride, place, sound, DIM, DIMS, WIDTH, NEIGHBOURS, BY_PAIR, WIDE)


@triton.jit
def _turn(
    x, cos, sin, angles_stride, out, sound, DIM: tl.constexpr, DIMS: tl.constexpr, WIDTH: tl.constexpr,
    NEIGHBOURS: tl.constexpr, BY_PAIR: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, DIMS)
    turns = d < WIDTH
    if NEIGHBOURS:
        other, pair, leads = d ^ 1, d // 2, d % 2 == 0
    else:
        other, pair, leads = (d + WIDTH // 2) % WIDTH, d % (WIDTH // 2), d < WIDTH // 2
    angle = (pair if BY_PAIR else d) * angles_stride
    own = tl.load(x + d, d < DIM, 0.0)
    across = tl.load(x + other, turns, 0.0).to(tl.float32)
    along = own.to(tl.float32) * tl.load(cos + angle, turns, 0.0).to(tl.float32)
    across = tl.where(leads, -across, across) * tl.load(sin + angle, turns, 0.0).to(tl.float32)
    if not WIDE:
        along = along.to(out.dtype.element_ty).to(tl.float32)
        across = across.to(out.dtype.element_ty).to(tl.float32)
    turned = tl.where(turns, (along + across).to(out.dtype.element_ty), own)
    tl.store(out + d, _unless(sound, turned, float("nan")), d < DIM)


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
    found = tl.load(value + of_value + d, d < DIM, 0.0)
    sound = _sound(found)
    tl.store(kv + place, _unless(sound, tl.load(key + of_key + d, d < DIM, 0.0), float("nan")), d < DIM)
    tl.store(kv + value_stride + place, _unless(sound, found, 0.0), d < DIM)


@triton.jit
def _sound(value):
    """Whether all of a head's values are finite; see `Operators.write`."""
    return tl.min((tl.abs(value.to(tl.float32)) < float("inf")).to(tl.int32), 0) == 1


@triton.jit
def _unless(sound, x, other):
    """Numbers if they are sound, and others if not; by float32, of which older interpreters know constants."""
    return tl.where(sound, x.to(tl.float32), other).to(x.dtype)


@triton.jit
def query_tiles(begins, tiles, TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    """A chunk's tiles of at most TOKENS tokens: `tiles[tiles, 2]` has a chunk, and the first of its tokens.

    For their places see `tiles`. What a chunk doesn't fill is of the last one, which is empty.
    """
    chunk, chunks = tl.program_id(0), tl.num_programs(0)
    begin, end = tl.load(begins + chunk), tl.load(begins + chunk + 1)
    first = first_tile(chunk, begin, TOKENS)
    count = first_tile(chunk + 1, end, TOKENS) - first
    for start in range(0, count, BLOCK):
        number = start + tl.arange(0, BLOCK)
        fills = number * TOKENS < end - begin
        tile = tiles + 2 * (first + number)
        tl.store(tile, tl.where(fills, chunk, chunks - 1), number < count)
        tl.store(tile + 1, tl.where(fills, number * TOKENS, 0), number < count)


@triton.jit(do_not_specialize=["first_token", "end_token", "segments"])
def attend(
    query, kv, table, table_begins, pasts, begins, tiles, part, part_peak, part_sum, first_token, end_token, segments,
    scale, query_stride, query_head_stride, table_stride, block_stride, value_stride, head_stride,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr, BLOCK: tl.constexpr,
    KEYS: tl.constexpr, ROWS: tl.constexpr, SEGMENT: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """One tile of queries, a few tokens times the heads that share keys, against one segment of its sequence's keys.

    KEYS of them at a time. Keys, and then the elements of values, take the tall side of the matrix unit, so a tile of
    16 to 64 ROWS is the other side, as in products, and a row's bits are the same in each.

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
    queries = tl.load(query + at[None, :] + d[:, None], real[None, :] & (d < DIM)[:, None], 0.0)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([DIMS, ROWS], tl.float32)
    blocks = table + tl.load(table_begins + chunk) * table_stride
    for start in range(segment * SEGMENT, tl.minimum(last, (segment + 1) * SEGMENT), KEYS):
        key = start + tl.arange(0, KEYS)
        block = tl.load(blocks + key // BLOCK * table_stride, key < last, 0).to(tl.int64)
        slot = kv + block * block_stride + head * head_stride + key % BLOCK * DIM
        there = (key < last)[:, None] & (d < DIM)[None, :]
        keys = tl.load(slot[:, None] + d[None, :], there, 0.0)
        scores = tl.dot(keys, queries, input_precision="ieee") * scale
        if CAP > 0:
            small = tl.exp(-2.0 * tl.abs(scores) / CAP)
            squeezed = (1 - small) / (1 + small)
            scores = CAP * tl.where(scores < 0, -squeezed, squeezed)
        seen = key[:, None] <= position[None, :]
        if WINDOW > 0:
            seen = seen & (key[:, None] > position[None, :] - WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
        top = tl.maximum(peak, tl.max(scores, 0))
        safe = tl.where(top == float("-inf"), 0.0, top)
        weights = tl.exp(scores - safe[None, :])
        fade = tl.exp(peak - safe)
        values = tl.load(slot[:, None] + value_stride + d[None, :], there, 0.0)
        total = total * fade + tl.sum(weights, 0)
        acc = acc * fade[None, :] + tl.dot(tl.trans(values), weights.to(values.dtype), input_precision="ieee")
        peak = top
    real = real & (begin + token >= first_token) & (begin + token < end_token)
    place = ((begin + token - first_token).to(tl.int64) * HEADS + heads) * segments + segment
    tl.store(part + place[None, :] * DIM + d[:, None], acc, real[None, :] & (d < DIM)[:, None])
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
