"""Line charts as HTML: an inline SVG that stretches, and labels that stay readable when it shrinks.

In: named series of points. Out: HTML without scripts; colours are classes of the page's style sheet.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

Points = Sequence[tuple[float, float]]
HUES = 6  # how many series the style sheet tells apart


class Axes(NamedTuple):
    """What is drawn against what; a range of None is that of the points."""

    x: str
    y: str
    y_range: tuple[float, float] | None = None
    x_ticks: Sequence[float] | None = None
    mark: tuple[float, str] | None = None  # a vertical line at x, and what it says


class _Frame(NamedTuple):
    """Values -> percent of the drawing's width and height."""

    left: float
    right: float
    low: float
    high: float

    def x(self, value: float) -> float:
        return 100 * (value - self.left) / (self.right - self.left)

    def y(self, value: float) -> float:
        return 100 * (self.high - value) / (self.high - self.low)


def chart(series: Mapping[str, Points], axes: Axes) -> str:
    """The chart; "" where there is nothing to draw."""
    series = {name: line for name, line in series.items() if line}
    if not series:
        return ""
    points = [point for line in series.values() for point in line]
    frame = _Frame(*_range([x for x, _ in points]), *(axes.y_range or _range([y for _, y in points])))
    rows = _inside(ticks(frame.low, frame.high), frame.low, frame.high)
    columns = _inside(axes.x_ticks or ticks(frame.left, frame.right), frame.left, frame.right)
    grid = "".join(f'<line x1="0" x2="100" y1="{frame.y(y):.2f}" y2="{frame.y(y):.2f}"/>' for y in rows)
    lines = "".join(_line(at % HUES, frame, line) for at, line in enumerate(series.values()))
    labels = "".join(f'<span class="y" style="top:{frame.y(y):.2f}%">{short(y)}</span>' for y in rows)
    labels += "".join(f'<span class="x" style="left:{frame.x(x):.2f}%">{short(x)}</span>' for x in columns)
    label = f"{escape(axes.y)} against {escape(axes.x)}: {_spoken(series)}"
    return (
        f'<figure class="plot"><figcaption>{escape(axes.y)}{_legend(series)}</figcaption><div class="area">'
        f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" aria-label="{label}">'
        f"{grid}{lines}</svg>{_mark(frame, axes.mark)}{labels}</div><p>{escape(axes.x)}</p></figure>"
    )


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers that span a range.

    >>> ticks(0, 30720)
    [0.0, 10000.0, 20000.0, 30000.0, 40000.0]
    """
    raw = (high - low) / about
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * nice for nice in (1, 2, 5, 10) if unit * nice >= raw * 0.999)
    first = math.floor(low / step)
    return [step * at for at in range(first, math.ceil(high / step) + 1)]


def short(value: float) -> str:
    """As few characters as say it.

    >>> short(30000), short(2.5), short(100.0)
    ('30k', '2.5', '100')
    """
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:.4g}"


def _line(hue: int, frame: _Frame, line: Points) -> str:
    placed = [f"{frame.x(x):.2f} {frame.y(y):.2f}" for x, y in line]
    # A path of no length with round ends is a dot that does not stretch with the drawing.
    dots = "".join(f'<path d="M{place}h0"/>' for place in placed) if len(placed) <= 24 else ""
    return f'<g class="s{hue}"><polyline points="{" ".join(placed)}"/>{dots}</g>'


def _mark(frame: _Frame, mark: tuple[float, str] | None) -> str:
    if mark is None or not frame.left <= mark[0] <= frame.right:
        return ""
    x = frame.x(mark[0])
    side = " before" if x > 60 else ""  # so that the words stay inside
    return f'<i class="mark{side}" style="left:{x:.2f}%"><b>{escape(mark[1])}</b></i>'


def _legend(series: Mapping[str, Points]) -> str:
    names = "".join(f'<li class="s{at % HUES}">{escape(name)}</li>' for at, name in enumerate(series))
    return f'<ul class="key">{names}</ul>'


def _spoken(series: Mapping[str, Points]) -> str:
    ends = (f"{name} from {line[0][1]:.3g} to {line[-1][1]:.3g}" for name, line in series.items())
    return escape("; ".join(ends))


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _inside(places: Sequence[float], low: float, high: float) -> list[float]:
    slack = 1e-9 * (high - low)
    return [place for place in places if low - slack <= place <= high + slack]
