"""How a `transformers` class comes to compute with our operators, without a line of its code being changed."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface
from transformers.integrations.moe import ExpertsInterface

from slipstream.backend.torch.operators import AttentionShape, Operators, Step, Tensor

NAME = "slipstream"
"""Of the implementation of attention and experts, as `from_pretrained` takes it."""


@dataclass(frozen=True, slots=True)
class _Running:
    operators: Operators
    step: Step
    kv: Tensor
    """[blocks, layers, 2, kv_heads, block size, dim]."""


_running: ContextVar[_Running] = ContextVar("running")


@contextmanager
def computing(operators: Operators, step: Step, kv: Tensor) -> Iterator[None]:
    """What models do in here is a step over these keys and values."""
    token = _running.set(_Running(operators, step, kv))
    try:
        with _Products(operators):
            yield
    finally:
        _running.reset(token)


def operators_now() -> Operators:
    """Those of the step that is being computed."""
    return _running.get().operators


class _Products(TorchFunctionMode):  # type: ignore[misc]  # torch's types are not looked at
    """Every product with a weight, wherever the model's code asks for one."""

    def __init__(self, operators: Operators) -> None:
        super().__init__()
        self._operators = operators

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Take over `F.linear`; inside, torch's own functions are themselves."""
        if func is F.linear:
            return self._operators.linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention as `transformers` calls it, on tensors [1, heads, n, dim]; [1, n, heads, dim]."""
    now = _running.get()
    kv = now.kv[:, module.layer_idx]
    queries, keys, values = (each[0].transpose(0, 1) for each in (query, key, value))
    now.operators.write(kv, keys, values, now.step)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    window = sliding_window if sliding_window is not None else getattr(module, "sliding_window", None)
    shape = AttentionShape(scale, window or 0, softcap or 0.0)
    return now.operators.attend(queries.contiguous(), kv, now.step, shape, s_aux)[None], None


def _experts(module: torch.nn.Module, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Experts as `transformers` calls them."""
    return _running.get().operators.experts(module, x, index, weights)


AttentionInterface.register(NAME, _attention)
ExpertsInterface.register(NAME, _experts)
