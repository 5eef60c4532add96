"""Plots as SVG, for a page and for Markdown: readable in print and without colours."""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from statistics import median

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from slipstream_bench.report import REFERENCE, Point, Summary, WorkloadSummary

_INCHES = (9.0, 3.8)
COLOURS = ("#0b6e4f", "#c1440e", "#1f4e9e", "#8a6d00", "#7b2d8b", "#3b8ea5", "#555555", "#b0306a")
_DASHES = ("-", "--", ":", "-.")
_FAR_APART = 15
"""How many times higher one line may be than another before an axis from 0 hides the lower one's shape."""

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Plot:
    """A picture of a workload's turns."""

    name: str
    title: str
    svg: str


def of_all(summary: Summary) -> dict[str, list[Plot]]:
    """The plots of each workload, by its name."""
    return {workload.name: list(_of_workload(workload)) for workload in summary.workloads}


def _of_workload(workload: WorkloadSummary) -> Iterator[Plot]:
    """What there is to show of a workload; some servers don't tell all of it."""

    def context(point: Point) -> float | None:
        return point.prompt_tokens

    def turn(point: Point) -> float:
        return point.turn

    def milliseconds(point: Point) -> float:
        return point.milliseconds

    for name, title, x, y, x_label, y_label in (
        ("time-by-turn", "Time of a turn", turn, milliseconds, "turn", "ms"),
        ("time-by-context", "Time by length of the context", context, milliseconds, "prompt tokens", "ms"),
        ("computed", "Prompt tokens computed", turn, lambda point: point.recomputed_tokens, "turn", "tokens"),
        ("passes", "Forward passes per token", turn, lambda point: point.passes_per_token, "turn", "passes"),
    ):
        if svg := lines(_series(workload, x, y), x_label=x_label, y_label=y_label):
            yield Plot(name, title, svg)
    for server in workload.servers:
        bars = {point.turn: point.parts for point in server.points if point.parts is not None}
        if bars and server.server == REFERENCE:
            yield Plot("parts", "What a turn of ours is spent on", stacked_bars(bars, x_label="turn", y_label="ms"))


def _series(
    workload: WorkloadSummary, x: Callable[[Point], float | None], y: Callable[[Point], float | None]
) -> dict[str, Points]:
    """A line for each server, empty if it doesn't tell both."""
    return {
        server.server: [
            (a, b) for point in server.points if (a := x(point)) is not None and (b := y(point)) is not None
        ]
        for server in workload.servers
    }


def lines(series: Mapping[str, Points], *, x_label: str, y_label: str) -> str:
    """One line for each series that has points, in a colour that goes by its place among all.

    The y axis begins at 0, unless the series are so far apart that only a logarithmic one shows them all. An SVG
    element, empty if there is nothing to show.
    """
    if not any(series.values()):
        return ""
    medians = [median(y for _, y in points) for points in series.values() if points]
    figure, axes = _figure(x_label, y_label, logarithmic=0 < min(medians) * _FAR_APART < max(medians))
    for number, (name, points) in enumerate(series.items()):
        if not points:
            continue
        xs, ys = zip(*sorted(points), strict=True)
        colour, dashes = COLOURS[number % len(COLOURS)], _DASHES[number % len(_DASHES)]
        axes.plot(xs, ys, dashes, color=colour, marker="o", markersize=2.5, label=name)
    return _svg(figure, axes)


def stacked_bars(bars: Mapping[int, Mapping[str, float]], *, x_label: str, y_label: str) -> str:
    """A bar for each number, of the same parts each. An SVG element, empty if there is nothing to show."""
    if not bars:
        return ""
    figure, axes = _figure(x_label, y_label)
    bottoms = [0.0] * len(bars)
    for number, name in enumerate(next(iter(bars.values()))):
        heights = [parts[name] for parts in bars.values()]
        axes.bar(list(bars), heights, bottom=bottoms, color=COLOURS[number % len(COLOURS)], label=name)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    return _svg(figure, axes)


def _style() -> AbstractContextManager[None]:
    """Text stays text, and equal plots are equal files."""
    return rc_context({"svg.fonttype": "none", "svg.hashsalt": "slipstream", "font.size": 9})


def _figure(x_label: str, y_label: str, *, logarithmic: bool = False) -> tuple[Figure, Axes]:
    with _style():
        figure = Figure(figsize=_INCHES, layout="constrained")
        axes = figure.add_subplot(xlabel=x_label, ylabel=y_label)
    axes.grid(axis="y", color="#dddddd")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    if logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    return figure, axes


def _svg(figure: Figure, axes: Axes) -> str:
    if axes.get_yscale() == "linear":
        axes.set_ylim(bottom=0)
    figure.legend(loc="outside lower left", ncols=4, frameon=False)
    text = io.StringIO()
    with _style():
        figure.savefig(text, format="svg", metadata={"Date": None})
    drawn = text.getvalue()
    return drawn[drawn.index("<svg") :]
