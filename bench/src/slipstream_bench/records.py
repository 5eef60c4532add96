"""What a run writes down, line by line, and reads again to go on where it stopped."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from slipstream.errors import SlipstreamError

RUN_FILE = "run.jsonl"

ConstraintKind = Literal["response_format", "tools", "prescribed"]
"""How calls are asked for; `prescribed` is `response_format` with answers that are given: see `Endpoint.prescribed`."""


class Record(BaseModel):
    """A line of a run file."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Settings(Record):
    """What has to be the same for all results of a run."""

    kind: Literal["settings"] = "settings"
    model: str
    seed: int
    constraint: ConstraintKind
    turns: int | None = None
    """Of each agent at most; None for all."""
    command: str
    """That the results come from; a run may have several, one after another."""


class Machine(Record):
    """What the run was made on."""

    kind: Literal["machine"] = "machine"
    date: str
    cpu: str
    cpu_flags: list[str]
    """Those of the instructions that matrices are multiplied with."""
    cores: int
    memory_gib: float
    kernel: str
    system: str
    python: str
    load: float
    """Average of the minute before the run."""
    slipstream: str


class FloorRates(Record):
    """What the machine can do, and what a forward pass of the model asks of it."""

    kind: Literal["floor"] = "floor"
    bytes_per_second: float
    """Read from memory, by all cores together."""
    operations_per_second: float
    """Multiplications and additions in bf16, each counted."""
    layer_bytes: int
    layer_weights: int
    head_bytes: int
    head_weights: int
    kv_bytes_per_token: int
    operations_per_pair: int = 0
    """Of attention, for each token and each one that it looks back on."""


class TurnResult(Record):
    """One turn, as its client saw it."""

    agent: int
    turn: int
    tool: str
    seconds: float
    first_token_seconds: float | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    """None where a server doesn't say."""
    output_tokens: int | None = None
    valid: bool = False
    """Whether the answer is a call of the tool that fits its schema."""
    rewritten: Literal["nothing", "answer", "results"] = "nothing"
    """What the client changed of the conversation since the turn before."""
    answer: str = ""
    report: dict[str, Any] | None = None
    """The `slipstream` object."""
    error: str | None = None


class Result(Record):
    """A workload, once through, on one server."""

    kind: Literal["result"] = "result"
    workload: str
    round: int
    server: str
    """`PEER:CONFIGURATION`."""
    version: str = ""
    seconds: float = 0.0
    """From the first request to the last answer."""
    turns: list[TurnResult] = []
    error: str | None = None
    """What kept it from getting to its end."""


class ServerDescription(Record):
    """How a server was run."""

    kind: Literal["server"] = "server"
    server: str
    description: str
    notes: list[str]


AnyRecord = Annotated[Settings | Machine | FloorRates | ServerDescription | Result, Field(discriminator="kind")]
_READER: TypeAdapter[AnyRecord] = TypeAdapter(AnyRecord)


class RunFile:
    """The records of a run; each is on disk once `add` returns.

    A result takes the place of an earlier one of the same workload, round and server. What a killed run wrote of its
    last line is dropped. Raises `SlipstreamError` for a file that is no run file.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / RUN_FILE
        self.settings: Settings | None = None
        self.commands: list[str] = []
        self.machine: Machine | None = None
        self.floor: FloorRates | None = None
        self.servers: dict[str, ServerDescription] = {}
        self._results: dict[tuple[str, int, str], Result] = {}
        if self._path.exists():
            self._read()

    @property
    def results(self) -> list[Result]:
        """All of them."""
        return list(self._results.values())

    def has(self, workload: str, round_number: int, server: str) -> bool:
        """Whether there's a result that got to its end."""
        result = self._results.get((workload, round_number, server))
        return result is not None and result.error is None

    def add(self, record: AnyRecord) -> None:
        """Keep a record."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(record.model_dump_json() + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._take(record)

    def _read(self) -> None:
        content = self._path.read_bytes()
        whole, _, rest = content.rpartition(b"\n")
        if rest:
            os.truncate(self._path, len(content) - len(rest))
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                self._take(_READER.validate_json(line))
            except ValidationError as error:
                raise SlipstreamError(f"{self._path}, line {number} is not a bench's record: {error}") from error

    def _take(self, record: AnyRecord) -> None:
        match record:
            case Settings():
                self.settings = record
                if record.command not in self.commands:
                    self.commands.append(record.command)
            case Machine():
                self.machine = record
            case FloorRates():
                self.floor = record
            case ServerDescription():
                self.servers[record.server] = record
            case Result():
                self._results[record.workload, record.round, record.server] = record
