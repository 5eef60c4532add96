"""A report as one HTML page that needs nothing else, on a screen and on paper."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape

from slipstream_bench.plots import Plot
from slipstream_bench.report import COLUMNS, Summary, WorkloadSummary, rows
from slipstream_bench.tables import LEGEND, machine_text, settings_text

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1060px; margin: 2em auto; padding: 0 1em; color: #1a1a1a; }
h1 { margin-bottom: 0; } h2 { margin-top: 2em; border-bottom: 2px solid #1a1a1a; } h3 { margin-bottom: 0; }
code, pre { font-size: 13px; background: #f4f4f4; } pre { padding: .6em; white-space: pre-wrap; }
table { border-collapse: collapse; width: 100%; font-size: 12.5px; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #ccc; padding: .3em .5em; text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; }
figure { margin: .4em 0 1em; break-inside: avoid; } figure svg { width: 100%; height: auto; }
.failed { color: #a11; }
@media print {
  body { margin: 0; max-width: none; font-size: 11px; } table { font-size: 9px; }
  h2, h3 { break-after: avoid; } table { break-inside: avoid; } section { break-inside: auto; }
}
"""


def page(summary: Summary, plots: Mapping[str, Sequence[Plot]]) -> str:
    """The whole report, with the plots of each workload by its name."""
    commands = "\n".join(summary.commands)
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>Slipstream bench</title>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<style>{_STYLE}</style></head><body><h1>Slipstream bench</h1>",
        f"<p>{escape(settings_text(summary))}<br>{escape(machine_text(summary))}</p>",
        f"<pre>{escape(commands)}</pre>",
        f"<p>{escape(LEGEND)}</p>",
        *(part for workload in summary.workloads for part in _workload(workload, plots[workload.name])),
        *_servers(summary),
        "</body></html>",
    ]
    return "\n".join(part for part in parts if part)


def _workload(workload: WorkloadSummary, plots: Sequence[Plot]) -> Iterator[str]:
    yield f"<section><h2>{escape(workload.name)}</h2><p>{escape(workload.description)} "
    yield f"Later turns: {escape(workload.later)}.</p>"
    yield f"<table><thead><tr>{''.join(f'<th>{escape(column)}</th>' for column in COLUMNS)}</tr></thead><tbody>"
    yield from (_row(cells) for cells in rows(workload))
    yield "</tbody></table>"
    for server in workload.servers:
        for error in server.errors:
            yield f"<p class='failed'>{escape(server.server)} failed:</p><pre>{escape(error)}</pre>"
    for plot in plots:
        yield f"<figure><h3>{escape(plot.title)}</h3>{plot.svg}</figure>"
    yield "</section>"


def _row(cells: list[str]) -> str:
    return f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"


def _servers(summary: Summary) -> Iterator[str]:
    yield "<section><h2>How the servers were run</h2><dl>"
    for each in summary.servers:
        notes = "".join(f"<br>{escape(note)}" for note in each.notes)
        yield f"<dt>{escape(each.server)}</dt><dd><code>{escape(each.description)}</code>{notes}</dd>"
    yield "</dl></section>"
