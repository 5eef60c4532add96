"""The judges' tables: how far from them each family is, and whether it's exact under reuse.

    python -m tests.models.table FOLDER [FAMILY…]

FOLDER is what `tests.models.judged` made of GGUF files, or `tests.models.exported` of IR. Deviations are the largest in
the logarithm of a probability, among the ten likeliest tokens of each position. Those from `transformers` are computed
in float32 throughout; as the server computes; and so with the layers' matrices of a GGUF file quantised, first to 8
bits (Q8_0) and then to 4 (Q4_0). `LLAMA_SERVER=/path` adds llama.cpp's, from float32, at a few positions.
"""

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import openvino as ov
from gguf import GGMLQuantizationType, quantize

from slipstream.models import ModelStore
from slipstream.models.gguf import GGUF
from slipstream.models.gguf.file import Tensor
from slipstream.types import FloatArray
from tests.engine import exactness
from tests.models.judged import WINDOW, deviation
from tests.models.test_gguf import FLOAT32, computed, computed_by
from tests.models.test_llama_cpp import deviation_from_llama_cpp

_KINDS = (GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_0)
_SMALL = ("ffn_gate_inp", "conv", "ssm_")
"""Matrices that files don't quantise."""


def main() -> None:
    """Print a row for each family, as Markdown."""
    folder = Path(sys.argv[1])
    print("| family | float32 | as served | in 8 bits | in 4 bits | llama.cpp |")
    print("| --- | --- | --- | --- | --- | --- |")
    for family in sys.argv[2:] or sorted(path.stem for path in folder.glob("*.npz")):
        expected = np.load(folder / f"{family}.npz")["judged"]
        path, way, served = folder / f"{family}.gguf", "", {"KV_CACHE_PRECISION": _kv_precision()}
        if path.exists():
            found = [computed(path, options=each) for each in (FLOAT32, served)]
            found += [computed(path, lambda file, kind=kind: _quantised(file, kind), options=served) for kind in _KINDS]
            other = _from_llama_cpp(path, found[0])
        else:
            path, way, other = folder / f"{family}-ir", " (IR)", ""
            graph = path / "openvino_model.xml"
            judged = folder / f"{family}.npz"
            found = [computed_by(ov.Core().read_model(graph), judged, each) for each in (FLOAT32, served)]
        deviations = [f"{deviation(each, expected):.1e}" for each in found] + [""] * (4 - len(found))
        way += "" if _exact(path) else ", not exact"
        print(f"| {family}{way} | {' | '.join(deviations)} | {other} |", flush=True)


@dataclass(frozen=True)
class _Quantised(Tensor):
    """A tensor in float32, as if the file had it in another kind."""

    def read(self) -> np.ndarray:
        return quantize(
            np.fromfile(self.path, np.float32, self.size // 4, offset=self.offset).reshape(self.shape), self.kind
        ).reshape(-1)


def _quantised(file: GGUF, kind: GGMLQuantizationType) -> GGUF:
    """A file in float32, with the matrices of its layers in another kind."""

    def changed(name: str, tensor: Tensor) -> Tensor:
        is_matrix = name.startswith("blk.") and len(tensor.shape) > 1 and tensor.shape[-1] % 32 == 0
        if not is_matrix or any(part in name for part in _SMALL):
            return tensor
        return _Quantised(tensor.path, tensor.offset, tensor.size, kind, tensor.shape)

    return replace(file, tensors={name: changed(name, tensor) for name, tensor in file.tensors.items()})


def _from_llama_cpp(path: Path, ours: FloatArray) -> str:
    """How far llama.cpp is from what was computed in float32; nothing if it isn't there."""
    if "LLAMA_SERVER" not in os.environ:
        return ""
    with TemporaryDirectory() as folder:
        binary, log = Path(os.environ["LLAMA_SERVER"]), Path(folder) / "log"
        return f"{deviation_from_llama_cpp(binary, path, ours, log):.1e}"


def _kv_precision() -> str:
    """Of keys and values, as `PagedModel` has them on this processor."""
    return "bf16" if "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES") else "f16"


def _exact(path: Path) -> bool:
    """Whether this processor is exact; raises `AssertionError` if a request gave other tokens than from scratch."""
    with TemporaryDirectory() as store:
        model = ModelStore(Path(store)).ensure(str(path))
        if not exactness.THIS_PROCESSOR.backend(model, kv_memory=2**24).exact:
            return False
        exactness.run(12, seed=1, model=model, longest=2 * WINDOW)
        return True


if __name__ == "__main__":
    main()
