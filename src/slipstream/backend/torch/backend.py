"""The torch backend: a paged one that takes the first operators that are exact on this device."""

import logging
from collections.abc import Callable, Sequence

import torch

from slipstream.backend.paged import PagedBackend
from slipstream.backend.torch.model import TorchModel
from slipstream.backend.torch.operators import Operators
from slipstream.backend.torch.plain import PlainOperators

logger = logging.getLogger(__name__)


class TorchBackend(PagedBackend[TorchModel]):
    """A `PagedBackend` on a GPU or a processor.

    If a self-test finds no step class with some `operators`, the next ones are tried; if it finds none with any, steps
    are computed with the first, and are not exact.
    """

    def __init__(
        self,
        model: TorchModel,
        operators: Sequence[Operators],
        *,
        kv_memory: int,
        progress: Callable[[float], None] = lambda _: None,
    ) -> None:
        for candidate in (*operators, operators[0]):
            model.operators = candidate
            if model.gpu:
                model.warm_up()
            super().__init__(model, kv_memory=kv_memory, progress=progress)
            if self.exact:
                break
            logger.warning("steps are not exact with operators of kind %s", candidate.name)


def operators_for(device: torch.device) -> list[Operators]:
    """What a device can compute with, the fastest first."""
    if device.type == "cuda":
        from slipstream.backend.torch import kernel_operators  # needs Triton, which is for GPUs

        return [kernel_operators.KernelOperators(), kernel_operators.UnfusedOperators(), PlainOperators()]
    return [PlainOperators()]
