"""The rooms of the package and who may look into which."""

import ast
from pathlib import Path

import pytest

import slipstream

ROOT = Path(slipstream.__file__).parent

# A room may import from those named with it, and everybody from `COMMON`.
COMMON = {"errors", "fields", "processor", "tokens", "types"}
ALLOWED = {
    "sampling": set(),
    "backend": {"sampling"},
    "tokenizer": set(),
    "models": {"tokenizer"},
    "kv": {"backend"},
    "engine": {"kv", "tokenizer", "backend", "sampling"},
    "chat": {"tokenizer"},
    "config": {"models"},
    "sessions": {"chat", "engine", "kv", "backend"},
    "turns": {"sessions", "chat", "engine"},
    "runtime": {"turns", "sessions", "chat", "engine", "models", "tokenizer", "backend", "config"},
    "embedded": {"runtime", "turns", "sessions", "chat", "engine", "models", "config"},
    "server": {"runtime", "turns", "sessions", "chat", "engine", "tokenizer", "config"},
    "cli": {"server", "embedded", "chat", "engine", "models", "config", "backend"},
}


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module == "slipstream":
            names += [f"slipstream.{alias.name}" for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("slipstream.")}
    return rooms


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_imports_only_from_those_below_it(room: str) -> None:
    files = [path for path in ROOT.rglob("*.py") if room_of(path) == room]
    assert files, f"there is no room {room}"
    for path in files:
        strangers = imported_rooms(path) - ALLOWED[room] - {room} - COMMON
        assert not strangers, f"{path.relative_to(ROOT)} imports from {sorted(strangers)}"


def test_every_room_is_listed() -> None:
    assert {room_of(path) for path in ROOT.rglob("*.py")} == {*ALLOWED, *COMMON, "__init__", "__main__"}


def test_nothing_imports_the_bench() -> None:
    assert not [path for path in ROOT.rglob("*.py") if "slipstream_bench" in path.read_text()]


def test_blocks_are_nobodys_business_above_kv() -> None:
    """So that another backend can keep its KV in other ways."""
    for room in ("chat", "turns", "runtime", "embedded", "server", "cli"):
        for path in ROOT.rglob("*.py"):
            if room_of(path) == room:
                assert "block_table" not in path.read_text(), path
