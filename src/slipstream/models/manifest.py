"""The manifest: what the store knows about an imported model."""

import json
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from slipstream.errors import ModelError

MANIFEST_FILE = "manifest.json"
FORMAT_VERSION: Literal[4] = 4
"""Goes up when importing the same source gives other files: models of an older version are imported anew."""


class Facts(BaseModel):
    """What an artefact says about its model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: str
    context_length: int
    """The longest sequence that the model was made for, in tokens."""
    vocab_size: int
    """Width of the logits; may exceed the tokenizer's."""
    tokenizer_kind: str
    add_bos: bool
    """Whether the model wants `bos_token_id` before a plain prompt; a chat template writes its own."""
    bos_token_id: int | None
    eos_token_id: int | None
    stop_token_ids: tuple[int, ...]
    """Any of them ends a turn."""


class Manifest(Facts):
    """Facts about a model folder, kept in it as `manifest.json`."""

    format_version: Literal[4] = FORMAT_VERSION
    name: str
    source: str
    """Where it came from, for people: a package, a path or a hub repository."""
    source_state: str = ""
    """Of the local file or folder that it came from, at that time; see `LocalSource.state`."""
    sha256: str
    """Of the source artefact: the GGUF file, or the IR folder's weights, graph and tokenizer."""
    files: dict[str, int]
    """Every other file in the folder and its size in bytes."""

    def save(self, folder: Path) -> None:
        """Write it to `folder`, where nobody looks for a model yet: see `ModelStore`."""
        (folder / MANIFEST_FILE).write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read it from `folder`.

        Raises:
            ModelError: it is missing, broken or of another format version.
        """
        path = folder / MANIFEST_FILE
        try:
            return cls.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise ModelError(f"no usable manifest in {folder}: {error}") from error

    @classmethod
    def origin_of_outdated(cls, folder: Path) -> str | None:
        """Where a model came from whose files an earlier version made; None if there is none in `folder`."""
        try:
            content = json.loads((folder / MANIFEST_FILE).read_bytes())
            return str(content["source"]) if content["format_version"] < FORMAT_VERSION else None
        except (OSError, ValueError, LookupError, TypeError):
            return None
