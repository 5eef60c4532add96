"""Products of the same rows with several weights, computed as one: fewer kernels, each of which reads more.

Queries, keys and values are products of the same rows, and so are a gate and what it gates.
"""

from collections.abc import Sequence
from functools import partial, reduce
from typing import Any

import torch

from slipstream.backend.torch.hooks import linear
from slipstream.backend.torch.operators import Tensor
from slipstream.backend.torch.quantised import Quantised, Weight, below
from slipstream.errors import ModelError

_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""What they are called beside each other in classes of `transformers`."""


def join(model: Any) -> None:
    """Have these products of a model computed as one, where their weights are stored alike.

    Weights become parts of one, and take no more memory than before.
    """
    for module in model.modules():
        for names in _TOGETHER:
            products = [getattr(module, name, None) for name in names]
            if all(hasattr(each, "weight") and hasattr(each, "bias") for each in products):
                _join(products)
    if model.device.type == "cuda":
        torch.cuda.empty_cache()  # weights leave room of sizes that nothing else has


def _join(products: Sequence[Any]) -> None:
    with_bias = [each.bias for each in products if each.bias is not None]
    if len(with_bias) not in {0, len(products)}:
        return
    try:
        weight = reduce(below, [each.weight for each in products])
    except ModelError:
        return
    sizes = [each.weight.shape[0] for each in products]
    joined = _Joined(weight, torch.cat(with_bias) if with_bias else None, sizes)
    for number, each in enumerate(products):
        if isinstance(weight, Quantised):
            del each.weight
        else:
            each.weight.data = weight[sum(sizes[:number]) : sum(sizes[: number + 1])]
        each.forward = partial(joined.part, number)


class _Joined:
    """A product with a weight and perhaps a bias, in parts of such sizes."""

    def __init__(self, weight: Weight, bias: Tensor | None, sizes: Sequence[int]) -> None:
        self._weight, self._bias, self._sizes = weight, bias, sizes
        self._x: Tensor | None = None
        self._parts: dict[int, Tensor] = {}
        """Of the product of `_x`, those that nobody has asked for yet."""

    def part(self, number: int, x: Tensor) -> Tensor:
        """One part of the product of `x`: that of the first weight, of the second, ..."""
        if self._x is not x or number not in self._parts:
            found = linear(x, self._weight, self._bias)
            self._x, self._parts = x, dict(enumerate(found.split(self._sizes, -1)))
        part = self._parts.pop(number)
        if not self._parts:
            self._x = None
        return part
