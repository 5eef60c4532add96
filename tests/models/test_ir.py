"""IR exported by optimum-intel, judged by transformers on the same weights."""

from pathlib import Path

import numpy as np
import openvino as ov
import pytest

from slipstream.models import ModelStore
from tests.engine import exactness
from tests.models.exported import FAMILIES
from tests.models.judged import WINDOW, deviation
from tests.models.test_gguf import CLOSE, computed_by

pytestmark = pytest.mark.models


@pytest.mark.parametrize("family", FAMILIES)
class TestFamily:
    def test_gives_the_judges_probabilities(self, exported: Path, family: str) -> None:
        judged = exported / f"{family}.npz"
        found = computed_by(ov.Core().read_model(exported / f"{family}-ir" / "openvino_model.xml"), judged)
        expected = np.load(judged)["judged"]
        assert deviation(found, expected) < CLOSE
        assert (found.argmax(axis=-1) == expected.argmax(axis=-1)).all()

    def test_is_exact_however_it_is_computed(self, exported: Path, family: str, tmp_path: Path) -> None:
        model = ModelStore(tmp_path).ensure(str(exported / f"{family}-ir"))
        if not exactness.THIS_PROCESSOR.backend(model, kv_memory=2**24).exact:
            pytest.skip("the self-test found no step sizes that keep this model's bits on this processor, and says so")
        assert exactness.run(12, seed=1, model=model, longest=2 * WINDOW) >= 12
