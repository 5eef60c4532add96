"""Folders and files that only the user who runs the server can read."""

import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import IO

logger = logging.getLogger(__name__)


def private_folder(path: Path) -> Path:
    """The folder, made if it's missing, and closed to other users; raises `OSError` if it can't be made."""
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    _close_to_others(path, 0o700)
    return path


def private_file(path: Path) -> None:
    """Make a file that is missing, or close the one that is there, to other users, if that can be done."""
    with suppress(OSError):
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    if path.is_file():
        _close_to_others(path, 0o600)


def open_private(path: Path) -> IO[bytes]:
    """A new file to write, closed to other users; raises `OSError`."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb")


def _close_to_others(path: Path, mode: int) -> None:
    if path.stat().st_mode & 0o077:
        try:
            path.chmod(mode)
        except OSError as error:
            logger.warning("other users of this machine may read %s: %s", path, error)
