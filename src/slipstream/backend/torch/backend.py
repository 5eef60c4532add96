"""The torch backend: a paged one that takes the first operators that are exact on this device."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from operator import itemgetter

import torch

from slipstream.backend.paged import PagedBackend
from slipstream.backend.torch.model import TorchModel
from slipstream.backend.torch.operators import Operators
from slipstream.backend.torch.plain import PlainOperators
from slipstream.errors import ModelError

logger = logging.getLogger(__name__)


class TorchBackend(PagedBackend[TorchModel]):
    """A `PagedBackend` on a GPU or a processor.

    The first `operators` are taken that can be used here and are exact, as a self-test finds; those that may be slower
    than the next such only if they aren't. If none are exact, the first that can be used are taken. Raises `ModelError`
    if none can.
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
        exact: list[tuple[float, Operators]] = []
        expected = 1 + sum(each.may_be_slower for each in operators)
        for candidate in operators:
            level = logging.INFO if candidate.may_be_slower else logging.WARNING
            model.operators = candidate
            try:
                if model.gpu:
                    model.warm_up()
            except ModelError as error:
                if not able and candidate is operators[-1]:
                    raise
                logger.log(level, "operators of kind %s can't be used here: %s", candidate.name, error)
                continue
            super().__init__(model, kv_memory=kv_memory, progress=partial(_report, progress, len(able), expected))
            able.append(candidate)
            if self.exact:
                exact.append((self.cost.measured.turn, candidate))
                if not candidate.may_be_slower:
                    break
            else:
                logger.log(level, "steps are not exact with operators of kind %s", candidate.name)
        if exact:
            _, chosen = min(exact, key=itemgetter(0))
        else:
            chosen = next((each for each in able if not each.may_be_slower), able[0])
        if chosen is not model.operators:
            model.operators = chosen
            super().__init__(model, kv_memory=kv_memory)


def _report(progress: Callable[[float], None], before: int, expected: int, done: float) -> None:
    """Tell what fraction is done of all self-tests that are expected."""
    progress(min(1.0, (before + done) / expected))


def operators_for(device: torch.device) -> list[Operators]:
    """What a device can compute with, the fastest first."""
    if device.type == "cuda":
        try:
            from slipstream.backend.torch import kernel_operators  # needs Triton, which is for GPUs
        except ImportError as error:  # not for every system where torch has a GPU
            logger.warning("steps are computed without kernels, which is slow for many tokens: %s", error)
            return [PlainOperators()]
        ours = kernel_operators.KernelOperators(), kernel_operators.UnfusedOperators(), PlainOperators()
        return [*([] if torch.version.hip else [kernel_operators.LibraryOperators()]), *ours]
    return [PlainOperators()]
