"""Does every call parse, and fit its schema? Over the tools of the Berkeley Function-Calling Leaderboard.

    python -m slipstream_bench.measurements.tool_validity

Every case is asked with `tool_choice` "required", and every function of the simulated APIs by its name, at temperatures
0 and 1. `jsonschema`, which shares no code with the grammar, is the judge. Calls that were cut off by `max_tokens` are
listed too. It takes an hour on two cores; with `--verdicts FILE`, a run that was stopped goes on from where it was.
"""

import argparse
import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from slipstream.chat import Tool
from slipstream.models import DEFAULT_MODEL
from slipstream_bench import bfcl
from slipstream_bench.peers.base import Endpoint
from slipstream_bench.peers.slipstream import serving

NEIGHBOURS = 8


def cases() -> Iterator[tuple[str, bfcl.Case, Any]]:
    """Category, case, and `tool_choice`."""
    for category in bfcl.SINGLE_TURN:
        for case in bfcl.cases(category):
            yield category, case, "required"
    for tool in bfcl.api_tools():
        question = [{"role": "user", "content": f"Use {tool.name}. {tool.description}"}]
        choice = {"type": "function", "function": {"name": tool.name}}
        yield "multi-turn functions", bfcl.Case(tool.name, question, [tool]), choice


async def verdict(http: httpx.AsyncClient, case: bfcl.Case, choice: Any, temperature: float, max_tokens: int) -> str:
    """ "valid", or what is wrong."""
    body = {
        "model": DEFAULT_MODEL,
        "messages": case.messages,
        "tools": [tool.as_dict() for tool in case.tools],
        "tool_choice": choice,
        "temperature": temperature,
        "seed": 1,
        "max_tokens": max_tokens,
    }
    response = await http.post("chat/completions", json=body)
    if response.is_error:
        return f"refused: {response.json()['error']['message']}"
    (answer,) = response.json()["choices"]
    calls = answer["message"].get("tool_calls")
    if not calls:
        return "no call"
    tools = {tool.name: tool for tool in case.tools}
    for call in calls:
        assert call["type"] == "function"
        if problem := _problem(call["function"]["name"], call["function"]["arguments"], tools):
            return f"cut off by max_tokens: {problem}" if answer["finish_reason"] == "length" else problem
    return "valid"


def _problem(name: str, arguments: str, tools: dict[str, Tool]) -> str | None:
    if name not in tools:
        return f"there is no tool {name!r}"
    try:
        jsonschema.validate(json.loads(arguments), dict(tools[name].parameters))
    except ValueError:
        return f"not JSON: {arguments[:60]!r}…"
    except jsonschema.ValidationError as error:
        return f"does not fit: {error.message[:80]}"
    return None


class Verdicts:
    """What became of each case at each temperature; kept in a file, a line each, if one is given."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path and path.exists() else []
        self.outcomes: dict[tuple[str, str, float], str] = {
            (line["category"], line["case"], line["temperature"]): line["outcome"] for line in map(json.loads, lines)
        }

    def add(self, category: str, case: str, temperature: float, outcome: str) -> None:
        """Note a verdict."""
        self.outcomes[category, case, temperature] = outcome
        if self._path:
            line = {"category": category, "case": case, "temperature": temperature, "outcome": outcome}
            with self._path.open("a") as file:
                print(json.dumps(line), file=file)


async def run(endpoint: Endpoint, options: argparse.Namespace, console: Console) -> bool:
    chosen = [case for case in cases() if not options.only or case[1].id in options.only][:: options.every]
    work = [(*case, temperature) for case in chosen for temperature in options.temperatures]
    asked = {(category, case.id, temperature) for category, case, _, temperature in work}
    verdicts = Verdicts(options.verdicts)
    work = [item for item in work if (item[0], item[1].id, item[3]) not in verdicts.outcomes]
    turns = asyncio.Semaphore(NEIGHBOURS)

    async with httpx.AsyncClient(base_url=endpoint.base_url, timeout=None) as http:
        with Progress(console=console) as bars:
            task = bars.add_task("Asking", total=len(work))

            async def one(category: str, case: bfcl.Case, choice: Any, temperature: float) -> None:
                async with turns:
                    outcome = await verdict(http, case, choice, temperature, options.max_tokens)
                verdicts.add(category, case.id, temperature, outcome)
                bars.advance(task)

            await asyncio.gather(*(one(*item) for item in work))
    outcomes = {key: outcome for key, outcome in verdicts.outcomes.items() if key in asked}
    results = Counter(
        (category, temperature, outcome == "valid") for (category, _, temperature), outcome in outcomes.items()
    )
    failures = {key: outcome for key, outcome in outcomes.items() if outcome != "valid"}
    table = Table("category", "temperature", "cases", "valid")
    for category, temperature in sorted({key[:2] for key in results}):
        valid, invalid = (results[category, temperature, outcome] for outcome in (True, False))
        table.add_row(category, str(temperature), str(valid + invalid), f"{valid / (valid + invalid):.1%}")
    console.print(table)
    for (_, case, temperature), outcome in failures.items():
        console.print(f"{case} at temperature {temperature}: {outcome}", highlight=False, markup=False)
    return not failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="take one case of so many")
    parser.add_argument("--only", nargs="+", help="take these cases alone, by their ids")
    parser.add_argument(
        "--verdicts", type=Path, metavar="FILE", help="keep verdicts here; what is there isn't asked again"
    )
    parser.add_argument("--max-tokens", type=int, default=1024)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    options = parser.parse_args()
    with serving(DEFAULT_MODEL, "--kv-memory", "512MiB", log="tool_validity") as endpoint:
        raise SystemExit(not asyncio.run(run(endpoint, options, Console(width=120))))


if __name__ == "__main__":
    main()
