"""Models: names and where they come from, their import, and the store that keeps them on disk."""

from slipstream.models.catalog import CATALOG, DEFAULT_MODEL, CatalogEntry
from slipstream.models.manifest import Manifest
from slipstream.models.progress import SILENT, Progress
from slipstream.models.store import Model, ModelStore, home

__all__ = [
    "CATALOG",
    "DEFAULT_MODEL",
    "SILENT",
    "CatalogEntry",
    "Manifest",
    "Model",
    "ModelStore",
    "Progress",
    "home",
]
