"""How `transformers` comes to load weights of 4 and 8 bits, and its classes to compute with them, without other
packages."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from slipstream.backend.torch import fp8
from slipstream.backend.torch.hooks import operators_now
from slipstream.backend.torch.operators import Tensor
from slipstream.backend.torch.packed import Format, Packed

METHOD = "slipstream-packed"
"""What the quantisation is called here, so that `transformers` takes no other package to it."""


class PackedLinear(nn.Module):  # type: ignore[misc]  # torch's types are not looked at
    """Takes the place of `nn.Linear`. First it has a checkpoint's tensors, and from `repack` on a weight of them."""

    def __init__(self, form: Format | fp8.Format, linear: nn.Linear) -> None:
        super().__init__()
        self._form = form
        tensors = form.tensors(linear.out_features, linear.in_features, linear.weight.dtype)
        for name, (shape, dtype) in tensors.items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device=linear.weight.device))
        self.register_buffer("bias", linear.bias.data if linear.bias is not None else None)
        self._names = tuple(tensors)
        self.packed: Packed | fp8.Scaled | None = None

    def repack(self, device: torch.device) -> None:
        """Bring the weight into one layout, on its device."""
        self.packed = self._form.packed({name: getattr(self, name).to(device) for name in self._names})
        for name in self._names:
            delattr(self, name)

    def forward(self, x: Tensor) -> Tensor:
        """The product of `x` with the weight."""
        assert self.packed is not None
        x = x if self.packed.order is None else x[..., self.packed.order]
        return operators_now().packed_linear(x, self.packed, self.bias)


@register_quantization_config(METHOD)
class _Config(QuantizationConfigMixin):  # type: ignore[misc]
    """Holds what the model's own file says, and its folder."""

    def __init__(self, given: dict[str, Any], folder: str, **_: Any) -> None:
        self.quant_method = METHOD
        self.given = given
        self.folder = folder


@register_quantizer(METHOD)
class _Quantizer(HfQuantizer):  # type: ignore[misc]
    """Lets `transformers` load such models with `PackedLinear` in place of what was quantised."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        config = self.quantization_config
        format_of = _formats(config.given, Path(config.folder))
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and (form := format_of(name, module)) is not None:
                parent, _, own = name.rpartition(".")
                setattr(model.get_submodule(parent), own, PackedLinear(form, module))

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> None:
        pass

    def is_serializable(self) -> bool:
        """They are only read."""
        return False

    @property
    def is_trainable(self) -> bool:
        """They are only read."""
        return False


def _formats(given: dict[str, Any], folder: Path) -> Callable[[str, nn.Linear], Format | fp8.Format | None]:
    """What says how a layer's weight is stored; None if as it is."""
    if given["quant_method"] in ("awq", "gptq"):
        form, kept = Format.of(given), ("lm_head", *(given.get("modules_to_not_convert") or ()))
        return lambda name, _: None if any(part in name for part in kept) else form
    checkpoint = fp8.Checkpoint(folder, given)
    return lambda name, linear: checkpoint.format(name, linear.out_features, linear.in_features)


def repack(model: nn.Module, device: torch.device) -> None:
    """Bring all such weights of a model into one layout, on the device that it goes to."""
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.repack(device)
