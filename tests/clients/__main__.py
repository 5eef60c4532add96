"""`python -m tests.clients [CLIENT...]`: run clients against the scripted model, and print what came of it as a table.

Ends with status 1 if a client did something else than it should have. One that can't be run here is printed with its
reason.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.clients.bench import Bench, WrongError
from tests.clients.clients import CLIENTS, runs
from tests.clients.install import NotInstalledError, installed, version

ROW = "| {:<14} | {:<8} | {:<10} | {:>5} | {:<28} | {:<44} | {:<40} |"


@contextmanager
def serving(steps: dict[str, list[object]], folder: Path) -> Iterator[tuple[str, Path]]:
    """A server whose model follows these steps: its URL, and where it writes down what it is asked."""
    runs_file, records = folder / "runs.json", folder / "records.jsonl"
    runs_file.write_text(json.dumps(steps))
    command = [sys.executable, "-m", "tests.clients.serve", runs_file, records, "scripted"]
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if match := re.search(r"on (http://\S+)", line):
                yield match[1], records
                return
        raise RuntimeError(f"the server did not start: {(folder / 'server.log').read_text()[-800:]}")
    finally:
        process.terminate()
        process.wait()


def run(name: str, folder: Path) -> bool:
    """Run a client and print its rows; whether all went as it should."""
    work = folder / name
    try:
        programs = installed(name)
    except NotInstalledError as error:
        print(ROW.format(name, version(name), "not run", "", "", "", str(error)[:200]), flush=True)
        return True
    folder.joinpath(f"{name}-server").mkdir()
    problem = None
    with serving(runs(name, work), folder / f"{name}-server") as (url, records):  # type: ignore[arg-type]
        bench = Bench(programs, work, url, records)
        try:
            CLIENTS[name](bench)
        except (WrongError, subprocess.TimeoutExpired) as error:
            problem = str(error)
    for phase in bench.phases:
        shares = " ".join(f"{share:.0%}" for share in phase.reuse)
        texts = (" ".join(text.split())[:44] for text in (phase.asked, phase.answered))
        print(ROW.format(name, version(name), phase.name, len(phase.turns), shares, *texts), flush=True)
    if problem is not None:
        print(f"  {name}: {problem}", flush=True)
    return problem is None


def main(names: list[str]) -> int:
    """Run the named clients, or all."""
    unknown = [name for name in names if name not in CLIENTS]
    if unknown:
        print(f"there is no client {unknown[0]!r}: {', '.join(CLIENTS)}")
        return 2
    print(ROW.format("client", "version", "phase", "turns", "reuse by turn", "asked", "answered"))
    print(re.sub(r"[^|]", "-", ROW.format(*[""] * 7)), flush=True)
    # Not in the repository: agents look for one around them, and write into it.
    with tempfile.TemporaryDirectory(prefix="slipstream-clients-") as folder:
        went_well = [run(name, Path(folder)) for name in names or CLIENTS]
    return 0 if all(went_well) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
