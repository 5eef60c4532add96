"""Clients in pinned versions, each in a folder of its own, and how these versions are raised.

`python -m tests.clients.install --raise` writes the newest versions of all packages to `versions.json`.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

VERSIONS_FILE = Path(__file__).with_name("versions.json")
VERSIONS: dict[str, dict[str, dict[str, str]]] = json.loads(VERSIONS_FILE.read_text())
ROOT = Path(__file__).parents[2] / ".clients"


class NotInstalledError(Exception):
    """A client can't be installed here; says why."""


def installed(name: str) -> Path:
    """The folder of a client, which is installed if it isn't there in this version; raises `NotInstalledError`."""
    kind = next(kind for kind, clients in VERSIONS.items() if name in clients)
    packages, folder = VERSIONS[kind][name], ROOT / name
    mark = folder / ".installed"
    if mark.exists() and json.loads(mark.read_text()) == packages:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (_npm if kind == "npm" else _pip)(folder, packages)
    mark.write_text(json.dumps(packages))
    return folder


def version(name: str) -> str:
    """The version of a client's first package."""
    return next(next(iter(clients[name].values())) for clients in VERSIONS.values() if name in clients)


def _npm(folder: Path, packages: dict[str, str]) -> None:
    if shutil.which("npm") is None:
        raise NotInstalledError("npm is not installed")
    (folder / "package.json").write_text("{}")
    _run(["npm", "install", "--no-audit", "--no-fund", *(f"{name}@{pin}" for name, pin in packages.items())], folder)
    # Recent versions of npm leave these to the user: they put the program for this platform into its place.
    for script in ("@anthropic-ai/claude-code/install.cjs", "opencode-ai/postinstall.mjs"):
        path = folder / "node_modules" / script
        if path.exists():
            _run(["node", path.name], path.parent)


def _pip(folder: Path, packages: dict[str, str]) -> None:
    venv.create(folder, with_pip=False)
    uv = ROOT / "uv" / "bin" / "uv"
    if not uv.exists():  # ten times faster than pip, which counts with a dozen environments
        _run([sys.executable, "-m", "pip", "install", "--quiet", "--target", str(ROOT / "uv"), "uv"], folder)
    python = folder / "bin" / "python"
    _run([str(uv), "pip", "install", "--python", str(python), *(f"{n}=={pin}" for n, pin in packages.items())], folder)


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotInstalledError(f"{' '.join(command[:3])}: {(done.stderr or done.stdout).strip()[-300:]}")


def _newest(kind: str, package: str) -> str:
    if kind == "npm":
        command = ["npm", "view", package, "version"]
    else:
        command = [sys.executable, "-m", "pip", "index", "versions", re.sub(r"\[.*\]", "", package)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"\d+(\.\d+)+\S*", said)
    assert found is not None, said
    return found[0].rstrip(")")


def raise_versions() -> None:
    """Write the newest version of each package."""
    for kind, clients in VERSIONS.items():
        for name, packages in clients.items():
            for package, pin in packages.items():
                newest = _newest(kind, package)
                packages[package] = newest
                if newest != pin:
                    print(f"{name}: {package} {pin} -> {newest}")
    text = json.dumps(VERSIONS, indent=2)
    VERSIONS_FILE.write_text(re.sub(r"\{\n {6}([^{}]+?)\n {4}\}", _one_line, text) + "\n")


def _one_line(match: re.Match[str]) -> str:
    return "{" + re.sub(r"\n +", " ", match[1]) + "}"


if __name__ == "__main__":
    if sys.argv[1:] != ["--raise"]:
        sys.exit(__doc__)
    os.environ.setdefault("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    raise_versions()
