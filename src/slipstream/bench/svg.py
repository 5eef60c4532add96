"""Plots as inline SVG: lines and stacked bars, enough for a report, readable in print and without colours."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 760, 330
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 12, 14, 44
_COLOURS = ("#0b6e4f", "#c1440e", "#1f4e9e", "#8a6d00", "#7b2d8b", "#3b8ea5", "#555555", "#b0306a")
_DASHES = ("", "7 3", "2 3", "9 3 2 3")
_TICKS = 5

Points = Sequence[tuple[float, float]]


def line_plot(series: Mapping[str, Points], *, x_label: str, y_label: str) -> str:
    """One line for each series; the y axis begins at 0."""
    points = [point for each in series.values() for point in each]
    if not points:
        return ""
    xs = [x for x, _ in points]
    axes = _Axes(min(xs), max(xs), max(y for _, y in points))
    body = [*axes.draw(x_label, y_label)]
    for number, each in enumerate(series.values()):
        path = " ".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in sorted(each))
        body.append(f'<polyline points="{path}" fill="none" {_stroke(number)}/>')
        body += [
            f'<circle cx="{axes.x(x):.1f}" cy="{axes.y(y):.1f}" r="2.2" fill="{_colour(number)}"/>' for x, y in each
        ]
    return _svg(body, [(name, f"<line x1='0' x2='26' y1='6' y2='6' {_stroke(n)}/>") for n, name in enumerate(series)])


def stacked_bars(bars: Mapping[int, Mapping[str, float]], *, x_label: str, y_label: str) -> str:
    """A bar for each number, of the same parts each."""
    if not bars:
        return ""
    names = list(next(iter(bars.values())))
    axes = _Axes(min(bars) - 0.5, max(bars) + 0.5, max(sum(parts.values()) for parts in bars.values()))
    width = 0.8 * (axes.x(1) - axes.x(0))
    body = [*axes.draw(x_label, y_label)]
    for x, parts in bars.items():
        bottom = 0.0
        for number, name in enumerate(names):
            top = bottom + parts[name]
            body.append(
                f'<rect x="{axes.x(x) - width / 2:.1f}" y="{axes.y(top):.1f}" width="{width:.1f}" '
                f'height="{axes.y(bottom) - axes.y(top):.1f}" fill="{_colour(number)}"/>'
            )
            bottom = top
    return _svg(body, [(name, f"<rect width='14' height='11' fill='{_colour(n)}'/>") for n, name in enumerate(names)])


@dataclass(frozen=True, slots=True)
class _Axes:
    """From values to places."""

    x_least: float
    x_most: float
    y_most: float

    def x(self, value: float) -> float:
        span = (self.x_most - self.x_least) or 1.0
        return _LEFT + (value - self.x_least) / span * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return _HEIGHT - _BOTTOM - value / (self.y_most or 1.0) * (_HEIGHT - _TOP - _BOTTOM)

    def draw(self, x_label: str, y_label: str) -> Iterator[str]:
        for tick in _ticks(0, self.y_most):
            y = self.y(tick)
            yield f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
            yield f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:,g}</text>'
        for tick in _ticks(self.x_least, self.x_most):
            yield f'<text x="{self.x(tick):.1f}" y="{_HEIGHT - _BOTTOM + 17}" text-anchor="middle">{tick:,g}</text>'
        yield f'<text x="{(_LEFT + _WIDTH) / 2}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>'
        middle = (_HEIGHT - _BOTTOM) / 2
        yield f'<text transform="translate(13 {middle}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'


def _ticks(least: float, most: float) -> Iterator[float]:
    """Round numbers within the range."""
    rough = (most - least) / _TICKS or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough)
    for number in range(math.ceil(least / step), math.floor(most / step) + 1):
        yield number * step


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]


def _stroke(number: int) -> str:
    return f"stroke='{_colour(number)}' stroke-width='2' stroke-dasharray='{_DASHES[number % len(_DASHES)]}'"


def _svg(body: Sequence[str], keys: Sequence[tuple[str, str]]) -> str:
    """The plot, and under it what its lines or colours mean."""
    legend = "".join(
        f"<span><svg width='28' height='12' aria-hidden='true'>{sign}</svg> {escape(name)}</span>"
        for name, sign in keys
    )
    plot = f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' role='img'>{''.join(body)}</svg>"
    return f"<figure>{plot}<figcaption>{legend}</figcaption></figure>"
