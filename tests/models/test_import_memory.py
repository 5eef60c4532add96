"""How much memory the import of a large file takes: it streams, so hardly more than is written at once."""

import subprocess
import sys
from pathlib import Path

import pytest

from slipstream.models import Model
from slipstream_bench.random_models import write

pytestmark = [
    pytest.mark.models,
    pytest.mark.skipif(sys.platform != "linux", reason="the largest size of a process is in other units elsewhere"),
]

IMPORT = """
import resource, sys
from pathlib import Path
from slipstream.models import ModelStore
ModelStore(Path(sys.argv[1])).ensure(sys.argv[2])
print(1024 * sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))
"""


def test_import_takes_less_than_twice_the_file(whole_model: Model, tmp_path: Path) -> None:
    """Beyond what the import of a small one takes, with all pages of the files that are mapped, by both processes."""
    sizes, peaks = [], []
    for layers in (1, 28):
        file = tmp_path / f"{layers}.gguf"
        write("qwen3-0.6b", file, layers=layers)
        command = [sys.executable, "-c", IMPORT, str(tmp_path / str(layers)), str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        sizes.append(file.stat().st_size)
        peaks.append(int(done.stdout))
    print(f"files of {sizes[0] >> 20} and {sizes[1] >> 20} MiB: {peaks[0] >> 20} and {peaks[1] >> 20} MiB at most")
    assert sizes[1] - sizes[0] > 200 * 2**20
    assert peaks[1] - peaks[0] < 2 * (sizes[1] - sizes[0])
