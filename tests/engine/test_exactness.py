"""The promise that everything rests on."""

import pytest

from slipstream.models import Model
from tests.engine import exactness


@pytest.mark.timeout(900)  # takes a minute on two cores of its own
def test_the_same_request_gives_the_same_tokens_whatever_happens_around_it(model: Model) -> None:
    assert exactness.run(200, seed=1, model=model) >= 200
