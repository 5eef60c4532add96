"""A run: each workload on each server, round by round, alternately, so that what slows the machine slows all alike."""

import asyncio
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol, Self

import httpx

from slipstream_bench.client import Agent, Client, TurnFailedError
from slipstream_bench.coding import TOOLS, coding_script
from slipstream_bench.peers.base import Configuration, Endpoint, Peer, PeerError
from slipstream_bench.peers.process import paused
from slipstream_bench.records import ConstraintKind, Result, RunFile, TurnResult
from slipstream_bench.workloads import Workload


@dataclass(frozen=True, slots=True)
class Server:
    """A peer in one of its configurations."""

    peer: Peer
    configuration: Configuration

    @property
    def name(self) -> str:
        """As in results."""
        return f"{self.peer.name}:{self.configuration.name}"

    def running(self) -> AbstractContextManager[Endpoint]:
        """The server, ready to answer; raises `PeerError`."""
        return self.peer.running(self.configuration)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run."""

    servers: Sequence[Server]
    workloads: Sequence[Workload]
    rounds: int
    seed: int
    constraint: ConstraintKind

    def units(self) -> Iterator[tuple[int, Workload, Server]]:
        """In the order of a run: servers alternate within a workload, and each round begins with another."""
        for round_number in range(self.rounds):
            first = round_number % len(self.servers)
            for workload in self.workloads:
                for server in (*self.servers[first:], *self.servers[:first]):
                    yield round_number, workload, server

    def missing(self, file: RunFile) -> Iterator[tuple[int, Workload, Server]]:
        """Those without a result in the file that got to its end."""
        for round_number, workload, server in self.units():
            if not file.has(workload.name, round_number, server.name):
                yield round_number, workload, server


class Watcher(Protocol):
    """Is told how a run goes on."""

    def starting(self, server: str) -> None:
        """A server is started and warmed up."""

    def begins(self, round_number: int, workload: Workload, server: str, turns: int) -> None:
        """A workload begins."""

    def took(self, turn: TurnResult) -> None:
        """A turn was answered."""

    def ends(self, result: Result) -> None:
        """A workload is through, or failed."""


def run(plan: Plan, file: RunFile, watcher: Watcher) -> None:
    """Carry out what of the plan has no result in the file yet. Servers start when they are first needed."""
    with Servers(plan.constraint, watcher) as servers:
        for round_number, workload, server in plan.missing(file):
            try:
                with servers.alone(server) as endpoint:
                    result = _measure(plan, round_number, workload, server.name, endpoint, watcher)
            except PeerError as error:
                result = Result(workload=workload.name, round=round_number, server=server.name, error=str(error))
            if result.error is not None:
                servers.stop(server)  # whatever is wrong with it; the next workload gets a fresh one
            file.add(result)
            watcher.ends(result)


class Servers:
    """The servers of a run. While one is measured, the others are paused; all are stopped at the end."""

    def __init__(self, constraint: ConstraintKind, watcher: Watcher) -> None:
        self._constraint = constraint
        self._watcher = watcher
        self._running: dict[str, tuple[ExitStack, Endpoint]] = {}
        self._failures: dict[str, PeerError] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with ExitStack() as closing:
            for stack, _endpoint in self._running.values():
                closing.callback(stack.close)
        self._running.clear()

    @contextmanager
    def alone(self, server: Server) -> Iterator[Endpoint]:
        """A server, warm, that has the machine to itself; raises `PeerError` if it doesn't start, or once didn't."""
        if server.name in self._failures:
            raise self._failures[server.name]
        groups = (endpoint.process_group for name, (_, endpoint) in self._running.items() if name != server.name)
        with paused([group for group in groups if group is not None]):
            if server.name not in self._running:
                self._start(server)
            yield self._running[server.name][1]

    def stop(self, server: Server) -> None:
        """Stop it, if it runs."""
        if (running := self._running.pop(server.name, None)) is not None:
            running[0].close()

    def _start(self, server: Server) -> None:
        self._watcher.starting(server.name)
        stack = ExitStack()
        try:
            endpoint = stack.enter_context(server.running())
            asyncio.run(_warm_up(endpoint, self._constraint))
        except BaseException as error:
            stack.close()
            if not isinstance(error, PeerError | TurnFailedError | httpx.HTTPError):
                raise
            self._failures[server.name] = PeerError(f"{server.name} can't be used: {error}")
            raise self._failures[server.name] from error
        self._running[server.name] = (stack, endpoint)


def _measure(
    plan: Plan, round_number: int, workload: Workload, server: str, endpoint: Endpoint, watcher: Watcher
) -> Result:
    scripts = workload.scripts(plan.seed, round_number)
    watcher.begins(round_number, workload, server, sum(len(script.turns) for script in scripts))
    turns: list[TurnResult] = []
    error: str | None = None

    def took(turn: TurnResult) -> None:
        turns.append(turn)
        watcher.took(turn)

    async def drive() -> float:
        async with Client(endpoint, response_cache=workload.response_cache) as client:
            agents = [
                client.agent(number, script, plan.constraint, rewrites=workload.rewrites)
                for number, script in enumerate(scripts)
            ]
            started = perf_counter()
            await _ORDERS[workload.order](agents, took)
            return perf_counter() - started

    seconds = 0.0
    try:
        seconds = asyncio.run(drive())
    except TurnFailedError as failure:
        turns.append(failure.result)
        error = str(failure)
    except httpx.HTTPError as failure:
        error = f"the server doesn't answer: {failure}"
    return Result(
        workload=workload.name,
        round=round_number,
        server=server,
        version=endpoint.version,
        seconds=seconds,
        turns=turns,
        error=error,
    )


Took = Callable[[TurnResult], None]


async def _taking_turns(agents: Sequence[Agent], took: Took) -> None:
    for turn in range(max(agent.turns for agent in agents)):
        for agent in agents:
            if turn < agent.turns:
                took(await agent.take(turn))


async def _one_after_another(agents: Sequence[Agent], took: Took) -> None:
    for agent in agents:
        await _follow(agent, took)


async def all_at_once(agents: Sequence[Agent], took: Took) -> None:
    """Each agent follows its script to the end; raises `TurnFailedError` if one can't."""
    await asyncio.gather(*(_follow(agent, took) for agent in agents))


async def _follow(agent: Agent, took: Took) -> None:
    for turn in range(agent.turns):
        took(await agent.take(turn))


_ORDERS = {
    "taking turns": _taking_turns,
    "one after another": _one_after_another,
    "all at once": all_at_once,
}


async def _warm_up(endpoint: Endpoint, constraint: ConstraintKind) -> None:
    """A turn with each tool: pages are touched, code is compiled, and schemas are known."""
    async with Client(endpoint, response_cache=False) as client:
        agent = client.agent(0, coding_script(random.Random("warm-up"), len(TOOLS)), constraint)
        await _follow(agent, lambda _: None)
