"""Write the IR of a GGUF file, as a process of its own: `python -m slipstream.models.gguf.convert FILE.gguf IR.xml`."""

import sys
from pathlib import Path

import openvino as ov

from slipstream.errors import SlipstreamError
from slipstream.models.gguf import GGUF, decoder_of
from slipstream.models.gguf.graph import build


def main() -> None:
    """Convert, or say in one line on stderr why not."""
    source, target = map(Path, sys.argv[1:])
    try:
        file = GGUF.read(source)
        ov.serialize(build(file, decoder_of(file)), target)
    except (SlipstreamError, LookupError, ValueError, RuntimeError) as error:
        sys.exit(" ".join(str(error).split()))


if __name__ == "__main__":
    main()
