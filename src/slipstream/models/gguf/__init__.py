"""GGUF files as OpenVINO graphs: what a file says, what its family leaves unsaid, its weights, and their graph."""

from slipstream.models.gguf.families import FAMILIES, decoder_of
from slipstream.models.gguf.file import GGUF
from slipstream.models.gguf.quantised import remarks

__all__ = ["FAMILIES", "GGUF", "decoder_of", "remarks"]
