"""The operators in plain torch: products of fixed shapes, whose kernels then sum in a fixed order.

They run anywhere, and are what other operators are compared with.
"""

from typing import Any

import torch
import torch.nn.functional as F

from slipstream.backend.torch.definitions import ClampedGate, Norm, gated, normed, rotated
from slipstream.backend.torch.operators import SEGMENT, Activation, AttentionShape, Operators, Rotating, Step, Tensor
from slipstream.backend.torch.quantised import Quantised, Weight
from slipstream.sampling import NO_TOKEN

_ROWS = 16
"""Rows of each product. A library chooses its kernel, and with it the order of sums, by the number of rows."""
_QUERY_ROWS = 32
"""Rows of queries that are compared with keys at a time: a few tokens, times the heads that share keys."""
_VECTORS = 64
"""Elements: a multiple of what any processor computes at once."""
_OF_A_THREAD = 1 << 14
"""Elements that torch does not yet divide among threads."""
_UNPACKED = 1024
"""Rows of a weight of 4 or 8 bits that are taken apart at a time."""


class Unfused:
    """Norms, rotations and gates, each in several of torch's own operations."""

    def norm(self, x: Tensor, weight: Tensor, norm: Norm, terms: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """See `Operators.norm`."""
        if terms is not None:
            torch.add(*terms, out=x)
        return normed(x, weight, norm)

    def rotate(self, given: Rotating, query: Tensor, key: Tensor) -> None:
        """See `Operators.rotate`."""
        query.copy_(_turned(given, given.query))
        key.copy_(_turned(given, given.key))

    def rotate_and_write(
        self: Operators, given: Rotating, value: Tensor, kv: Tensor, blocks: Tensor, slots: Tensor
    ) -> Tensor:
        """See `Operators.rotate_and_write`."""
        key = _turned(given, given.key)
        self.write(kv, key[0].transpose(0, 1), value[0].transpose(0, 1), blocks, slots)
        return _turned(given, given.query)

    def gate(self: Operators, given: Activation, x: Tensor) -> Tensor:
        """See `Operators.gate`."""
        return self.activate(given) * x

    def gate_clamped(self, both: Tensor, gate: ClampedGate) -> Tensor:
        """See `Operators.gate_clamped`."""
        return gated(both, gate)


class PlainOperators(Unfused):
    """`Operators` for any device; slow where there are many tokens."""

    name = f"plain, 2, {_ROWS}, {_QUERY_ROWS}, {SEGMENT}, {_UNPACKED}, {_OF_A_THREAD}"
    recordable = False
    may_be_slower = False

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        """A product for every sixteen rows of `x`, and of a quantised weight some rows at a time; see
        `Operators.linear`."""
        if not isinstance(weight, Quantised):
            return _linear(x, weight, bias)
        n = weight.shape[0]
        out = x.new_empty(*x.shape[:-1], n)
        for begin in range(0, n, _UNPACKED):
            end = min(begin + _UNPACKED, n)
            rows = weight.unpacked(begin, end, x.dtype)
            out[..., begin:end] = _linear(x, rows, None if bias is None else bias[begin:end])
        return out

    def activate(self, given: Activation) -> Tensor:
        """Whole rows at a time, as few as one thread computes, and padded; see `Operators.activate`.

        On a processor the last elements of a thread's part have another `exp` than those that fill vectors.
        """
        x, width = given.x, given.x.shape[-1]
        rows = F.pad(x.reshape(-1, width), (0, -width % _VECTORS))
        parts = rows.split(max(1, _OF_A_THREAD // rows.shape[1]))
        out = torch.cat([given.function(part, **given.options) for part in parts])
        return out[:, :width].reshape(x.shape)

    def attend(self, query: Tensor, kv: Tensor, step: Step, shape: AttentionShape, sinks: Tensor | None) -> Tensor:
        """Chunk by chunk; see `Operators.attend`."""
        out, begin = query.new_empty(query.shape), 0
        for past, length, first in step.chunks:
            queries = query[begin : begin + length]
            blocks = step.tables[first : first + -(-(past + length) // kv.shape[3]), shape.table]
            out[begin : begin + length] = _attend(queries, kv, blocks, past, shape, sinks)
            begin += length
        return out

    def write(self, kv: Tensor, key: Tensor, value: Tensor, blocks: Tensor, slots: Tensor) -> None:
        """Scatter; see `Operators.write`."""
        sound = value.isfinite().all(-1, keepdim=True)
        kv[blocks, 0, :, slots] = key.where(sound, torch.nan)
        kv[blocks, 1, :, slots] = value.where(sound, 0)

    def experts(self, module: Any, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Expert by expert, and then a sum in the router's order; see `Operators.experts`."""
        parts = x.new_empty((*index.shape, x.shape[-1]), dtype=torch.float32)
        for expert in index.unique().tolist():
            token, choice = torch.where(index == expert)
            up = self.linear(x[token], *_weights(module, "gate_up_proj", expert))
            parts[token, choice] = self.linear(module._apply_gate(up), *_weights(module, "down_proj", expert)).float()
        total = torch.zeros_like(x, dtype=torch.float32)
        for choice in range(index.shape[1]):
            total += parts[:, choice] * weights[:, choice, None]
        return total.to(x.dtype)

    def argmax(self, logits: Tensor, masked: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """See `Operators.argmax`; in float32, of which a processor compares several at once."""
        if masked is None:
            return likeliest(logits.float())
        rows, masks = masked
        return likeliest(mask_out(logits[rows].float(), masks))


def likeliest(logits: Tensor) -> Tensor:
    """The likeliest token of each row of float32 logits [n, vocab_size], int64 [n], or `NO_TOKEN`: as a `Sampler`."""
    tokens = logits.argmax(1)  # the first that is no number, if there is one
    return tokens.where(logits.gather(1, tokens[:, None])[:, 0].isfinite(), NO_TOKEN)


def mask_out(logits: Tensor, masks: Tensor) -> Tensor:
    """Logits [n, vocab_size] with minus infinity for every token whose bit isn't set in masks, int32 [n, words]."""
    ids = torch.arange(logits.shape[1], device=logits.device)
    return logits.masked_fill((masks[:, ids >> 5] >> (ids & 31) & 1) == 0, -torch.inf)


def _turned(given: Rotating, heads: Tensor) -> Tensor:
    return rotated(heads, given.cos, given.sin, given.rotation)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    tiles = F.pad(flat, (0, 0, 0, -len(flat) % _ROWS)).split(_ROWS)
    out = torch.cat([F.linear(tile, weight, bias) for tile in tiles])
    return out[: len(flat)].view(*x.shape[:-1], len(weight))


def _weights(module: Any, name: str, expert: int) -> tuple[Weight, Tensor | None]:
    """An expert's weight [n, k] and bias [n]."""
    weight = getattr(module, name)[expert]
    bias = getattr(module, f"{name}_bias")[expert] if module.has_bias else None
    return (weight.mT if module.is_transposed else weight), bias


def _attend(
    query: Tensor, kv: Tensor, blocks: Tensor, past: int, shape: AttentionShape, sinks: Tensor | None
) -> Tensor:
    """The attention of one chunk [n, heads, dim] to the blocks of its sequence."""
    count, heads, dim = query.shape
    kv_heads, block_size = kv.shape[2], kv.shape[3]
    group = heads // kv_heads
    tile = max(1, _QUERY_ROWS // group)  # tokens
    end = past + count
    tiles = _tiled(query.float(), kv_heads, tile)
    acc = torch.zeros_like(tiles)
    if sinks is None:
        peak, total = acc.new_full(acc.shape[:-1], -torch.inf), acc.new_zeros(acc.shape[:-1])
    else:
        of_rows = sinks.float().view(kv_heads, 1, group).expand(-1, tile, -1).reshape(kv_heads, -1)
        peak, total = of_rows.repeat(len(tiles), 1, 1), acc.new_ones(acc.shape[:-1])
    position = past + torch.arange(len(tiles) * tile, device=query.device).view(len(tiles), 1, tile, 1, 1)
    seen_first = max(0, past - shape.window + 1) if shape.window else 0
    for start in range(seen_first // SEGMENT * SEGMENT, end, SEGMENT):
        first = max(0, start - past) // tile  # the first tile that sees any of it
        here = blocks[start // block_size : (start + SEGMENT) // block_size]
        here = F.pad(here, (0, SEGMENT // block_size - len(here)))
        keys, values = kv[here].float().permute(1, 2, 0, 3, 4).reshape(2, kv_heads, SEGMENT, dim)
        key = start + torch.arange(SEGMENT, device=query.device)
        values = values.masked_fill((key >= end)[:, None], 0)  # what nobody wrote might not be finite
        scores = torch.stack([torch.bmm(each, keys.mT) for each in tiles[first:]]) * shape.scale
        if shape.softcap:
            scores = shape.softcap * torch.tanh(scores / shape.softcap)
        seen = key <= position[first:]
        if shape.window:
            seen &= key > position[first:] - shape.window
        seen = seen.expand(-1, -1, -1, group, -1).reshape(len(scores), 1, -1, SEGMENT)
        scores = scores.masked_fill(~seen, -torch.inf)
        top = torch.maximum(peak[first:], scores.amax(-1))
        safe = top.masked_fill(top == -torch.inf, 0)
        weights = torch.exp(scores - safe[..., None])
        fade = torch.exp(peak[first:] - safe)
        found = torch.stack([torch.bmm(each, values) for each in weights])
        total[first:] = total[first:] * fade + weights.sum(-1)
        acc[first:] = acc[first:] * fade[..., None] + found
        peak[first:] = top
    out = (acc / total[..., None]).view(len(tiles), kv_heads, tile, group, dim).transpose(1, 2)
    return out.reshape(-1, heads, dim)[:count].to(query.dtype)


def _tiled(query: Tensor, kv_heads: int, tile: int) -> Tensor:
    """Queries [n, heads, dim] in tiles of tokens, by the head whose keys they see: [tiles, kv_heads, rows, dim]."""
    count, heads, dim = query.shape
    group = heads // kv_heads
    padded = F.pad(query, (0, 0, 0, 0, 0, -count % tile))
    by_head = padded.reshape(-1, tile, kv_heads, group, dim).transpose(1, 2)
    return by_head.reshape(-1, kv_heads, tile * group, dim)
