"""The rooms of the package and who may look into which."""

import ast
from pathlib import Path

import pytest

import slipstream

ROOT = Path(slipstream.__file__).parent

# A room may import from those named with it, and everybody from `COMMON`.
COMMON = {"disk", "errors", "fields", "lasting", "processor", "recent", "tokens", "types"}
ALLOWED = {
    "sampling": set(),
    "backend": {"sampling"},
    "tokenizer": set(),
    "sandbox": set(),
    "models": {"tokenizer"},
    "kv": {"backend"},
    "engine": {"kv", "tokenizer", "backend", "sampling", "sandbox"},
    "chat": {"tokenizer", "sandbox"},
    "config": {"models"},
    "sessions": {"chat", "engine", "backend"},
    "turns": {"sessions", "chat", "engine"},
    "runtime": {"turns", "sessions", "chat", "engine", "models", "tokenizer", "backend", "sandbox", "config"},
    "embedded": {"runtime", "turns", "sessions", "chat", "engine", "models", "config"},
    "server": {"runtime", "turns", "sessions", "chat", "engine", "config"},
    "cli": {"server", "runtime", "embedded", "engine", "models", "config", "backend"},
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


def files_of(*rooms: str) -> list[Path]:
    return [path for path in ROOT.rglob("*.py") if room_of(path) in rooms]


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_imports_from_those_below_it_and_from_no_other(room: str) -> None:
    files = files_of(room)
    assert files, f"there is no room {room}"
    for path in files:
        strangers = imported_rooms(path) - ALLOWED[room] - {room} - COMMON
        assert not strangers, f"{path.relative_to(ROOT)} imports from {sorted(strangers)}"
    assert ALLOWED[room] <= set().union(*map(imported_rooms, files)), "nothing is allowed that nobody needs"


def test_every_room_is_listed() -> None:
    assert {room_of(path) for path in ROOT.rglob("*.py")} == {*ALLOWED, *COMMON, "__init__", "__main__"}


def test_nothing_imports_the_bench() -> None:
    assert not [path for path in ROOT.rglob("*.py") if "slipstream_bench" in path.read_text()]


def test_blocks_are_the_backend_s_business() -> None:
    """So that another backend can keep its states in other ways."""
    for path in files_of(*(set(ALLOWED) - {"backend"})):
        assert "block_table" not in path.read_text(), path
        assert "block_size" not in path.read_text() or room_of(path) == "cli", path


def test_openvino_is_named_where_it_is_chosen_and_nowhere_else_above_the_backend() -> None:
    for path in files_of("sampling", "kv", "engine", "chat", "sessions", "turns", "embedded", "server"):
        assert "import openvino" not in path.read_text(), path
        assert "backend.openvino" not in path.read_text(), path
