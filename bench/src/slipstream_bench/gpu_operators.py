"""Operators by themselves, by bits and by time: products, attention, and the choice of tokens."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F

from slipstream.backend.steps import BLOCK_SIZE, PagedChunk, lay_out
from slipstream.backend.torch.backend import operators_for
from slipstream.backend.torch.chooser import DeviceLogits
from slipstream.backend.torch.operators import AttentionShape, Operators, Step, StepOutput, Tensor
from slipstream.backend.torch.quantised import CODES, Number, Quantised, Weight
from slipstream.backend.torch.staging import Staging
from slipstream.sampling import Row, Sampler, SamplingParams
from slipstream_bench.gpu_device import Device
from slipstream_bench.gpu_report import Result

_QUERIES = 48
_GROUP = 128
"""Columns that share a scale, and rows, of weights of 8 bits."""


def products(device: Device) -> Iterator[Result]:
    """Products by number of rows: the library's own, those of rows padded to sixteen, and the operators'."""
    choices = {
        "library": _Product(F.linear),
        "library, padded": _Product(lambda x, w: F.linear(F.pad(x, (0, 0, 0, -len(x) % 16)), w)[: len(x)]),
    }
    choices |= _own_products(device)
    for case, (n, k) in device.sizes.shapes.items():
        whole, x = device.random(n, k) * 0.02, device.random(device.sizes.rows[-1], k)
        weights = device.several(whole, whole.clone)
        for choice, product in choices.items():
            if not device.timely:
                return
            yield _product(device, Result("product", case, choice), product, x, weights)
    yield from _quantised_products(device)


def _quantised_products(device: Device) -> Iterator[Result]:
    """Those of one shape with weights of 4 and 8 bits."""
    case, (n, k) = next(iter(device.sizes.shapes.items()))
    whole, x = device.random(n, k) * 0.02, device.random(device.sizes.rows[-1], k)
    for number in get_args(Number):
        make = partial(quantised, number, whole)
        weights = device.several(make(), make)
        for choice, product in _own_products(device).items():
            if not device.timely:
                return
            yield _product(device, Result("product", f"{case}, {number}", choice), product, x, weights)


def quantised(number: Number, weight: Tensor) -> Quantised:
    """A weight of the same shape, in 4 or 8 bits: random codes, or the numbers as they are."""
    n, k = weight.shape
    if number == "e4m3":
        scales = torch.ones(-(-n // _GROUP), -(-k // _GROUP), device=weight.device)
        return Quantised(number, weight.to(torch.float8_e4m3fn).view(torch.uint8), scales, _GROUP, _GROUP)
    words = torch.randint(-(2**31), 2**31, (n, k // CODES), dtype=torch.int32, device=weight.device)
    columns = _GROUP if number == "int4" else 32
    scales = torch.full((n, k // columns), 2**-6, dtype=weight.dtype, device=weight.device)
    zeros = torch.full_like(scales, 8, dtype=torch.int8) if number == "int4" else None
    return Quantised.of_codes(number, words, scales, columns, zeros)


class _Product(NamedTuple):
    """What computes a product of rows with a weight, and whether that can be recorded."""

    compute: Callable[[Tensor, Any], Tensor]
    recordable: bool = True


def _own_products(device: Device) -> dict[str, _Product]:
    """Those of the device's kinds of operators, by kind."""
    return {kind_of(each): _Product(each.linear, each.recordable) for each in _with_own(device, "linear")}


def _product(device: Device, result: Result, choice: _Product, x: Tensor, weights: Sequence[Weight]) -> Result:
    """What comes of one choice, and whether it takes a quantised weight apart to the bit.

    One that can't be used here costs none of the others.
    """
    weight, product = weights[0], choice.compute
    try:
        whole = product(x, weight)
    except Exception as error:  # Triton's own, for one
        result.note = f"can't be used here: {error}"
        return result
    otherwise = False
    if isinstance(weight, Quantised):
        apart = weight.unpacked(0, weight.shape[0], x.dtype)
        otherwise = not torch.equal(product(torch.eye(x.shape[1], dtype=x.dtype, device=x.device), weight), apart.T)
    else:
        apart = weight
    exact = x[:16].double() @ apart.double().T
    differ = [rows for rows in device.sizes.rows if not torch.equal(product(x[:rows].clone(), weight), whole[:rows])]
    moved = not torch.equal(product(x.flip(0).contiguous(), weight).flip(0), whole)
    result.exact = not differ and not moved and not otherwise
    off = float((whole[:16].double() - exact).abs().max() / exact.abs().max())
    result.note = f"error {off:.0e}" + (f", differs at {differ}" if differ else "") + (", by place" if moved else "")
    result.note += ", taken apart otherwise" if otherwise else ""
    for rows in device.sizes.timed_rows:
        works = [partial(product, x[:rows], each) for each in weights]
        result.ms[str(rows)] = device.device_ms(works, choice.recordable)
    result.floor_ms = device.floor(weight.nbytes)
    return result


