"""Work that agents do, deterministic from a seed."""

import json
import random
from dataclasses import dataclass
from typing import Any

SYSTEM = (
    "You are a coding agent that works in a repository. You call exactly one tool at a time and wait for its result "
    "before you go on. Read a file before you change it, keep changes small, and run the tests after each change."
)

_PATH = {"type": "string", "maxLength": 60, "description": "Path of the file"}
_LINE = {"type": "integer", "minimum": 1, "maximum": 9999}


def _tool(name: str, description: str, properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


# Every string and integer has a bound: a small model writes without end otherwise, and servers stop it differently.
TOOLS = [
    _tool(
        "read_file",
        "Read some lines of a file.",
        {"path": _PATH, "first_line": _LINE, "last_line": _LINE},
        ["path", "first_line", "last_line"],
    ),
    _tool(
        "search_code",
        "Search the repository for a text and list the lines that hold it.",
        {
            "query": {"type": "string", "maxLength": 60, "description": "The text to look for"},
            "path": _PATH,
            "case_sensitive": {"type": "boolean"},
            "max_results": {"type": "integer", "minimum": 1, "maximum": 100},
        },
        ["query", "path", "case_sensitive", "max_results"],
    ),
    _tool(
        "replace_lines",
        "Replace a range of lines in a file by new text.",
        {
            "path": _PATH,
            "first_line": _LINE,
            "last_line": _LINE,
            "text": {"type": "string", "maxLength": 80, "description": "The new text"},
        },
        ["path", "first_line", "last_line", "text"],
    ),
    _tool(
        "run_tests",
        "Run the tests of a file or folder and return the end of their output.",
        {
            "path": _PATH,
            "verbosity": {"type": "string", "enum": ["quiet", "normal", "verbose"]},
            "timeout_seconds": {"type": "integer", "minimum": 1, "maximum": 600},
        },
        ["path", "verbosity", "timeout_seconds"],
    ),
    _tool(
        "list_folder",
        "List the files in a folder, with their sizes.",
        {
            "path": _PATH,
            "recursive": {"type": "boolean"},
            "max_results": {"type": "integer", "minimum": 1, "maximum": 500},
        },
        ["path", "recursive", "max_results"],
    ),
    _tool(
        "commit",
        "Commit all changes.",
        {
            "message": {"type": "string", "maxLength": 80, "description": "What was changed and why"},
            "branch": {"type": "string", "enum": ["main", "fix", "feature"]},
        },
        ["message", "branch"],
    ),
]
NAMES = [tool["function"]["name"] for tool in TOOLS]

_FOLDERS = ("src/parser", "src/engine", "src/server", "tests/unit", "docs")
_FILES = ("tokens.py", "lexer.py", "scheduler.py", "routes.py", "cache.py", "errors.py", "config.py")
_WORDS = ("token", "cursor", "buffer", "handler", "timeout", "retry", "session", "index", "offset", "limit", "status")


@dataclass(frozen=True)
class Turn:
    """What an agent says in a turn, and the tool that it has to call."""

    message: str
    tool: str


def coding_turns(count: int, seed: int = 0) -> list[Turn]:
    """Turns of a coding agent: the result of the last call and what to do next, 80 to 130 tokens, each another tool."""
    rng = random.Random(seed)
    return [Turn(_result(rng, NAMES[number % len(NAMES)]), NAMES[number % len(NAMES)]) for number in range(count)]


def _result(rng: random.Random, tool: str) -> str:
    path = f"{rng.choice(_FOLDERS)}/{rng.choice(_FILES)}"
    line = rng.randint(1, 400)
    shown = [
        f"{line + offset}: {rng.choice(_WORDS)}_{rng.choice(_WORDS)} = {rng.choice(_WORDS)}({rng.randint(0, 99)})"
        for offset in range(rng.randint(1, 3))
    ]
    body = json.dumps({"path": path, "first_line": line, "last_line": line + len(shown) - 1})
    return "\n".join((body, *shown, f"Next: {tool} on {path}, line {line}."))
