"""How a `transformers` class comes to compute with our operators, without a line of its code being changed."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from operator import is_not
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface
from transformers.integrations.moe import ExpertsInterface

from slipstream.backend.torch.definitions import ClampedGate, Norm, gate_of, norm_of, rotation_of
from slipstream.backend.torch.operators import Activation, AttentionShape, Operators, Rotating, Step, Tensor
from slipstream.backend.torch.quantised import Weight

NAME = "slipstream"
"""Of the implementation of attention and experts, as `from_pretrained` takes it."""

Seat: TypeAlias = tuple[int, int]
"""Where a layer has its keys and values: by which of a step's tables, and at which place in a block."""


@dataclass(frozen=True, slots=True)
class _Running:
    operators: Operators
    step: Step
    kv: Tensor
    """[blocks, layers side by side, 2, kv_heads, block size, dim]."""
    seats: Sequence[Seat]
    functions: "_Functions"


_running: ContextVar[_Running] = ContextVar("running")


@contextmanager
def computing(operators: Operators, step: Step, kv: Tensor, seats: Sequence[Seat]) -> Iterator[None]:
    """What models do in here is a step over these keys and values, in which layers have such seats."""
    functions = _Functions(operators)
    token = _running.set(_Running(operators, step, kv, seats, functions))
    try:
        with functions:
            yield
            functions.settle()
    finally:
        _running.reset(token)


def linear(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """A product in the step that is being computed; see `Operators.linear`."""
    now = _running.get()
    with now.functions.left_alone():
        return now.operators.linear(x, weight, bias)


_GATES = (F.silu, F.gelu)
"""Activations whose result mostly is a factor of something else."""
_ACTIVATIONS = (torch.sigmoid, torch.Tensor.sigmoid)
"""The others."""


class _Terms(NamedTuple):
    """Of a sum."""

    first: Tensor
    second: Tensor


_Operands = TypeVar("_Operands", _Terms, Rotating, Activation)


@dataclass(frozen=True, slots=True)
class _Waiting:
    """What nobody has computed yet, for what comes next may compute it along."""

    results: tuple[Tensor, ...]
    operands: _Terms | Rotating | Activation
    compute: Callable[[], object]
    """Fill the results."""


class _Functions(TorchFunctionMode):  # type: ignore[misc]  # torch's types are not looked at
    """Every product with a weight, wherever the model's code asks for one, activations, and sums of residuals.

    A sum waits until something else is called, for if that is a norm of it, both are computed together. So do rotations
    wait for attention, and activations for what they gate.
    """

    def __init__(self, operators: Operators) -> None:
        super().__init__()
        self._operators = operators
        self._waiting: _Waiting | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Take over `F.linear`, activations and sums; inside, torch's own functions are themselves."""
        options = kwargs or {}
        if func is torch.Tensor.mul and not options and (gated := self._gated(*args)) is not None:
            return gated
        self.settle()
        if func is F.linear:
            return self._operators.linear(*args, **options)
        if func in _GATES:
            gate, result = Activation(func, args[0], options), torch.empty_like(args[0])
            self.postpone(gate, lambda: result.copy_(self._operators.activate(gate)), result)
            return result
        if func in _ACTIVATIONS:
            return self._operators.activate(Activation(func, args[0], options))
        if func is torch.Tensor.add and not options and _are_residuals(*args):
            total = torch.empty_like(args[0])
            self.postpone(_Terms(*args), lambda: torch.add(*args, out=total), total)
            return total
        return func(*args, **options)

    def _gated(self, one: Any, other: Any) -> Tensor | None:
        """The product of two, if one of them is an activation that waits and the other is like it."""
        for gate, x in ((one, other), (other, one)):
            if _are_alike(gate, x) and (activation := self.take(Activation, gate)) is not None:
                return self._operators.gate(activation, x)
        return None

    def postpone(
        self, operands: _Terms | Rotating | Activation, compute: Callable[[], object], *results: Tensor
    ) -> None:
        """Have results wait that are computed from such operands."""
        self._waiting = _Waiting(results, operands, compute)

    def settle(self) -> None:
        """Compute what waits, if anything does."""
        if self._waiting is not None:
            waiting, self._waiting = self._waiting, None
            waiting.compute()

    @contextmanager
    def left_alone(self) -> Iterator[None]:
        """For operators: what they ask of torch is no product of the model's, and nothing waits that they may need.

        A launch looks at each tensor several times, and each look would cost the host some microseconds.
        """
        self.settle()
        with torch._C.DisableTorchFunction():
            yield

    def take(self, kind: type[_Operands], *wanted: Tensor) -> _Operands | None:
        """The operands of what is wanted, if it is what waits, and they are of that kind: it's the caller's to compute.

        To be asked before anything is done with it, a look at its shape included.
        """
        waiting = self._waiting
        if waiting is None or not isinstance(waiting.operands, kind) or any(map(is_not, wanted, waiting.results)):
            return None
        self._waiting = None
        return waiting.operands


def _are_alike(one: Any, other: Any) -> bool:
    tensors = isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)
    return tensors and one.shape == other.shape and one.dtype == other.dtype


