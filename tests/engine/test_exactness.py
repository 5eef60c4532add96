"""The promise that everything rests on."""

from slipstream.models import Model
from tests.engine import exactness


def test_the_same_request_gives_the_same_tokens_whatever_happens_around_it(model: Model) -> None:
    assert exactness.run(100, seed=1, model=model) >= 100
