"""A client at work: its folder, its commands, and what the server wrote down of each phase."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.waiting import wait_until

ENOUGH = 0.92
"""Of the prompt of each later turn of a phase, this share is reused at least."""
BEGUN = '"begun"'
"""The line that stands for the beginning of a request."""
_HANG_SECONDS = 600


class WrongError(Exception):
    """A client did something else than it should have."""


@dataclass
class Phase:
    """A part of a client's work, such as a run of it, and the requests that were made meanwhile."""

    name: str
    asked: str
    answered: str = ""
    records: list[dict[str, Any]] = field(default_factory=list)
    compacts: bool = False
    """Whether the client replaces its history meanwhile, so that turns are no continuations."""

    @property
    def turns(self) -> list[dict[str, Any]]:
        """The answered requests, without those for a title: these have no tools, where others have some.

        Codex compacts without tools, too.
        """
        answered = [record for record in self.records if "prompt_tokens" in record]
        return answered if self.compacts else [turn for turn in answered if turn["tools"]] or answered

    @property
    def reuse(self) -> list[float]:
        """The share of each turn's prompt that was reused."""
        return [turn["reused_tokens"] / turn["prompt_tokens"] for turn in self.turns]

    def check(self) -> None:
        """Raise `WrongError` for refused requests, and for later turns that computed much again."""
        refused = [
            f"{r['method']} {r['path']} {r['status']} {r.get('error', '')}" for r in self.records if r["status"] >= 400
        ]
        expected = [each for each in refused if "/v1/models" not in each and "/api/" not in each]
        if expected:
            raise WrongError(f"{self.name}: {expected[0]}")
        if not self.turns:
            raise WrongError(f"{self.name}: no turn reached the server")
        if not self.compacts and any(share < ENOUGH for share in self.reuse[1:]):
            shares = ", ".join(f"{share:.0%}" for share in self.reuse)
            raise WrongError(f"{self.name}: a later turn reused too little: {shares}")


class Bench:
    """What a client works with. `folder` holds its programs, `work` its files; `home` is its user's."""

    def __init__(self, folder: Path, work: Path, url: str, records: Path) -> None:
        self.folder = folder
        self.work = work
        self.home = work.parent / f"{work.name}-home"
        self.url = url
        self.phases: list[Phase] = []
        self._records = records
        self.work.mkdir(parents=True)
        self.home.mkdir(parents=True)

    @contextmanager
    def phase(self, name: str, asked: str, *, compacts: bool = False) -> Iterator[Phase]:
        """A part of the work, whose requests are checked at its end."""
        before = len(self._ended())
        phase = Phase(name, asked, compacts=compacts)
        self.phases.append(phase)
        try:
            yield phase
        finally:
            phase.records = self._ended()[before:]
        phase.check()

    def command(self, *arguments: str | Path, environment: Mapping[str, str]) -> str:
        """What a command prints to standard output; raises `WrongError` if it fails."""
        own = {"HOME": str(self.home), "NO_COLOR": "1", "CI": "1", "PATH": os.environ["PATH"], "TERM": "dumb"}
        done = subprocess.run(
            [str(each) for each in arguments],
            cwd=self.work,
            env={**own, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=_HANG_SECONDS,
        )
        if done.returncode:
            told = (done.stderr or done.stdout).strip()[-600:]
            raise WrongError(f"{Path(arguments[0]).name} ended with status {done.returncode}: {told}")
        return done.stdout

    def ask(self, phase: Phase, run: Callable[[], str], *, says: str) -> None:
        """Run a client, and see that it ends with the answer that the script has."""
        said = run()
        if says not in said:
            raise WrongError(f"{phase.name}: {says!r} is not what it said: {said.strip()[-300:]!r}")
        phase.answered = says

    def require(self, condition: bool, complaint: str) -> None:
        """Raise `WrongError` unless a condition holds."""
        if not condition:
            raise WrongError(complaint)

    def _ended(self) -> list[dict[str, Any]]:
        """What the server wrote down of requests, once none is under way: a client ends before the server has."""
        records: list[dict[str, Any]] = []

        def all_ended() -> bool:
            lines = self._records.read_text().splitlines() if self._records.exists() else []
            records[:] = [json.loads(line) for line in lines if line != BEGUN]
            return 2 * len(records) == len(lines)

        wait_until(all_ended)
        return records
