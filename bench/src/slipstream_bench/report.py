"""What a run's results come to: medians, spread, ratios pair by pair, and the distance to the floor."""

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

from slipstream_bench import floor
from slipstream_bench.records import FloorRates, Machine, Result, RunFile, ServerDescription, Settings, TurnResult
from slipstream_bench.workloads import WORKLOADS, Workload

REFERENCE = "slipstream:default"
"""The server that the others are compared with."""
FLOOR = "floor"
"""In place of a server's name."""
USUAL_LATER = "turns 2 to n of each agent"
"""Which turns count as later ones in most workloads."""


class Entry(BaseModel):
    """A part of a summary."""

    model_config = ConfigDict(frozen=True)


class Spread(Entry):
    """One value a round: their median and range."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float | None]) -> "Spread | None":
        """Of those that are known; None if none is."""
        known = [value for value in values if value is not None]
        return cls(median=statistics.median(known), least=min(known), most=max(known)) if known else None


class Point(Entry):
    """A turn of a workload: medians over rounds, and over agents where several take the same turn."""

    turn: int
    milliseconds: float
    prompt_tokens: float | None
    recomputed_tokens: float | None
    parts: dict[str, float] | None
    """Milliseconds by what they were spent on, where the server tells."""
    passes_per_token: float | None


class ServerSummary(Entry):
    """One server on one workload. Times in milliseconds; `later` is of the workload's later turns."""

    server: str
    version: str
    rounds: int
    errors: list[str]
    later: Spread | None
    ratio: Spread | None
    """Of later turns to the reference's in the same round."""
    seconds: Spread | None
    """For the whole workload."""
    seconds_ratio: Spread | None
    first_turn: Spread | None
    first_token: Spread | None
    """Of later turns."""
    output_tokens: float | None
    """A later turn, in the median."""
    per_output_token: Spread | None
    """Time of all later turns by their output tokens."""
    valid: int
    turns: int
    recomputed_tokens: float | None
    """Prompt minus cached tokens of a later turn, in the median."""
    beyond_delta: int | None
    """The most that a later turn recomputed beyond what was new to it."""
    passes_per_token: float | None
    points: list[Point]


class FloorSummary(Entry):
    """The least that the reference's later turns could take."""

    later: Spread
    ratio: Spread
    """Of the reference's later turns to it."""


class WorkloadSummary(Entry):
    """All servers on one workload."""

    name: str
    description: str
    later: str
    servers: list[ServerSummary]
    floor: FloorSummary | None

    @property
    def growth(self) -> float:
        """How many times longer the longest prompt is than the shortest."""
        lengths = [point.prompt_tokens for server in self.servers for point in server.points if point.prompt_tokens]
        return max(lengths) / min(lengths) if lengths else 1.0


class Summary(Entry):
    """All that a report shows."""

    settings: Settings | None
    commands: list[str]
    machine: Machine | None
    floor: FloorRates | None
    servers: list[ServerDescription]
    workloads: list[WorkloadSummary]


def summary(file: RunFile) -> Summary:
    """Of all results in the file."""
    by_workload: dict[str, list[Result]] = defaultdict(list)
    for result in file.results:
        by_workload[result.workload].append(result)
    return Summary(
        settings=file.settings,
        commands=file.commands,
        machine=file.machine,
        floor=file.floor,
        servers=list(file.servers.values()),
        workloads=[
            _workload_summary(workload, by_workload[name], list(file.servers), file.floor)
            for name, workload in WORKLOADS.items()
            if name in by_workload
        ],
    )


@dataclass(frozen=True, slots=True)
class _Sample:
    """A turn, and what of its prompt was new: None where that can't be told."""

    turn: TurnResult
    delta: int | None

    @property
    def recomputed(self) -> int | None:
        if self.turn.prompt_tokens is None or self.turn.cached_tokens is None:
            return None
        return self.turn.prompt_tokens - self.turn.cached_tokens

    @property
    def beyond_delta(self) -> int | None:
        if self.recomputed is None or self.delta is None:
            return None
        return max(0, self.recomputed - self.delta)


