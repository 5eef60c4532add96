"""The toys keep to the contracts themselves, and an engine over any of them keeps its promises."""

import pytest

from tests.conformance.backends import check_backend
from tests.unit.toy_backend import CheckpointToy, HybridToy, InexactToy, QueueToy, Toy, ToyBackend, WindowToy


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "make",
    [
        lambda: ToyBackend(2000),
        CheckpointToy,
        lambda: HybridToy(2000),
        lambda: WindowToy(2000),
        lambda: InexactToy(2000),
        lambda: QueueToy(2000),
    ],
)
def test_a_toy_is_a_backend(make: type[Toy], seed: int) -> None:
    toy = make()
    check_backend(toy, seed=seed, longest=100)
    assert not toy.violations
