"""The promise on processors whose kernels change with the number of rows, emulated on the real model."""

import bisect
from pathlib import Path

import pytest

from slipstream.backend.steps import StepClass
from slipstream.models import Model
from tests.engine import exactness
from tests.processors import AVX2, AVX2_NARROW

BEFORE_CLASSES = StepClass((2, 8, 16, 24, *range(32, 256, 16), *range(256, 513, 64)), (1, 2, 4, 8, 16, 32, 64))
"""Sizes that are fine where all of them are one class."""


@pytest.mark.parametrize(("sizes", "rows"), [(AVX2, (1,)), (AVX2_NARROW, AVX2_NARROW)], ids=["one small", "two small"])
def test_the_promise_holds_in_steps_of_one_class(
    model: Model, tmp_path: Path, sizes: tuple[int, ...], rows: tuple[int, ...]
) -> None:
    processor = exactness.Processor(tmp_path, sizes, rows)
    backend = processor.backend(model, kv_memory=64 * 2**20)
    assert backend.exact
    for bounds, chosen in ((sizes, backend.step_class.sizes), (rows, backend.step_class.row_counts)):
        assert len({bisect.bisect_left(bounds, each) for each in chosen}) == 1
    assert exactness.run(8, seed=2, model=model, processor=processor, longest=200) >= 8


def test_the_promise_is_broken_in_steps_of_several_classes(model: Model, tmp_path: Path) -> None:
    """Else the tests above would prove nothing."""
    processor = exactness.Processor(tmp_path, AVX2, (), BEFORE_CLASSES)
    with pytest.raises(AssertionError, match="afresh"):
        exactness.run(40, seed=2, model=model, processor=processor, longest=200)
