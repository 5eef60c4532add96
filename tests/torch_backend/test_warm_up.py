"""What is compiled before the first request: every kernel, for every kind of arguments that a step may have.

Triton compiles a kernel anew for an integer or an address that a power of two divides no longer, or for another
constant. A request would wait for that, and a CUDA graph can't be recorded meanwhile.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from triton._C.libtriton import native_specialize_impl
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.interpreter import GridExecutor

from slipstream.backend.steps import PagedChunk, lay_out
from slipstream.backend.torch import graphs
from slipstream.backend.torch.kernel_operators import KernelOperators, UnfusedOperators
from slipstream.backend.torch.kernels import attention, by_row, experts, products
from slipstream.backend.torch.model import TorchModel
from slipstream.backend.torch.operators import Operators
from slipstream.sampling import Row, Sampler, SamplingParams
from tests.torch_backend.running import VOCABULARY, of_architecture
from tests.torch_backend.test_graphs import Recorder
from tests.torch_backend.tiny import ARCHITECTURES, OTHERS

pytestmark = pytest.mark.torch
KERNELS = {
    kernel.fn.__name__: kernel
    for module in (attention, by_row, experts, products)
    for kernel in vars(module).values()
    if hasattr(kernel, "fn")
}


@contextmanager
def programs() -> Iterator[set[tuple[Any, ...]]]:
    """The programs that Triton would have compiled for the launches in here, none of which is computed."""
    found: set[tuple[Any, ...]] = set()

    def launch(executor: GridExecutor, *given: Any, **named: Any) -> None:
        unspecialised = KERNELS[executor.fn.__name__].kwargs.get("do_not_specialize") or ()
        values = dict(zip(inspect.signature(executor.fn).parameters, given, strict=False)) | named
        key = [
            (name, value)
            if name in executor.constexprs or name not in executor.arg_names
            else (name, *native_specialize_impl(CUDABackend, value, False, name not in unspecialised, True))
            for name, value in values.items()
        ]
        found.add((executor.fn.__name__, *key))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", launch)
        patch.setattr(graphs, "WORTH", 2)
        yield found


def model_of(name: str, operators: Operators, **shape: int) -> TorchModel:
    runner = of_architecture(name, operators, **shape)
    runner.record_with(Recorder())
    return runner


def run(model: TorchModel, chunks: list[PagedChunk], size: int, rows: int) -> None:
    """Twice: as it is, and recorded if it's small."""
    for _ in range(2):
        model.start(lay_out(chunks, size, rows, windows=model.window_tables))
        model.finish()


ODD = {"num_attention_heads": 5, "num_key_value_heads": 5, "hidden_size": 80}
"""So that few sizes of buffers are even."""


@pytest.mark.parametrize(
    ("name", "operators", "shape"),
    [
        *((name, KernelOperators, {}) for name in (*ARCHITECTURES, *OTHERS)),
        *(("gemma3_text", operators, ODD) for operators in (KernelOperators, UnfusedOperators)),
    ],
)
def test_no_step_waits_for_a_kernel(name: str, operators: type[KernelOperators], shape: dict[str, int]) -> None:
    model = model_of(name, operators(), **shape)
    with programs() as compiled:
        model.warm_up()
        warm = set(compiled)
        model.allocate(60 * (1 + model.window_tables))
        table = np.arange(1, 50, dtype=np.int32)
        for size in (2, 5, 16, 40, 112, 512):
            for past in (0, 250, 300, 700):
                run(model, [PagedChunk(np.zeros(min(size, 70), np.int32), past, table, 1)], size, min(size, 8))
                if size >= 5:
                    lone = (PagedChunk(np.zeros(1, np.int32), begin, table, 1) for begin in (past, 3))
                    run(model, [*lone], size, 2)
        sampler = Sampler(SamplingParams(temperature=0), 0, np.empty(0, np.int32), VOCABULARY)
        model.start(lay_out([PagedChunk(np.zeros(2, np.int32), 0, table, 2)], 4, 2, windows=model.window_tables))
        logits = model.finish()
        for words in (VOCABULARY // 32, VOCABULARY // 32 + 3):  # a tokenizer may have more tokens than there are logits
            logits.choose([Row(at, sampler, 0, mask=np.full(words, -1, np.int32)) for at in range(2)])
    assert warm
    assert not sorted(map(str, compiled - warm))
