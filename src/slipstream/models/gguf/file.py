"""A GGUF file: what it says of its model, and its tensors."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFReader, dequantize

from slipstream.errors import ModelError
from slipstream.models.parts import all_parts


@dataclass(frozen=True, slots=True)
class Tensor:
    """Where a tensor lies."""

    path: Path
    offset: int
    """Of its bytes in the file."""
    size: int
    """In bytes."""
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    """Its rows' length last."""

    def read(self) -> npt.NDArray[np.uint8]:
        """Its bytes. Not by a map of the file, whose pages would count as this process's memory."""
        return np.fromfile(self.path, np.uint8, self.size, offset=self.offset)


@dataclass(frozen=True, slots=True)
class GGUF:
    """Metadata with plain Python values, and the tensors by name; their bytes stay in the file until they are read."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    paths: tuple[Path, ...] = ()
    """The files that it is in."""

    @classmethod
    def read(cls, path: Path) -> "GGUF":
        """The file, and its other parts if it's the first of several.

        Raises:
            ModelError: a file is broken or missing, or it is no whole language model.
        """
        facts = path.stat()
        return _read(path, facts.st_mtime_ns, facts.st_size)

    @property
    def architecture(self) -> str:
        """The family, as GGUF names it."""
        return str(self.metadata.get("general.architecture"))

    def get(self, key: str, default: Any = None) -> Any:
        """What the metadata says under a key of the architecture."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def array(self, name: str) -> npt.NDArray[np.float32] | None:
        """A small tensor's values, float32; None if there is no such tensor."""
        tensor = self.tensors.get(name)
        return None if tensor is None else dequantize(tensor.read(), tensor.kind).reshape(tensor.shape)


def parts(path: Path, count: int) -> list[Path]:
    """The files of a model that is split in `count`, of which `path` is the first.

    Raises:
        ModelError: `path` is another part, or a part is missing.
    """
    if count <= 1:
        return [path]
    found = [path.with_name(name) for name in all_parts(path.name)]
    if found[0] != path or len(found) != count:
        first = f"…-{1:05}-of-{count:05}.gguf"
        raise ModelError(f"{path.name} is one of {count} files of a model; name the first, {first}")
    if missing := [part.name for part in found if not part.exists()]:
        raise ModelError(f"{path.name} is one of {count} files of a model; beside it lacks {', '.join(missing)}")
    return found


@lru_cache(maxsize=1)  # reading a large vocabulary takes seconds, and an import wants it more than once
def _read(path: Path, _modified: int, _size: int) -> GGUF:
    metadata, tensors = _read_file(path)
    paths = parts(path, metadata.get("split.count", 1))
    for part in paths[1:]:
        tensors |= _read_file(part)[1]
    file = GGUF(metadata, tensors, tuple(paths))
    for key in ("context_length", "embedding_length", "block_count", "attention.head_count"):
        if file.get(key) is None:
            raise ModelError(f"{path} has no {file.architecture}.{key}: it is not a whole language model")
    if "token_embd.weight" not in tensors:
        raise ModelError(f"{path} has no token embeddings: it is not a whole language model")
    return file


def _read_file(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        reader = GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except (OSError, ValueError, LookupError) as error:
        raise ModelError(f"{path} is not a readable GGUF file: {error}; fetch it again") from error
    return metadata, {
        tensor.name: Tensor(
            path,
            int(tensor.data_offset),
            int(tensor.n_bytes),
            tensor.tensor_type,
            tuple(int(length) for length in tensor.shape[::-1]),
        )
        for tensor in reader.tensors
    }
