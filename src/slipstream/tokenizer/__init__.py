"""Tokenizer: text to token ids and back, whole or as a stream, for byte-level and SentencePiece vocabularies."""

from slipstream.tokenizer.from_gguf import build_tokenizer
from slipstream.tokenizer.incremental import IncrementalDecoder
from slipstream.tokenizer.tokenizer import Tokenizer

__all__ = ["IncrementalDecoder", "Tokenizer", "build_tokenizer"]