def _are_residuals(one: Any, other: Any) -> bool:
    return _are_alike(one, other) and one.dim() == 3 and one.is_contiguous() and other.is_contiguous()


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
    rotation = now.functions.take(Rotating, query, key)
    table, place = now.seats[module.layer_idx]
    window = sliding_window if sliding_window is not None else getattr(module, "sliding_window", None)
    with now.functions.left_alone():
        kv, blocks, slots = now.kv[:, place], now.step.blocks[table], now.step.slots
        if rotation is None:
            now.operators.write(kv, key[0].transpose(0, 1), value[0].transpose(0, 1), blocks, slots)
        else:
            query = now.operators.rotate_and_write(rotation, value, kv, blocks, slots)
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        shape = AttentionShape(scale, window or 0, softcap or 0.0, table)
        return now.operators.attend(query[0].transpose(0, 1), kv, now.step, shape, s_aux)[None], None


def experts(module: torch.nn.Module, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Experts as `transformers` calls them, in the step that is being computed; see `Operators.experts`."""
    return _running.get().operators.experts(module, x, index, weights)


AttentionInterface.register(NAME, _attention)
ExpertsInterface.register(NAME, experts)


def hook(model: Any) -> None:
    """Have norms, rotations and gates of a model computed by a step's operators, as far as they are known."""
    for module in model.modules():
        if "forward" not in vars(module) and (norm := norm_of(module)) and module.weight.dtype == model.dtype:
            module.forward = _norm_forward(module, module.forward, norm)
        if gate := gate_of(module, model.dtype):
            module._apply_gate = _gate(module._apply_gate, gate)
    for code in {sys.modules[type(module).__module__] for module in model.modules()}:
        rotate = getattr(code, _ROTATE, None)
        if rotate is not None and rotate.__module__ != __name__:
            setattr(code, _ROTATE, _rotation(rotate))


_ROTATE = "apply_rotary_pos_emb"
"""What the function is called beside each class of attention that uses it."""


def _norm_forward(module: Any, forward: Callable[[Tensor], Tensor], norm: Norm) -> Callable[[Tensor], Tensor]:
    def computed(x: Tensor) -> Tensor:
        now = _running.get(None)
        if now is None:
            return forward(x)
        terms = now.functions.take(_Terms, x)
        with now.functions.left_alone():
            return now.operators.norm(x, module.weight, norm, terms)

    return computed


def _gate(function: Callable[[Tensor], Tensor], gate: ClampedGate) -> Callable[[Tensor], Tensor]:
    def computed(both: Tensor) -> Tensor:
        now = _running.get(None)
        return now.operators.gate_clamped(both, gate) if now else function(both)

    return computed


def _rotation(function: Callable[..., Any]) -> Callable[..., Any]:
    def computed(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *more: Any, **options: Any) -> Any:
        now = _running.get(None)
        known = rotation_of(function, query, cos) if now and not more and not options else None
        if now is None or known is None:
            return function(query, key, cos, sin, *more, **options)
        results = tuple(torch.empty_like(each) for each in (query, key))
        given = Rotating(query, key, cos, sin, known)
        now.functions.postpone(given, lambda: now.operators.rotate(given, *results), *results)
        return results

    return computed
