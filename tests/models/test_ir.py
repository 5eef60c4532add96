"""IR exported by optimum-intel, judged by transformers on the same weights."""

from pathlib import Path

import numpy as np
import openvino as ov
import pytest

from slipstream.models import ModelStore
from tests.models.exported import FAMILIES
from tests.models.test_gguf import assert_as_judged, assert_exact, computed_by

pytestmark = pytest.mark.models


@pytest.mark.parametrize("family", FAMILIES)
class TestFamily:
    def test_gives_the_judges_probabilities(self, exported: Path, family: str) -> None:
        judged = exported / f"{family}.npz"
        found = computed_by(ov.Core().read_model(exported / f"{family}-ir" / "openvino_model.xml"), judged)
        assert_as_judged(found, np.load(judged)["judged"])

    def test_is_exact_however_it_is_computed(self, exported: Path, family: str, tmp_path: Path) -> None:
        assert_exact(ModelStore(tmp_path).ensure(str(exported / f"{family}-ir")))
