"""Where what was found out about a model on this machine is kept: beside it, under a key of all that decides it."""

import hashlib
from pathlib import Path


def place_beside(model: Path, folder: str, version: int, *facts: object) -> Path:
    """A path in a folder beside a model file, its own for the model's weights, these facts, and what is kept there.

    A graph's weights are in a file of their own, beside it.
    """
    weights = (model.with_suffix(".bin") if model.suffix == ".xml" else model).stat()
    identity = "; ".join(map(str, (version, weights.st_size, weights.st_mtime_ns, *facts)))
    return model.parent / folder / hashlib.sha256(identity.encode()).hexdigest()[:24]
