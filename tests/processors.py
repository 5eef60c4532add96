"""Processors that this machine is not: kernels that change with the number of rows, emulated on top of what is there.

    python -m tests.processors SIZES ROWS serve …

runs the command line on such a processor, where SIZES and ROWS are comma-separated bounds, or `-` for none.
"""

import bisect
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from slipstream.backend.logits import HostLogits
from slipstream.backend.paged_model import PagedModel
from slipstream.backend.self_test import SIZES
from slipstream.backend.steps import Runner, StepInputs
from slipstream.types import FloatArray

AVX2 = (1, 80)
"""Steps of 1, of up to 80 and of more tokens give different bits, as they do on a Zen 3."""
AVX2_NARROW = (1, 6, 80)
"""So do steps of up to 6 tokens, for some widths of layers."""
ZEN_4 = (4,)
"""So do steps of up to 4 tokens with AVX-512."""
NO_CLASS = tuple(range(1, SIZES[-1]))
"""Every size gives bits of its own, and so does every place in a step: see `Emulated`."""


class Emulated:
    """A runner whose logits depend on the class of their step's size and of its number of logit rows.

    Bounds are the largest counts of each class but the last. What a class adds is as large as differences between
    likely tokens, so that it decides answers. With `places`, a row's bits depend on its place among the rows as well,
    so that there is no class at all.
    """

    def __init__(
        self, runner: Runner, *, sizes: Sequence[int] = (), rows: Sequence[int] = (), places: bool = False
    ) -> None:
        self._runner = runner
        self._sizes = sizes
        self._rows = rows
        self._places = places
        self._shape = (0, 0)

    def __getattr__(self, name: str) -> object:
        return getattr(self._runner, name)

    @property
    def settings(self) -> str:
        """Another processor's, so that what is measured is not taken for this one's."""
        return f"{self._runner.settings}; emulated {self._sizes} {self._rows} {self._places}"  # type: ignore[attr-defined]

    def start(self, inputs: StepInputs) -> None:
        self._runner.start(inputs)
        self._shape = len(inputs["input_ids"]), len(inputs["logit_rows"])

    def finish(self) -> HostLogits:
        logits = self._runner.finish().host()
        size, rows = self._shape
        changed = logits + self._noise("size", bisect.bisect_left(self._sizes, size))
        changed += self._noise("rows", bisect.bisect_left(self._rows, rows))
        if self._places:
            changed += np.arange(rows, dtype=np.float32)[:, None] * self._noise("place", 0)
        return HostLogits(changed)

    @cache  # noqa: B019 - a runner lives as long as the process
    def _noise(self, kind: str, index: int) -> FloatArray:
        rng = np.random.default_rng((len(kind), ord(kind[0]), index))
        return rng.normal(scale=0.5, size=self._runner.vocab_size).astype(np.float32)


def main() -> None:
    """The command line, on an emulated processor."""
    from slipstream import cli, runtime

    sizes, rows = (() if bounds == "-" else tuple(map(int, bounds.split(","))) for bounds in sys.argv[1:3])
    del sys.argv[1:3]

    def emulated(ir_path: Path, *, threads: int | None = None) -> Emulated:
        return Emulated(PagedModel(ir_path, threads=threads), sizes=sizes, rows=rows, places=sizes == NO_CLASS)

    runtime.PagedModel = emulated  # type: ignore[assignment, misc]
    cli.main()


if __name__ == "__main__":
    main()
