"""API keys: who may use the server, and as which tenant. Only digests of keys are kept."""

import hashlib
import logging
import os
import re
import secrets
import threading
import time
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from slipstream.errors import SlipstreamError

logger = logging.getLogger(__name__)

DEFAULT_TENANT = ""
"""The tenant of whoever needs no key, and of `--api-key`."""

_PREFIX = "sk-slipstream-"
_TENANT = re.compile(r"[A-Za-z0-9._-]{1,64}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_RELOAD_SECONDS = 1.0
"""How often a file of keys is looked at, while requests come in."""


@dataclass(frozen=True, slots=True)
class Quota:
    """How many requests may be under way at the same time: with one key, or with all keys of a tenant."""

    holder: Literal["key", "tenant"]
    id: bytes
    """What is counted together."""
    max_requests: int


@dataclass(frozen=True, slots=True)
class Client:
    """Who sent a request. Tenants share nothing; an `operator` may also see what is about all of them."""

    tenant: str = DEFAULT_TENANT
    operator: bool = True
    weight: float = 1.0
    """The tenant's share of the machine, in proportion to the others'."""
    quotas: tuple[Quota, ...] = ()


class KeyFileError(SlipstreamError):
    """A file of API keys can't be read; the message says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class _Keys:
    """A file's keys by their digests, as of when it was written."""

    clients: Mapping[bytes, Client] = field(default_factory=dict)
    stamp: tuple[int, ...] = ()


class KeyRing:
    """The keys that let clients in: one of the command line, and those of a file. Thread-safe.

    The file is read again when it changes. If it can't be read then, the keys of before stay, and the log says so.
    Raises `KeyFileError` if it can't be read at the start.
    """

    def __init__(self, api_key: str | None = None, file: Path | None = None) -> None:
        self._own = {_digest(api_key.encode()): Client()} if api_key is not None else {}
        self._file = file
        self._lock = threading.Lock()
        self._looked = time.monotonic()
        self._keys = _read(file) if file is not None else _Keys()

    @property
    def open(self) -> bool:
        """Whether everybody is let in."""
        return not self._own and self._file is None

    def client(self, offered: Iterable[bytes]) -> Client | None:
        """Whose key one of these is, if any.

        Keys are found by their digests. How long that takes tells nothing about them: nobody can choose a digest.
        """
        if self.open:
            return Client()
        self._refresh()
        known = self._keys.clients
        digests = [_digest(key) for key in offered]
        return next((found for each in digests if (found := self._own.get(each) or known.get(each))), None)

    def _refresh(self) -> None:
        now = time.monotonic()
        if self._file is None or now - self._looked < _RELOAD_SECONDS or not self._lock.acquire(blocking=False):
            return
        try:
            self._looked = now
            if _stamp(self._file) != self._keys.stamp:
                self._keys = _read(self._file)
                logger.info("%s has changed: it has %d API keys now", self._file, len(self._keys.clients))
        except (KeyFileError, OSError) as error:
            logger.warning("the API keys of before stay in use: %s", error)
        finally:
            self._lock.release()


def add_key(file: Path, tenant: str, *, name: str = "", operator: bool = False) -> str:
    """A new key for a tenant, whose digest is added to a file, which is made if it's missing; returns the key.

    Raises `KeyFileError` if the file has something else in it, or the tenant can't be a tenant's name.
    """
    if not _TENANT.fullmatch(tenant):
        raise KeyFileError(f"{tenant!r} can't name a tenant: use 1 to 64 letters, digits, dots, dashes or underscores")
    if file.exists():
        _read(file)
    key = _PREFIX + secrets.token_urlsafe(32)
    lines = ["[[keys]]", f'tenant = "{tenant}"', f'sha256 = "{_digest(key.encode()).hex()}"']
    if label := re.sub(r'["\\\x00-\x1f\x7f]', "", name):
        lines.append(f'name = "{label}"')
    if operator:
        lines.append("operator = true")
    try:
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "a") as end:
            end.write("\n".join(["", *lines, ""]))
    except OSError as error:
        raise KeyFileError(f"{file} can't be written: {error.strerror}") from error
    return key


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _stamp(file: Path) -> tuple[int, ...]:
    status = file.stat()
    return status.st_mtime_ns, status.st_size, status.st_ino


def _read(file: Path) -> _Keys:
    try:
        stamp = _stamp(file)
        told = tomllib.loads(file.read_text())
    except (OSError, ValueError) as error:  # of which bad TOML and bad UTF-8 are kinds
        raise KeyFileError(f"{file} can't be read as a file of API keys: {error}") from error
    keys, tables = told.get("keys", []), told.get("tenants", {})
    if not isinstance(tables, dict):
        raise KeyFileError(f"{file}: tenants must be tables: [tenants.NAME]")
    tenants = {tenant: _tenant(file, tenant, table) for tenant, table in tables.items()}
    if not isinstance(keys, list) or set(told) - {"keys", "tenants"}:
        raise KeyFileError(f"{file} may have [[keys]] and [tenants.NAME] alone")
    clients: dict[bytes, Client] = {}
    for number, key in enumerate(keys, 1):
        digest, client = _key(f"{file}: key {number}", key, tenants)
        clients[digest] = client
    return _Keys(clients, stamp)


def _key(place: str, key: object, tenants: Mapping[str, Client]) -> tuple[bytes, Client]:
    """The digest of a key, and whoever has it, by what the file says of the tenants."""
    if not isinstance(key, dict) or set(key) - {"tenant", "sha256", "name", "operator", "max_requests"}:
        raise KeyFileError(f"{place} may have tenant, sha256, name, operator and max_requests alone")
    name, digest, operator = key.get("tenant"), key.get("sha256"), key.get("operator", False)
    if not isinstance(name, str) or not _TENANT.fullmatch(name):
        raise KeyFileError(f"{place} needs a tenant: 1 to 64 letters, digits, dots, dashes or underscores")
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise KeyFileError(f"{place} needs the key's sha256 in 64 hexadecimal digits: see `slipstream make-key`")
    if not isinstance(operator, bool):
        raise KeyFileError(f"{place}: operator must be true or false")
    tenant = tenants.get(name, Client(name))
    quotas = (*tenant.quotas, *_quota(place, "key", bytes.fromhex(digest), key))
    return bytes.fromhex(digest), replace(tenant, operator=operator, quotas=quotas)


def _tenant(file: Path, name: str, table: object) -> Client:
    """What a table says of a tenant, as of one of its clients."""
    place = f"{file}: tenants.{name}"
    if not isinstance(table, dict) or set(table) - {"weight", "max_requests"}:
        raise KeyFileError(f"{place} may have weight and max_requests alone")
    weight = table.get("weight", 1.0)
    if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0.001 <= weight <= 1000:
        raise KeyFileError(f"{place}.weight must be a number from 0.001 to 1000")
    return Client(name, weight=float(weight), quotas=_quota(place, "tenant", name.encode(), table))


def _quota(place: str, holder: Literal["key", "tenant"], id: bytes, table: Mapping[str, Any]) -> tuple[Quota, ...]:
    if "max_requests" not in table:
        return ()
    most = table["max_requests"]
    if not isinstance(most, int) or isinstance(most, bool) or most < 1:
        raise KeyFileError(f"{place}: max_requests must be a whole number, at least 1")
    return (Quota(holder, id, most),)
