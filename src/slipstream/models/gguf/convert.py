"""Write the IR of a GGUF file, as a process of its own: `python -m slipstream.models.gguf.convert FILE.gguf IR.xml`."""

import re
import sys
from pathlib import Path

import openvino as ov

from slipstream.disk import serialize
from slipstream.errors import SlipstreamError
from slipstream.models.gguf import GGUF, decoder_of
from slipstream.models.gguf.graph import build
from slipstream.models.gguf.recurrent import IN_FLOAT32


def main() -> None:
    """Convert, or say in one line on stderr why not."""
    source, target = map(Path, sys.argv[1:])
    try:
        file = GGUF.read(source)
        write(build(file, decoder_of(file)), target)
    except (SlipstreamError, LookupError, ValueError, RuntimeError, OSError) as error:
        sys.exit(" ".join(str(error).split()))


def write(model: ov.Model, target: Path) -> None:
    """Write a graph, with the runtime's note at operations that it must compute in float32.

    From Python, operations can have notes of numbers and strings alone; this one is neither.
    """
    serialize(model, target)
    text = target.read_text(encoding="utf-8")
    noted = re.sub(rf'<layer [^>]*name="[^"]*{re.escape(IN_FLOAT32)}"[^>]*>', lambda layer: layer[0] + _PRECISE, text)
    target.write_text(noted, encoding="utf-8")


_PRECISE = '<rt_info><attribute name="precise" version="0" /></rt_info>'


if __name__ == "__main__":
    main()
