"""The torch backend: a paged one that takes the first operators that are exact on this device."""

import logging
from collections.abc import Callable, Sequence

import torch

from slipstream.backend.paged import PagedBackend
from slipstream.backend.torch.model import TorchModel
from slipstream.backend.torch.operators import Operators
from slipstream.backend.torch.plain import PlainOperators
from slipstream.errors import ModelError

logger = logging.getLogger(__name__)


class TorchBackend(PagedBackend[TorchModel]):
    """A `PagedBackend` on a GPU or a processor.

    If some `operators` can't be used here, or a self-test finds no step class with them, the next ones are tried; if it
    finds none with any, steps are computed with the first that can be used, and are not exact. Raises `ModelError` if
    none can.
    """

    def __init__(
        self,
        model: TorchModel,
        operators: Sequence[Operators],
        *,
        kv_memory: int,
        progress: Callable[[float], None] = lambda _: None,
    ) -> None:
        able: list[Operators] = []
        for candidate in operators:
            model.operators = candidate
            try:
                if model.gpu:
                    model.warm_up()
            except ModelError as error:
                if not able and candidate is operators[-1]:
                    raise
                logger.warning("operators of kind %s can't be used here: %s", candidate.name, error)
                continue
            super().__init__(model, kv_memory=kv_memory, progress=progress)
            if self.exact:
                return
            logger.warning("steps are not exact with operators of kind %s", candidate.name)
            able.append(candidate)
        model.operators = able[0]
        super().__init__(model, kv_memory=kv_memory, progress=progress)


def operators_for(device: torch.device) -> list[Operators]:
    """What a device can compute with, the fastest first."""
    if device.type == "cuda":
        try:
            from slipstream.backend.torch import kernel_operators  # needs Triton, which is for GPUs
        except ImportError as error:  # not for every system where torch has a GPU
            logger.warning("steps are computed without kernels, which is slow for many tokens: %s", error)
            return [PlainOperators()]
        return [kernel_operators.KernelOperators(), kernel_operators.UnfusedOperators(), PlainOperators()]
    return [PlainOperators()]
