"""A coding agent: its tools, made-up results of them, and the calls that a sensible model would make."""

import json
import random
import re
from typing import Any

from slipstream_bench.script import Script, ScriptedTurn, ToolDefinition, tool_definition

SYSTEM = (
    "You are a coding agent that works in a repository. You call exactly one tool at a time and wait for its result "
    "before you go on. Read a file before you change it, keep changes small, and run the tests after each change."
)

_PATH = {"type": "string", "maxLength": 60, "description": "Path of the file"}
_LINE = {"type": "integer", "minimum": 1, "maximum": 9999}


def _tool(name: str, description: str, properties: dict[str, Any]) -> ToolDefinition:
    parameters = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return tool_definition(name, description, parameters)


# Every string and integer has a bound: a small model writes without end otherwise, and servers stop it differently.
TOOLS = (
    _tool("read_file", "Read some lines of a file.", {"path": _PATH, "first_line": _LINE, "last_line": _LINE}),
    _tool(
        "search_code",
        "Search the repository for a text and list the lines that hold it.",
        {
            "query": {"type": "string", "maxLength": 60, "description": "The text to look for"},
            "path": _PATH,
            "case_sensitive": {"type": "boolean"},
            "max_results": {"type": "integer", "minimum": 1, "maximum": 100},
        },
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
    ),
    _tool(
        "run_tests",
        "Run the tests of a file or folder and return the end of their output.",
        {
            "path": _PATH,
            "verbosity": {"type": "string", "enum": ["quiet", "normal", "verbose"]},
            "timeout_seconds": {"type": "integer", "minimum": 1, "maximum": 600},
        },
    ),
    _tool(
        "list_folder",
        "List the files in a folder, with their sizes.",
        {
            "path": _PATH,
            "recursive": {"type": "boolean"},
            "max_results": {"type": "integer", "minimum": 1, "maximum": 500},
        },
    ),
    _tool(
        "commit",
        "Commit all changes.",
        {
            "message": {"type": "string", "maxLength": 80, "description": "What was changed and why"},
            "branch": {"type": "string", "enum": ["main", "fix", "feature"]},
        },
    ),
)

_FOLDERS = ("src/parser", "src/engine", "src/server", "tests/unit", "docs")
_FILES = ("tokens.py", "lexer.py", "scheduler.py", "routes.py", "cache.py", "errors.py", "config.py")
_WORDS = ("token", "cursor", "buffer", "handler", "timeout", "retry", "session", "index", "offset", "limit", "status")
_RULES = (
    "Never touch {path} without reading the {word} code first.",
    "A {word} that fails is retried {number} times, then reported to the {other}.",
    "The {word} of {path} is kept below {number}; raise it in the configuration alone.",
    "Names that begin with {word}_ belong to {path}, names that begin with {other}_ do not.",
)


def coding_script(
    rng: random.Random, turns: int, *, lines: tuple[int, int] = (1, 3), tools: int = len(TOOLS), head: str = ""
) -> Script:
    """A conversation of so many turns, each with another of the first `tools` tools.

    Each result shows at least and at most so many `lines` of code. `head` opens the system message; by default it's
    a word that no other conversation has, so that nothing is shared with any.
    """
    offered = TOOLS[:tools]
    names = [tool["function"]["name"] for tool in offered]
    order = [names[number % len(names)] for number in range(turns)]
    task = ScriptedTurn(order[0], user=f"Fix the failing test of {_path(rng)}. Begin with {order[0]}.")
    later = [ScriptedTurn(tool, result=_result(rng, tool, lines)) for tool in order[1:]]
    return Script(f"{head or unique_head(rng)} {SYSTEM}", offered, (task, *later))


_NEXT = re.compile(r"Begin with (?P<first>\w+)\.|Next: (?P<tool>\w+) on (?P<path>\S+), line (?P<line>\d+)\.")
_TASK = re.compile(r"Fix the failing test of (\S+)\. Begin with")


def sensible_call(text: str) -> tuple[str, dict[str, Any]] | None:
    """The tool that the end of a conversation asks for, and arguments for it: a pure function of the text.

    They repeat what a model would repeat: paths and lines from the latest result. None if nothing is asked for.
    """
    asked = list(_NEXT.finditer(text))
    if not asked:
        return None
    last = asked[-1]
    tool = last["tool"] or last["first"]
    path = last["path"] or _TASK.findall(text)[-1]
    line = int(last["line"] or 1)
    rng = random.Random(f"{tool} {path} {line}")
    words = rng.sample(_WORDS, 3)
    calls: dict[str, dict[str, Any]] = {
        "read_file": {"path": path, "first_line": line, "last_line": line + rng.choice((20, 40, 80))},
        "search_code": {
            "query": f"{words[0]}_{words[1]}",
            "path": path.rpartition("/")[0],
            "case_sensitive": rng.random() < 0.5,
            "max_results": rng.choice((10, 20, 50)),
        },
        "replace_lines": {
            "path": path,
            "first_line": line,
            "last_line": line + rng.randint(0, 3),
            "text": f"{words[0]}_{words[1]} = {words[2]}({rng.randint(0, 99)})",
        },
        "run_tests": {"path": path, "verbosity": rng.choice(("quiet", "normal")), "timeout_seconds": 60},
        "list_folder": {"path": path.rpartition("/")[0], "recursive": rng.random() < 0.5, "max_results": 100},
        "commit": {"message": f"Fix the {words[0]} of the {words[1]} when {words[2]} is empty", "branch": "fix"},
    }
    return tool, calls[tool]


def unique_head(rng: random.Random) -> str:
    """An opening that shares no prefix with others worth a word."""
    return f"{rng.getrandbits(32):08x} is the id of this task."


def long_head(rng: random.Random, rules: int) -> str:
    """An opening with the rules of a house, about 25 tokens each."""
    return " ".join([unique_head(rng), *(_rule(rng) for _ in range(rules))])


def _rule(rng: random.Random) -> str:
    return rng.choice(_RULES).format(
        path=_path(rng), word=rng.choice(_WORDS), other=rng.choice(_WORDS), number=rng.randint(2, 99)
    )


def _path(rng: random.Random) -> str:
    return f"{rng.choice(_FOLDERS)}/{rng.choice(_FILES)}"


def _result(rng: random.Random, next_tool: str, lines: tuple[int, int]) -> str:
    path, line = _path(rng), rng.randint(1, 400)
    shown = [
        f"{line + offset}: {rng.choice(_WORDS)}_{rng.choice(_WORDS)} = {rng.choice(_WORDS)}({rng.randint(0, 99)})"
        for offset in range(rng.randint(*lines))
    ]
    body = json.dumps({"path": path, "first_line": line, "last_line": line + len(shown) - 1})
    return "\n".join((body, *shown, f"Next: {next_tool} on {path}, line {line}."))