def _workload_summary(
    workload: Workload, results: Sequence[Result], order: Sequence[str], rates: FloorRates | None
) -> WorkloadSummary:
    by_server: dict[str, dict[int, Result]] = {server: {} for server in order}
    for result in sorted(results, key=lambda result: result.round):
        by_server.setdefault(result.server, {})[result.round] = result
    reference = _whole(by_server.get(REFERENCE, {}))
    return WorkloadSummary(
        name=workload.name,
        description=workload.description,
        later=USUAL_LATER if workload.later == "turns" else "all of agents 2 to n",
        servers=[_server_summary(workload, name, of, reference) for name, of in by_server.items() if of],
        floor=_floor_summary(workload, reference, rates),
    )


def _whole(rounds: dict[int, Result]) -> dict[int, Result]:
    return {number: result for number, result in rounds.items() if result.error is None}


def _server_summary(
    workload: Workload, name: str, results: dict[int, Result], reference: dict[int, Result]
) -> ServerSummary:
    whole = _whole(results)
    samples = {number: list(_samples(result)) for number, result in whole.items()}
    later = {number: [s for s in each if _is_later(workload, s)] for number, each in samples.items()}
    every_later = [sample for each in later.values() for sample in each]
    every = [sample.turn for each in samples.values() for sample in each]
    common = [number for number in whole if number in reference and name != REFERENCE]
    return ServerSummary(
        server=name,
        version=next(iter(results.values())).version,
        rounds=len(whole),
        errors=sorted({result.error for result in results.values() if result.error}),
        later=Spread.of(_later_ms(workload, result) for result in whole.values()),
        ratio=Spread.of(_later_ms(workload, whole[n]) / _later_ms(workload, reference[n]) for n in common),
        seconds=Spread.of(result.seconds for result in whole.values()),
        seconds_ratio=Spread.of(whole[n].seconds / reference[n].seconds for n in common),
        first_turn=Spread.of(
            _median(s.turn.seconds * 1e3 for s in each if s.turn.turn == 0) for each in samples.values()
        ),
        first_token=Spread.of(_median(_ms(s.turn.first_token_seconds) for s in each) for each in later.values()),
        output_tokens=_median(s.turn.output_tokens for s in every_later),
        per_output_token=Spread.of(_per_output_token(each) for each in later.values()),
        valid=sum(turn.valid for turn in every),
        turns=len(every),
        recomputed_tokens=_median(s.recomputed for s in every_later),
        beyond_delta=max((b for s in every_later if (b := s.beyond_delta) is not None), default=None),
        passes_per_token=_passes_per_token([s.turn for s in every_later]),
        points=list(_points(workload, [s for each in samples.values() for s in each])),
    )


def _samples(result: Result) -> Iterator[_Sample]:
    before: dict[int, TurnResult] = {}
    for turn in result.turns:
        yield _Sample(turn, _delta(turn, before.get(turn.agent)))
        before[turn.agent] = turn


def _delta(turn: TurnResult, before: TurnResult | None) -> int | None:
    """Prompt tokens that came after the last answer; from that answer on, if the client wrote it anew."""
    if before is None or turn.prompt_tokens is None or before.prompt_tokens is None or turn.rewritten == "results":
        return None
    kept = before.output_tokens if turn.rewritten == "nothing" else 0
    return None if kept is None else turn.prompt_tokens - before.prompt_tokens - kept


def _is_later(workload: Workload, sample: _Sample) -> bool:
    return workload.is_later(sample.turn.agent, sample.turn.turn)


def _later_ms(workload: Workload, result: Result) -> float:
    return statistics.median(t.seconds * 1e3 for t in result.turns if workload.is_later(t.agent, t.turn))


def _per_output_token(samples: Sequence[_Sample]) -> float | None:
    tokens = sum(sample.turn.output_tokens or 0 for sample in samples)
    return sum(sample.turn.seconds for sample in samples) * 1e3 / tokens if tokens else None


def _passes_per_token(turns: Iterable[TurnResult]) -> float | None:
    reports = [turn.report for turn in turns if turn.report]
    tokens = sum(report["completion_tokens"] for report in reports)
    return sum(report["forward_passes"] for report in reports) / tokens if tokens else None


