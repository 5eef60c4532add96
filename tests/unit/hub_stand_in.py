"""A model hub on this machine: what its client asks to list a repository and to fetch files."""

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler
from pathlib import Path

from tests.unit.local_server import LocalServer, serving

_COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(LocalServer):
    """Repositories by name, each with its files by their names in it; `fetched` are the files sent, in order."""

    def __init__(self, repositories: Mapping[str, Mapping[str, Path]]) -> None:
        super().__init__(_Handler)
        self.repositories = repositories
        self.fetched: list[str] = []


def hub(repositories: Mapping[str, Mapping[str, Path]]) -> AbstractContextManager[Hub]:
    return serving(Hub(repositories))


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        for name, files in self.server.repositories.items():
            if path == f"/api/models/{name}":
                listing = [{"rfilename": file} for file in files]
                return self._send(json.dumps({"id": name, "sha": _COMMIT, "siblings": listing}).encode(), with_body)
            if path.startswith(f"/api/models/{name}/tree/"):
                tree = [
                    {"type": "file", "path": file, "size": local.stat().st_size, "oid": "0"}
                    for file, local in files.items()
                ]
                return self._send(json.dumps(tree).encode(), with_body)
            for file, local in files.items():
                if path in (f"/{name}/resolve/{revision}/{file}" for revision in ("main", _COMMIT)):
                    if with_body:
                        self.server.fetched.append(file)
                    return self._send(local.read_bytes(), with_body)
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()
        return None

    def _send(self, body: bytes, with_body: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", _COMMIT)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""
