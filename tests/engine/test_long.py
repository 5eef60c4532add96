"""What takes minutes: `make test-long`."""

import pytest

from slipstream.models import Model
from tests.engine import exactness


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("seed", range(100, 110))
def test_thousands_of_scenarios(model: Model, seed: int) -> None:
    assert exactness.run(300, seed=seed, model=model) >= 300