def _floor_summary(workload: Workload, reference: dict[int, Result], rates: FloorRates | None) -> FloorSummary | None:
    if rates is None or workload.response_cache or workload.order == "all at once":
        return None  # answers from memory have no passes, and requests at the same time share them

    def least_ms(result: Result) -> float | None:
        turns = [turn for turn in result.turns if turn.report and workload.is_later(turn.agent, turn.turn)]
        return _median(_floor_ms(rates, turn.report) for turn in turns if turn.report)

    floors = {number: ms for number, result in reference.items() if (ms := least_ms(result)) is not None}
    later = Spread.of(floors.values())
    ratio = Spread.of(_later_ms(workload, reference[number]) / ms for number, ms in floors.items())
    return FloorSummary(later=later, ratio=ratio) if later and ratio else None


def _floor_ms(rates: FloorRates, report: dict[str, Any]) -> float:
    free = report["completion_tokens"] - report["forced_tokens"]
    return 1e3 * floor.turn_seconds(rates, delta=report["delta_tokens"], free=free, context=report["prompt_tokens"])


def _points(workload: Workload, samples: Sequence[_Sample]) -> Iterator[Point]:
    """By the turn's number; where agents follow each other, counted on from one to the next."""
    lengths: dict[int, int] = defaultdict(int)
    for sample in samples:
        lengths[sample.turn.agent] = max(lengths[sample.turn.agent], sample.turn.turn + 1)
    offsets = {agent: sum(lengths[other] for other in lengths if other < agent) for agent in lengths}
    groups: dict[int, list[_Sample]] = defaultdict(list)
    for sample in samples:
        offset = offsets[sample.turn.agent] if workload.order == "one after another" else 0
        groups[offset + sample.turn.turn + 1].append(sample)
    for number, group in sorted(groups.items()):
        parts = [_parts(s.turn, s.turn.report) for s in group if s.turn.report]
        yield Point(
            turn=number,
            milliseconds=statistics.median(s.turn.seconds * 1e3 for s in group),
            prompt_tokens=_median(s.turn.prompt_tokens for s in group),
            recomputed_tokens=_median(s.recomputed for s in group),
            parts={name: statistics.median(each[name] for each in parts) for name in parts[0]} if parts else None,
            passes_per_token=_passes_per_token(s.turn for s in group),
        )


def _parts(turn: TurnResult, report: dict[str, Any]) -> dict[str, float]:
    inside = {name: float(report[f"{name}_ms"]) for name in ("queue", "prefill", "decode")}
    return {**inside, "other": max(0.0, turn.seconds * 1e3 - sum(inside.values()))}


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3


Format = Callable[[float], str]
COLUMNS = (
    "server",
    "later turns, ms",
    "to ours",
    "first turn, ms",
    "first token, ms",
    "all, s",
    "all, to ours",
    "tokens out",
    "ms a token",
    "valid",
    "recomputed",
    "beyond delta",
)


def rows(workload: WorkloadSummary) -> list[list[str]]:
    """The cells of a workload's table under `COLUMNS`; what errors there were is not in it."""
    table = [_row(server) for server in workload.servers]
    if workload.floor is not None:
        cells = [FLOOR, _cell(workload.floor.later, "{:.0f}"), f"1/{_cell(workload.floor.ratio, '{:.2f}')}"]
        table.append([*cells, *("" for _ in COLUMNS[len(cells) :])])
    return table


def _row(server: ServerSummary) -> list[str]:
    if server.rounds == 0:
        return [server.server, "failed", *("" for _ in COLUMNS[2:])]
    return [
        server.server,
        _cell(server.later, "{:.0f}"),
        _cell(server.ratio, "{:.2f}"),
        _cell(server.first_turn, "{:.0f}"),
        _cell(server.first_token, "{:.0f}"),
        _cell(server.seconds, "{:.2f}"),
        _cell(server.seconds_ratio, "{:.2f}"),
        _number(server.output_tokens),
        _cell(server.per_output_token, "{:.1f}"),
        f"{server.valid}/{server.turns}",
        _number(server.recomputed_tokens),
        _number(server.beyond_delta),
    ]


def _cell(spread: Spread | None, form: str) -> str:
    """The median, and the range if there is one to speak of."""
    if spread is None:
        return ""
    median, least, most = (form.format(value) for value in (spread.median, spread.least, spread.most))
    return median if least == most else f"{median} ({least}-{most})"


def _number(value: float | None) -> str:
    return "not reported" if value is None else f"{value:.0f}"
