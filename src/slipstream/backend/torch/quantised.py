"""Weights of 4 and 8 bits as products take them: numbers, and scales of blocks of numbers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import gcd
from typing import Literal, Self, TypeAlias

import torch
import torch.nn.functional as F

from slipstream.errors import ModelError

Tensor: TypeAlias = torch.Tensor

CODES = 8
"""Of 4 bits in an integer of 32, the first in the lowest bits."""

_WORDS, _ALIGNED = 4, 16
"""Of which the codes are interleaved, and of which a row has a multiple."""
_AT_ONCE = 1 << 22
"""Integers that are interleaved at a time, since it takes several times their memory."""

Number: TypeAlias = Literal["int4", "e2m1", "e4m3"]
"""What a number is: an integer of 4 bits, or a sign, bits of exponent and bits of fraction."""

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Those without a sign, by code."""


@dataclass(frozen=True, slots=True)
class Quantised:
    """A weight [n, k], or one for each expert: (number - zero) * scale in float32, rounded to the model's precision."""

    number: Number
    numbers: Tensor
    """Uint8 [..., n, k], or of 4 bits int32 [..., n, k / 8], rounded up, as `interleaved` has them."""
    scales: Tensor
    """[..., n / rows, k / columns], rounded up for numbers of 8 bits."""
    rows: int
    columns: int
    """That share a scale."""
    zeros: Tensor | None = None
    """Int8, as the scales; None for zeros that are 0."""
    order: Tensor | None = None
    """Int64 [k], the columns of `x` as the weight has them; None if they are in order."""

    @classmethod
    def of_codes(
        cls,
        number: Number,
        held: Tensor,
        scales: Tensor,
        columns: int,
        zeros: Tensor | None = None,
        order: Tensor | None = None,
    ) -> Self:
        """Of codes of 4 bits as checkpoints have them, eight neighbours in an int32 [..., n, k / 8], each row of which
        has its own scales."""
        return cls(number, interleaved(held), scales, 1, columns, zeros, order)

    @property
    def shape(self) -> tuple[int, int]:
        """The weight's n and k."""
        n, held = self.numbers.shape[-2:]
        return n, held if self.number == "e4m3" else self.scales.shape[-1] * self.columns

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        tensors = self.numbers, self.scales, self.zeros
        return sum(each.nbytes for each in tensors if each is not None)

    def __getitem__(self, expert: int) -> Self:
        """That of one expert."""
        zeros = None if self.zeros is None else self.zeros[expert]
        return replace(self, numbers=self.numbers[expert], scales=self.scales[expert], zeros=zeros)

    def unpacked(self, begin: int, end: int, dtype: torch.dtype) -> Tensor:
        """Some rows of a weight [n, k]."""
        numbers = _values(self.number, self.numbers[begin:end])[:, : self.shape[1]]
        row = torch.arange(begin, end, device=numbers.device) // self.rows
        column = torch.arange(numbers.shape[1], device=numbers.device) // self.columns
        if self.zeros is not None:
            numbers -= self.zeros[row][:, column]
        return (numbers * self.scales[row][:, column].float()).to(dtype)

    def with_rows(self, rows: int) -> Self:
        """The same weight [n, k] with scales for fewer rows, which divide those that share one now."""
        n = -(-len(self.numbers) // rows)
        scales, zeros = (
            None if each is None else each.repeat_interleave(self.rows // rows, 0)[:n]
            for each in (self.scales, self.zeros)
        )
        assert scales is not None
        return replace(self, scales=scales, zeros=zeros, rows=rows)


Weight: TypeAlias = Tensor | Quantised


def below(first: Weight, second: Weight) -> Weight:
    """A weight of the rows of two; raises `ModelError` if they aren't of a kind."""
    if isinstance(first, Quantised) and isinstance(second, Quantised):
        rows = gcd(first.rows, second.rows, len(first.numbers))
        first, second = first.with_rows(rows), second.with_rows(rows)
    return _joined(torch.cat, (first, second))


def of_experts(weights: Sequence[Weight]) -> Weight:
    """One weight for each expert from theirs [n, k]; raises `ModelError` if they aren't of a kind."""
    return _joined(torch.stack, weights)


def _joined(join: Callable[[Sequence[Tensor]], Tensor], weights: Sequence[Weight]) -> Weight:
    quantised = [each for each in weights if isinstance(each, Quantised)]
    if not quantised:
        return join(weights)
    first = quantised[0]
    if any(each.order is not None for each in quantised):
        raise ModelError("weights of experts have columns in the order of activations, which is not supported")
    kinds = {(each.number, each.rows, each.columns, each.zeros is None) for each in quantised}
    if len(kinds) > 1 or len(quantised) < len(weights):
        raise ModelError("weights of one layer's experts are stored in several ways, which is not supported")
    zeros = None if first.zeros is None else join([each.zeros for each in quantised])
    numbers, scales = join([each.numbers for each in quantised]), join([each.scales for each in quantised])
    return replace(first, numbers=numbers, scales=scales, zeros=zeros)


def _values(number: Number, held: Tensor) -> Tensor:
    """Float32 [n, k] of numbers as they are held, and perhaps zeros behind."""
    if number == "e4m3":
        return held.view(torch.float8_e4m3fn).float()
    found = codes(held).view(len(held), -1, _WORDS, 2, CODES // 2).permute(0, 1, 4, 2, 3).flatten(1)
    if number == "int4":
        return found.float()
    return _e2m1(held.device)[found]


@cache
def _e2m1(device: torch.device) -> Tensor:
    """All numbers of that kind, by code; once, since what is copied to a GPU can't be recorded."""
    return torch.tensor([*_E2M1, *(-each for each in _E2M1)], device=device)


def codes(held: Tensor) -> Tensor:
    """Int32 [..., m] as int32 [..., m, 8], each code by itself."""
    return (held[..., None] >> torch.arange(0, 4 * CODES, 4, device=held.device, dtype=torch.int32)) & 15


def interleaved(held: Tensor) -> Tensor:
    """Codes of 32 columns, eight neighbours in an int32, as four integers of two neighbours of each eight, one in each
    half; [..., m] with zeros behind, if m is no multiple of 16, so that rows can be read 16 bytes at a time.

    So integers beside each other have columns beside each other at the same bits: as matrix units take them, and
    without a thread having to give one to another.
    """
    rows = held.reshape(-1, held.shape[-1])
    width = -(-rows.shape[1] // _ALIGNED) * _ALIGNED
    found, most = rows.new_zeros(len(rows), width), max(1, _AT_ONCE // width)
    for begin in range(0, len(rows), most):
        part = rows[begin : begin + most]
        four = F.pad(part, (0, width - part.shape[1])).unflatten(-1, (-1, _WORDS))
        into = found[begin : begin + most].view(four.shape)
        for place, neighbours in enumerate(four.unbind(-1)):
            low, high = codes(neighbours).unflatten(-1, (-1, 2)).unbind(-1)
            into |= low << 4 * place | high << 4 * place + 16
    return found.view(*held.shape[:-1], width)


def pack(found: Tensor) -> Tensor:
    """Codes of 0 to 15 [n, k], eight in an int32 [n, k / 8]."""
    eight = found.reshape(len(found), -1, CODES).to(torch.int32)
    shifts = torch.arange(0, 4 * CODES, 4, device=found.device, dtype=torch.int32)
    return (eight << shifts).sum(-1, dtype=torch.int32)
