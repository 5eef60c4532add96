"""A virtual environment of a peer's own: what it needs never meets what Slipstream needs."""

import sys
import sysconfig
import venv
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

from slipstream.models import Progress
from slipstream_bench.peers.base import PeerError
from slipstream_bench.peers.process import run_to_end

_MARK = "slipstream-setup"


@dataclass(frozen=True, slots=True)
class Environment:
    """A virtual environment in `folder`, complete once it is marked with the `recipe` that made it.

    A setup that was stopped half way leaves no mark, and one of another recipe leaves another.
    """

    folder: Path
    recipe: str

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"

    @property
    def site_packages(self) -> Path:
        """Where its packages are."""
        return Path(sysconfig.get_path("purelib", "venv", {"base": str(self.folder)}))

    @property
    def complete(self) -> bool:
        """Whether everything that the recipe says is there."""
        mark = self.folder / _MARK
        return mark.exists() and mark.read_text() == self.recipe

    def create(self) -> None:
        """An environment with pip in it, if there is none yet."""
        if not self.python.exists():
            venv.create(self.folder, with_pip=True)

    def mark_complete(self) -> None:
        """Nothing more is to be done."""
        (self.folder / _MARK).write_text(self.recipe)

    def install(self, progress: Progress, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        """`pip install` with these arguments, through the user's own index settings; raises `PeerError`."""
        self._pip(progress, f"pip install {' '.join(arguments)}", "install", *arguments, environment=environment)

    def uninstall(self, progress: Progress, *packages: str) -> None:
        """`pip uninstall`; packages that aren't there are no error; raises `PeerError`."""
        self._pip(progress, f"pip uninstall {' '.join(packages)}", "uninstall", "--yes", *packages)

    def version(self, package: str) -> str:
        """The version of an installed package; raises `PeerError` if there is none."""
        for found in distributions(name=package, path=[str(self.site_packages)]):
            return found.version
        raise PeerError(f"{self.folder} has no package {package}")

    def _pip(
        self, progress: Progress, title: str, *arguments: str, environment: Mapping[str, str] | None = None
    ) -> None:
        command = [str(self.python), "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments, "--quiet"]
        with progress.stage(title):
            run_to_end(command, f"{title} failed with Python {sys.version.split()[0]}", environment)
