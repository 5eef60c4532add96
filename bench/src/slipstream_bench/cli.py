"""`slipstream bench`: this server and others side by side, on the machine at hand."""

import shlex
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Self, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table

from slipstream.cli.options import Model, readable_errors
from slipstream.errors import SlipstreamError
from slipstream.models import DEFAULT_MODEL, ModelStore, Progress
from slipstream.models import Model as StoredModel
from slipstream_bench import floor, report, tables
from slipstream_bench.machine import this_machine
from slipstream_bench.peers import PEERS, Peer
from slipstream_bench.peers.url import AtURL
from slipstream_bench.records import ConstraintKind, Result, RunFile, ServerDescription, Settings, TurnResult
from slipstream_bench.runner import Plan, Server, run
from slipstream_bench.workloads import WORKLOADS, Workload

app = typer.Typer(
    help="Measure this server and others side by side, with the same requests, on this machine.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

T = TypeVar("T")

DEFAULT_WORKLOADS = ("agent-6", "coding-35")


@app.command("run")
def run_(
    workload: Annotated[
        list[str] | None,
        typer.Option(
            "--workload", "-w", help="Which, any number of times; `all` for each. See `slipstream bench list`."
        ),
    ] = None,
    server: Annotated[
        list[str] | None,
        typer.Option(
            "--server",
            "-s",
            help="PEER, which means its best configuration, or PEER:CONFIGURATION, or the URL of a server that runs "
            "already; any number of times; `all` for each that is set up. By default the best configuration of each "
            "that is set up.",
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often each workload is run on each server.")] = 3,
    out: Annotated[
        Path, typer.Option(file_okay=False, help="Folder for the results. A run that was stopped goes on from there.")
    ] = Path("bench-results"),
    model: Model = DEFAULT_MODEL,
    seed: Annotated[int, typer.Option(help="Of the texts.")] = 0,
    turns: Annotated[
        int | None,
        typer.Option(min=2, help="Cut each agent's conversation after so many turns: for models that take minutes."),
    ] = None,
    constraint: Annotated[
        ConstraintKind,
        typer.Option(
            help="How requests ask for a call; the same for all servers. With `prescribed` each answer is known in "
            "advance, for models with random weights: run slipstream:prescribed, llama-server, openvino-genai."
        ),
    ] = "response_format",
) -> None:
    """Run workloads on servers, alternately, and report.

    Each result is on disk as soon as it's there: the same command again goes on with what is missing, and tries again
    what failed.

    Examples:

      slipstream bench run

      slipstream bench run -w coding-35 -s slipstream -s vllm -s llama-server:default --rounds 5

      slipstream bench run -w agent-6 -s slipstream -s slipstream:no-reuse --out ablation
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an end that stops the servers, too
    console = Console()
    with readable_errors():
        pulled = ModelStore().ensure(model, progress=Progress(console))
        known = {name: peer(pulled) for name, peer in PEERS.items()}
        servers = _servers(server, known, pulled)
        left_out = [] if server else [Server(peer, peer.compared_by) for peer in known.values() if not peer.installed()]
        if left_out:
            names = ", ".join(each.peer.name for each in left_out)
            console.print(f"Not set up, so left out: {names}. `slipstream bench setup NAME` sets one up.")
        workloads = _workloads(workload)
        if turns is not None:
            workloads = [each.cut(turns) for each in workloads]
        file = RunFile(out)
        plan = Plan(servers, workloads, rounds, seed, constraint)
        _begin(file, plan, turns, left_out, pulled, console)
        try:
            with _Bars(len(list(plan.missing(file))), console) as bars:
                run(plan, file, bars)
        except KeyboardInterrupt:
            console.print(f"Stopped. The same command goes on with what is missing in {out}.")
            raise typer.Exit(130) from None
        _show(file, out, console)


@app.command()
def setup(
    peer: Annotated[str, typer.Argument(metavar="PEER", help="Which; see `slipstream bench list`.")],
    model: Model = DEFAULT_MODEL,
) -> None:
    """Install another server, in an environment of its own under $SLIPSTREAM_HOME or ~/.cache/slipstream."""
    progress = Progress(Console())
    with readable_errors():
        chosen = _named(peer, PEERS, "peer")(ModelStore().ensure(model, progress=progress))
        chosen.setup(progress)
        print(f"{peer} is set up: slipstream bench run -s {peer}")


@app.command("list")
def list_(model: Model = DEFAULT_MODEL) -> None:
    """Show the workloads, and the servers with their configurations."""
    console = Console()
    with readable_errors():
        pulled = ModelStore().ensure(model, progress=Progress(console))
        workloads = Table("workload", "what it is", box=None)
        for each in WORKLOADS.values():
            workloads.add_row(each.name, each.description)
        servers = Table("server", "set up", "how it runs", box=None)
        for name, peer in PEERS.items():
            ready = "yes" if peer(pulled).installed() else "no"
            for way in peer.configurations:
                servers.add_row(f"{name}:{way.name}", ready, "\n".join((way.description, *way.notes)))
        console.print(workloads, "", servers)


@app.command("report")
def report_(
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Of the run.")],
) -> None:
    """Make the report of a run again: a table here; JSON, HTML, Markdown and plots in its folder."""
    console = Console()
    with readable_errors():
        file = RunFile(folder)
        if not file.results:
            raise SlipstreamError(f"there are no results in {folder}")
        _show(file, folder, console)


def _named(name: str, known: Mapping[str, T], kind: str) -> T:
    if name not in known:
        raise SlipstreamError(f"no {kind} is called {name!r}; there are: {', '.join(known)}")
    return known[name]


def _workloads(names: list[str] | None) -> list[Workload]:
    if names and "all" in names:
        return list(WORKLOADS.values())
    return [_named(name, WORKLOADS, "workload") for name in names or DEFAULT_WORKLOADS]


def _servers(names: list[str] | None, known: Mapping[str, Peer], model: StoredModel) -> list[Server]:
    """What `--server` asks for; the servers that are set up if it asks for none."""
    ready = [peer for peer in known.values() if peer.installed()]
    if not names:
        return [Server(peer, peer.compared_by) for peer in ready]
    if "all" in names:
        return [Server(peer, configuration) for peer in ready for configuration in peer.configurations]
    servers = []
    for name in names:
        if name.startswith(("http://", "https://")):
            found = AtURL(model, name)
            servers.append(Server(found, found.compared_by))
            continue
        peer_name, _, wanted = name.partition(":")
        peer = _named(peer_name, known, "peer")
        if peer not in ready:
            raise SlipstreamError(f"{peer_name} is not set up: slipstream bench setup {peer_name}")
        configurations = {each.name: each for each in peer.configurations}
        chosen = _named(wanted, configurations, f"configuration of {peer_name}") if wanted else peer.compared_by
        servers.append(Server(peer, chosen))
    return servers


def _begin(
    file: RunFile, plan: Plan, turns: int | None, left_out: list[Server], model: StoredModel, console: Console
) -> None:
    """Record what the results belong to, and what has none; raises `SlipstreamError` if the file has other results."""
    command = shlex.join(["slipstream", *sys.argv[1:]])
    settings = Settings(model=model.name, seed=plan.seed, constraint=plan.constraint, turns=turns, command=command)
    if file.settings is None:
        file.add(settings)
        file.add(this_machine())
        with console.status("Measuring memory bandwidth and matrix rate"):
            file.add(floor.measure(model.ir_path))
    for field in ("model", "seed", "constraint", "turns"):
        before, now = getattr(file.settings, field), getattr(settings, field)
        if before != now:
            raise SlipstreamError(f"the run in this folder has {field} {before!r}, not {now!r}: choose another --out")
    if command not in file.commands:
        file.add(settings)
    for server in (*plan.servers, *left_out):
        way = server.configuration
        notes = ["not set up on this machine, so not run"] if server in left_out else []
        described = ServerDescription(server=server.name, description=way.description, notes=[*notes, *way.notes])
        if file.servers.get(server.name) != described:
            file.add(described)


def _show(file: RunFile, folder: Path, console: Console) -> None:
    """The report here, and as files in the folder."""
    from slipstream_bench import html, plots  # matplotlib takes a second to import

    summary = report.summary(file)
    console.print(*tables.terminal(summary, console.width), sep="\n")
    drawn = plots.of_all(summary)
    for name, text in (
        ("summary.json", summary.model_dump_json(indent=1)),
        ("report.html", html.page(summary, drawn)),
        ("benchmarks.md", tables.markdown(summary)),
        *((f"{name}-{plot.name}.svg", plot.svg) for name, each in drawn.items() for plot in each),
    ):
        (folder / name).write_text(text, encoding="utf-8")
    console.print(f"Report: {folder / 'report.html'}", markup=False, highlight=False)


class _Bars:
    """A run's progress: one bar for all of it, one for the workload that is under way."""

    def __init__(self, units: int, console: Console) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bars = Bars(*columns, console=console, transient=True)
        self._all = self._bars.add_task("All", total=units)
        self._one = self._bars.add_task("", total=None)

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def starting(self, server: str) -> None:
        """A server is started and warmed up."""
        self._bars.reset(self._one, description=f"Starting {server}", total=None)

    def begins(self, round_number: int, workload: Workload, server: str, turns: int) -> None:
        """A workload begins."""
        self._bars.reset(self._one, description=f"{workload.name}, round {round_number + 1}, {server}", total=turns)

    def took(self, turn: TurnResult) -> None:  # noqa: ARG002 - a watcher is told more than this one shows
        """A turn was answered."""
        self._bars.advance(self._one)

    def ends(self, result: Result) -> None:
        """A workload is through, or failed."""
        self._bars.advance(self._all)
        how = f"{result.seconds:.2f} s" if result.error is None else f"failed: {result.error.splitlines()[0]}"
        line = f"{result.workload}, round {result.round + 1}, {result.server}: {how}"
        self._bars.console.print(line, markup=False, highlight=False)
