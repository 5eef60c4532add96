"""The judges' table of GGUF families: how far from `transformers` each is, and whether it's exact under reuse.

    python -m tests.models.table FOLDER [FAMILY…]

FOLDER is what `tests.models.judged` made. Deviations are the largest in the logarithm of a probability, among the ten
likeliest tokens of each position: once computed in float32 throughout, once as the server computes.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from slipstream.models import ModelStore
from tests.engine import exactness
from tests.models.judged import FAMILIES, WINDOW, deviation
from tests.models.test_gguf import AS_SERVED, FLOAT32, computed


def main() -> None:
    """Print a row for each family, as Markdown."""
    folder = Path(sys.argv[1])
    print("| family | way in | judge | float32 | as served | exact under reuse |")
    print("| --- | --- | --- | --- | --- | --- |")
    for family in sys.argv[2:] or FAMILIES:
        path = folder / f"{family}.gguf"
        expected = np.load(path.with_suffix(".npz"))["judged"]
        found = [f"{deviation(computed(path, options=each), expected):.1e}" for each in (FLOAT32, AS_SERVED)]
        print(f"| {family} | GGUF | transformers | {' | '.join(found)} | {_exact(path)} |", flush=True)


def _exact(path: Path) -> str:
    """Whether random scenarios give the tokens of a computation from scratch; raises `AssertionError` if they don't."""
    with TemporaryDirectory() as store:
        model = ModelStore(Path(store)).ensure(str(path))
        if not exactness.THIS_PROCESSOR.backend(model, kv_memory=2**24).exact:
            return "no step sizes keep its bits here"
        return f"yes, {exactness.run(12, seed=1, model=model, longest=2 * WINDOW)} requests"


if __name__ == "__main__":
    main()
