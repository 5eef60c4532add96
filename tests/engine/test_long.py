"""What takes minutes: `make test-long`."""

from pathlib import Path

import pytest

from slipstream.models import Model
from tests.engine import exactness
from tests.processors import AVX2, AVX2_NARROW

pytestmark = [pytest.mark.long, pytest.mark.timeout(7200)]


@pytest.mark.parametrize("seed", range(100, 110))
def test_thousands_of_scenarios(model: Model, seed: int) -> None:
    assert exactness.run(300, seed=seed, model=model) >= 300


@pytest.mark.parametrize(("sizes", "rows"), [(AVX2, (1,)), (AVX2_NARROW, AVX2_NARROW)], ids=["one small", "two small"])
def test_a_thousand_scenarios_on_emulated_processors(
    model: Model, tmp_path: Path, sizes: tuple[int, ...], rows: tuple[int, ...]
) -> None:
    processor = exactness.Processor(tmp_path, sizes, rows)
    assert exactness.run(500, seed=200, model=model, processor=processor) >= 500
