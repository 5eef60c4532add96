"""How many kernels a layer launches: on a GPU, that decides how long small steps take that read little."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

from slipstream.backend.steps import PagedChunk, lay_out
from slipstream.backend.torch.hooks import _Functions
from slipstream.backend.torch.kernel_operators import KernelOperators
from slipstream.backend.torch.model import TorchModel
from tests.torch_backend.running import of_architecture

pytestmark = pytest.mark.torch

_NO_LAUNCH = {
    "alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "expand", "lift_fresh", "new_empty",
    "permute", "select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze",
    "view", "_unsafe_view",
}  # fmt: skip
_PERHAPS_NONE = {"chunk", "contiguous", "dropout", "mT", "reshape", "resolve_conj", "resolve_neg", "to"}
"""What copies nothing if it need not."""


class Launches(TorchDispatchMode):  # type: ignore[misc]
    """Counts torch's operations that would be a kernel, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.is_ours = False
        """Whether a kernel of ours is being interpreted."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        copies = name not in _PERHAPS_NONE or (isinstance(result, torch.Tensor) and not _shares(result, args[0]))
        self.found[name] += not self.is_ours and name not in _NO_LAUNCH and copies
        return result


def _shares(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool(one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr())


@contextmanager
def counted() -> Iterator[Counter[str]]:
    launches, launch = Launches(), GridExecutor.__call__

    def noted(executor: GridExecutor, *given: Any, **options: Any) -> None:
        launches.found[executor.fn.__name__] += 1
        launches.is_ours = True
        launch(executor, *given, **options)
        launches.is_ours = False

    with pytest.MonkeyPatch.context() as patch, launches:
        patch.setattr(GridExecutor, "__call__", noted)
        yield launches.found


def launched(name: str, layers: int) -> Counter[str]:
    """By a step of a model with so many layers."""
    runner = model_of(name, layers)
    with counted() as found:
        step_of(runner)
    return found


def model_of(name: str, layers: int) -> TorchModel:
    runner = of_architecture(name, KernelOperators(), num_hidden_layers=layers)
    runner.allocate(4 * (1 + runner.window_tables))
    return runner


def step_of(runner: TorchModel) -> None:
    chunk = PagedChunk(np.arange(5, 7, dtype=np.int32), 0, np.array([1], np.int32), 1)
    runner.start(lay_out([chunk], 2, 1, windows=runner.window_tables))
    runner.finish()


@pytest.mark.parametrize(
    ("name", "expected"),
    [("llama", 10), ("phi3", 10), ("qwen3", 12), ("gemma3_text", 14), ("qwen3_moe", 18), ("gpt_oss", 15)],
)
def test_a_layer_launches_few_kernels(name: str, expected: int) -> None:
    few, many = (launched(name, layers) for layers in (2, 6))
    of_layers = Counter({kernel: (many[kernel] - few[kernel]) // 4 for kernel in many if many[kernel] > few[kernel]})
    assert of_layers.total() == expected, of_layers
    assert few.total() - 2 * expected < 30, few


def test_no_look_at_a_launchs_tensors_is_taken_for_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would cost the host some microseconds."""
    runner, looks = model_of("qwen3", 2), Counter[str]()
    launch, taken_over, launching = GridExecutor.__call__, _Functions.__torch_function__, [False]

    def noted(executor: GridExecutor, *given: Any, **options: Any) -> None:
        launching[0] = True
        launch(executor, *given, **options)
        launching[0] = False

    def watched(functions: _Functions, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        looks[str(func)] += launching[0]
        return taken_over(functions, func, types, args, kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", noted)
    monkeypatch.setattr(_Functions, "__torch_function__", watched)
    step_of(runner)
    assert looks
    assert not looks.total(), looks