def attention(device: Device) -> Iterator[Result]:
    """Attention after contexts of some lengths: over cuts and beside another sequence, and how long it takes."""
    _, kv_heads, dim = device.sizes.heads
    for context in device.sizes.contexts:
        sequence = _Sequence(device, context)
        for operators in _with_own(device, "attend"):
            if not device.timely:
                return
            whole = sequence.attend(operators, 0, _QUERIES)
            cuts = pairwise((0, 7, 9, 40, _QUERIES))
            parts = torch.cat([sequence.attend(operators, start, end, beside=5) for start, end in cuts])
            result = Result("attention", f"{context} keys", kind_of(operators), torch.equal(parts, whole))
            for tokens in (2, 16, _QUERIES):
                works = sequence.attending(operators, tokens)
                result.ms[str(tokens)] = device.device_ms(works, operators.recordable)
            result.floor_ms = device.floor(2 * kv_heads * dim * context * device.sizes.dtype.itemsize)
            yield result


def _with_own(device: Device, name: str) -> list[Operators]:
    """One of the device's kinds of operators for each that has this one of its own."""
    kinds: dict[object, Operators] = {}
    for each in operators_for(device.device):
        operator = getattr(type(each), name)
        if operator not in kinds or name in vars(type(each)):
            kinds[operator] = each
    return [*kinds.values()]


def choices(device: Device) -> Iterator[Result]:
    """The choice of tokens from a step's logits, host and device together: the step has found the likeliest ones."""
    vocabulary, most = device.sizes.vocabulary, max(device.sizes.chosen)
    operators, staging = operators_for(device.device)[0], Staging(device.device)
    logits = device.random(most, vocabulary)
    found = DeviceLogits(StepOutput(logits, operators.argmax(logits)), operators, staging)
    mask = np.full(-(-vocabulary // 32), 0x5555_5555, np.int32)
    kinds = {
        "greedy": (SamplingParams(temperature=0), None),
        "greedy, masked": (SamplingParams(temperature=0), mask),
        "top_p": (SamplingParams(temperature=1, top_p=0.95), None),
    }
    for choice, (params, allowed) in kinds.items():
        samplers = [Sampler(params, seed, np.empty(0, np.int32), vocabulary) for seed in range(most)]
        rows = [Row(at, sampler, 0, mask=allowed) for at, sampler in enumerate(samplers)]
        result = Result("choice", f"{vocabulary} tokens", choice)
        together = found.choose(rows)
        result.exact = together == [found.choose([row])[0] for row in rows]
        result.ms = {str(count): device.ms(partial(found.choose, rows[:count])) for count in device.sizes.chosen}
        yield result


class _Sequence:
    """Queries after a context, and the blocks of theirs and of another sequence."""

    def __init__(self, device: Device, context: int) -> None:
        heads, kv_heads, dim = device.sizes.heads
        blocks = -(-(context + _QUERIES + 2) // BLOCK_SIZE)
        self._context = context
        self._staging = Staging(device.device)
        self._tables = np.random.default_rng(0).permutation(2 * blocks).astype(np.int32).reshape(2, -1) + 1
        kv = device.random(2 * blocks + 1, 2, kv_heads, BLOCK_SIZE, dim)
        self._kv = device.several(kv, kv.clone)
        self._query = device.random(_QUERIES, heads, dim)

    def attend(self, operators: Operators, start: int, end: int, beside: int = 0) -> Tensor:
        """The attention of queries `start` to `end`, in a step with so many tokens of the other sequence."""
        found = operators.attend(*self._step(start, end, beside))
        return found[beside : beside + end - start]

    def attending(self, operators: Operators, tokens: int) -> list[Callable[[], Tensor]]:
        """The attention of the first queries to one of several copies of the keys and values, each as a work."""
        rows, _, step, shape, sinks = self._step(0, tokens, 0)
        return [partial(operators.attend, rows, kv, step, shape, sinks) for kv in self._kv]

    def _step(self, start: int, end: int, beside: int) -> tuple[Tensor, Tensor, Step, AttentionShape, None]:
        """What `Operators.attend` takes for queries `start` to `end`, beside so many tokens of the other sequence."""
        own = PagedChunk(np.ones(end - start, np.int32), self._context + start, self._tables[0], 0)
        other = PagedChunk(np.ones(beside, np.int32), 40, self._tables[1], 0)
        chunks = [other, own] if beside else [own]
        step = Step.of(lay_out(chunks, sum(max(2, len(each.tokens)) for each in chunks), 1), BLOCK_SIZE, self._staging)
        rows = torch.cat((self._query[:beside], self._query[start:end]))
        rows = F.pad(rows, (0, 0, 0, 0, 0, step.tokens.shape[1] - len(rows)))  # a lone token has a dummy beside it
        return rows, self._kv[0], step, AttentionShape(rows.shape[2] ** -0.5), None


def kind_of(operators: Operators) -> str:
    """What operators are called, without their sizes."""
    return operators.name.partition(",")[0]
