"""How `transformers` comes to load weights of 4 and 8 bits, and its classes to compute with them, without other
packages."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from slipstream.backend.torch import hooks
from slipstream.backend.torch.checkpoint import Checkpoint, Format, Whole
from slipstream.backend.torch.operators import Tensor
from slipstream.backend.torch.quantised import Weight, below, of_experts

METHOD = "slipstream-quantised"
"""What the quantisation is called here, so that `transformers` takes no other package to it."""


class _Stored:
    """A checkpoint's tensors of a weight, as buffers of a module under the names that they have there."""

    def __init__(self, module: nn.Module, form: Format, shape: tuple[int, ...], device: torch.device) -> None:
        self._module, self._form = module, form
        self._names = tuple(tensors := form.tensors(*shape))
        for name, (size, dtype) in tensors.items():
            module.register_buffer(name, torch.empty(size, dtype=dtype, device=device))

    def take(self, device: torch.device) -> Weight:
        """The weight on its device, as products take it, in place of the tensors."""
        found = self._form.weight({name: getattr(self._module, name).to(device) for name in self._names})
        for name in self._names:
            delattr(self._module, name)
        return found


class _Linear(nn.Module):  # type: ignore[misc]  # torch's types are not looked at
    """Takes the place of `nn.Linear`; `weight` is there from `repack` on."""

    def __init__(self, form: Format, linear: nn.Linear) -> None:
        super().__init__()
        self._stored = _Stored(self, form, (linear.out_features, linear.in_features), linear.weight.device)
        self.register_buffer("bias", linear.bias.data if linear.bias is not None else None)

    def repack(self, device: torch.device) -> None:
        """Bring the weight into one layout, on its device."""
        self.weight = self._stored.take(device)

    def forward(self, x: Tensor) -> Tensor:
        """The product of `x` with the weight."""
        x = x if self.weight.order is None else x[..., self.weight.order]
        return hooks.linear(x, self.weight, self.bias)


class _Experts(nn.Module):  # type: ignore[misc]
    """Takes the place of a mixture's experts; from `repack` on it has their weights as `Operators.experts` asks."""

    is_transposed = False

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.num_experts, self.has_bias = experts.num_experts, experts.has_bias
        self._apply_gate = experts._apply_gate

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """See `Operators.experts`."""
        return hooks.experts(self, x, index, weights)


class _ExpertsApart(_Experts):
    """Those of which each has its own weights in a checkpoint.

    `transformers` joins only those that aren't quantised, and isn't asked to.
    """

    def __init__(self, experts: Any, name: str, checkpoint: Checkpoint) -> None:
        super().__init__(experts)
        like = experts.down_proj
        _, width, inner = like.shape
        self._stored: list[dict[str, _Stored]] = []
        for expert in range(self.num_experts):
            parts = {"gate_proj": (inner, width), "up_proj": (inner, width), "down_proj": (width, inner)}
            modules = nn.ModuleDict({part: nn.Module() for part in parts})
            self.add_module(str(expert), modules)
            form_of = {part: checkpoint.format(f"{name}.{expert}.{part}", *shape) for part, shape in parts.items()}
            whole = Whole(like.dtype)
            self._stored.append(
                {part: _Stored(modules[part], form_of[part] or whole, parts[part], like.device) for part in parts}
            )

    def repack(self, device: torch.device) -> None:
        """Bring the experts' weights into one layout, on their device."""
        found = [{part: stored.take(device) for part, stored in of_expert.items()} for of_expert in self._stored]
        self.gate_up_proj = of_experts([below(own["gate_proj"], own["up_proj"]) for own in found])
        self.down_proj = of_experts([own["down_proj"] for own in found])
        self._modules.clear()  # they are empty now


class _ExpertsJoined(_Experts):
    """Those whose weights a checkpoint has joined."""

    def __init__(self, experts: Any, forms: dict[str, Format]) -> None:
        super().__init__(experts)
        self._stored = {}
        for product, form in forms.items():
            whole = getattr(experts, product)
            shape = tuple(whole.mT.shape if experts.is_transposed else whole.shape)
            self._stored[product] = _Stored(self, form, shape, whole.device)
            if self.has_bias:
                self.register_parameter(f"{product}_bias", getattr(experts, f"{product}_bias"))

    def repack(self, device: torch.device) -> None:
        """Bring the weights into one layout, on their device."""
        for product, stored in self._stored.items():
            setattr(self, product, stored.take(device))


@register_quantization_config(METHOD)
class _Config(QuantizationConfigMixin):  # type: ignore[misc]
    """Holds what the model's own file says, and its folder."""

    def __init__(self, given: dict[str, Any], folder: str, **_: Any) -> None:
        self.quant_method = METHOD
        self.given = given
        self.folder = folder


@register_quantizer(METHOD)
class _Quantizer(HfQuantizer):  # type: ignore[misc]
    """Lets `transformers` load such models with modules of ours in place of what was quantised."""

    requires_calibration = True
    _each_apart = False
    """Whether experts are loaded one by one."""

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        config = self.quantization_config
        checkpoint = Checkpoint(Path(config.folder), config.given)
        for name, module in list(model.named_modules()):
            if (ours := _in_place_of(module, name, checkpoint)) is not None:
                model.set_submodule(name, ours)
                model.all_tied_weights_keys.pop(f"{name}.weight", None)  # it has its own, whatever the file says
                self._each_apart |= isinstance(ours, _ExpertsApart)

    def update_weight_conversions(self, weight_conversions: list[Any], *_: Any) -> list[Any]:
        """Those that don't join experts. Versions of `transformers` differ in whether they give the model as well."""
        if not self._each_apart:
            return weight_conversions
        return [each for each in weight_conversions if not any("experts" in name for name in each.target_patterns)]

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> None:
        pass

    def is_serializable(self) -> bool:
        """They are only read."""
        return False

    @property
    def is_trainable(self) -> bool:
        """They are only read."""
        return False


def _in_place_of(module: nn.Module, name: str, checkpoint: Checkpoint) -> nn.Module | None:
    """What takes the place of a module that was quantised, and of any experts beside it."""
    if isinstance(module, nn.Linear):
        form = checkpoint.format(name, module.out_features, module.in_features)
        return None if form is None else _Linear(form, module)
    if not hasattr(module, "_apply_gate"):
        return None
    forms = checkpoint.joined(name)
    return _ExpertsJoined(module, forms) if forms else _ExpertsApart(module, name, checkpoint)


def repack(model: nn.Module, device: torch.device) -> None:
    """Bring all such weights of a model into one layout, on the device that it goes to."""
    for module in model.modules():
        if isinstance(module, (_Linear, _ExpertsApart, _ExpertsJoined)):
            module.repack(device)
