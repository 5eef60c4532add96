"""A report as one HTML page that needs nothing else, on a screen and on paper."""

from collections.abc import Callable, Iterator
from html import escape

from slipstream.bench.report import COLUMNS, REFERENCE, Point, Summary, WorkloadSummary, rows
from slipstream.bench.svg import line_plot, stacked_bars
from slipstream.bench.tables import LEGEND, machine_text, settings_text

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1060px; margin: 2em auto; padding: 0 1em; color: #1a1a1a; }
h1 { margin-bottom: 0; } h2 { margin-top: 2em; border-bottom: 2px solid #1a1a1a; } h3 { margin-bottom: 0; }
code, pre { font-size: 13px; background: #f4f4f4; } pre { padding: .6em; white-space: pre-wrap; }
table { border-collapse: collapse; width: 100%; font-size: 12.5px; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #ccc; padding: .3em .5em; text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; }
figure { margin: .4em 0 1em; break-inside: avoid; } figure svg[role=img] { width: 100%; height: auto; }
figure text { font: 12px system-ui, sans-serif; fill: #333; } figcaption span { margin-right: 1.4em; font-size: 13px; }
.failed { color: #a11; }
@media print {
  body { margin: 0; max-width: none; font-size: 11px; } table { font-size: 9px; }
  h2, h3 { break-after: avoid; } tr { break-inside: avoid; } section { break-inside: auto; }
}
"""


def page(summary: Summary) -> str:
    """The whole report."""
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>Slipstream bench</title>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<style>{_STYLE}</style></head><body><h1>Slipstream bench</h1>",
        f"<p>{escape(settings_text(summary))}<br>{escape(machine_text(summary))}</p>",
        f"<pre>{escape(summary.settings.command)}</pre>" if summary.settings else "",
        f"<p>{escape(LEGEND)}</p>",
        *(part for workload in summary.workloads for part in _workload(workload)),
        *_servers(summary),
        "</body></html>",
    ]
    return "\n".join(part for part in parts if part)


def _workload(workload: WorkloadSummary) -> Iterator[str]:
    yield f"<section><h2>{escape(workload.name)}</h2><p>{escape(workload.description)} "
    yield f"Later turns: {escape(workload.later)}.</p>"
    yield f"<table><thead><tr>{''.join(f'<th>{escape(column)}</th>' for column in COLUMNS)}</tr></thead><tbody>"
    yield from (_row(cells) for cells in rows(workload))
    yield "</tbody></table>"
    for server in workload.servers:
        for error in server.errors:
            yield f"<p class='failed'>{escape(server.server)} failed:</p><pre>{escape(error)}</pre>"
    yield from _plots(workload)
    yield "</section>"


def _row(cells: list[str]) -> str:
    return f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"


def _plots(workload: WorkloadSummary) -> Iterator[str]:
    def number(point: Point) -> float:
        return point.turn

    def context(point: Point) -> float | None:
        return point.prompt_tokens

    plots = (
        ("Time of a turn", number, lambda point: point.milliseconds, "turn", "ms"),
        ("Time by length of the context", context, lambda point: point.milliseconds, "prompt tokens", "ms"),
        ("Prompt tokens computed", number, lambda point: point.recomputed_tokens, "turn", "tokens"),
        ("Forward passes per token", number, lambda point: point.passes_per_token, "turn", "passes"),
    )
    for title, x, y, x_label, y_label in plots:
        if plot := line_plot(_series(workload, x, y), x_label=x_label, y_label=y_label):
            yield f"<h3>{title}</h3>{plot}"
    for server in workload.servers:
        bars = {point.turn: point.parts for point in server.points if point.parts is not None}
        if bars and server.server == REFERENCE:
            yield f"<h3>What a turn of ours is spent on</h3>{stacked_bars(bars, x_label='turn', y_label='ms')}"


def _series(
    workload: WorkloadSummary, x: Callable[[Point], float | None], y: Callable[[Point], float | None]
) -> dict[str, list[tuple[float, float]]]:
    """A line for each server that tells both."""
    series = {}
    for server in workload.servers:
        pairs = [(x(point), y(point)) for point in server.points]
        if known := [(a, b) for a, b in pairs if a is not None and b is not None]:
            series[server.server] = known
    return series


def _servers(summary: Summary) -> Iterator[str]:
    yield "<section><h2>How the servers were run</h2><dl>"
    for each in summary.servers:
        notes = "".join(f"<br>{escape(note)}" for note in each.notes)
        yield f"<dt>{escape(each.server)}</dt><dd><code>{escape(each.description)}</code>{notes}</dd>"
    yield "</dl></section>"
