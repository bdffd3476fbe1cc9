"""Charts as SVG inside a page: lines, histograms, points with error bars. The page gives the colours, by class."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape

WIDTH, HEIGHT = 480, 240
RIGHT, TOP, BOTTOM = 18, 10, 44
LETTER = 10  # pixels, about, that a character of a label takes
LONGEST = 30  # most characters of a name in a chart


@dataclass(frozen=True)
class Line:
    """Points joined by a line.

    Attributes:
        name: shown where the pointer rests on it.
        tone: from 0 to 1, a place in the page's range of colours; None: the page's accent colour.
    """

    name: str
    points: Sequence[tuple[float, float]]
    tone: float | None = None


@dataclass(frozen=True)
class Mark:
    """One point, its spread along y, and which series it belongs to."""

    name: str
    x: float
    y: float
    spread: float
    series: int


@dataclass(frozen=True)
class _Frame:
    """A range of values on a range of pixels."""

    low: tuple[float, float]
    high: tuple[float, float]

    @classmethod
    def around(
        cls, points: Sequence[tuple[float, float]], *, margin: tuple[float, float], base: float | None = None
    ) -> _Frame:
        """The frame of these points.

        Args:
            margin: free space on both sides of x and y, as a share of the range.
            base: a value of y that the frame begins at, or below where a point is.
        """
        xs, ys = [x for x, _ in points], [y for _, y in points]
        ys += [] if base is None else [base]
        (left, right), (bottom, top) = (_range(min(values), max(values)) for values in (xs, ys))
        wide, tall = margin[0] * (right - left), margin[1] * (top - bottom)
        return cls((left - wide, bottom if bottom == base else bottom - tall), (right + wide, top + tall))

    @cached_property  # every point asks for it
    def left(self) -> float:
        """Where the frame begins: right of the longest label."""
        return 26 + LETTER * max((len(label) for _, label in self.labels(1)), default=1)

    def labels(self, axis: int) -> list[tuple[float, str]]:
        """(value, label) of every tick of x (0) or y (1)."""
        return _labels(_ticks(self.low[axis], self.high[axis]))

    def x(self, value: float) -> float:
        share = (value - self.low[0]) / (self.high[0] - self.low[0])
        return round(self.left + share * (WIDTH - self.left - RIGHT), 1)

    def y(self, value: float) -> float:
        share = (value - self.low[1]) / (self.high[1] - self.low[1])
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)

    def level(self, value: float) -> str:
        y = self.y(value)
        return f'<line class="limit" x1="{self.left}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>'

    def axes(self, x: str, y: str) -> str:
        parts = []
        for value, label in self.labels(0):
            at = self.x(value)
            parts.append(f'<line class="grid" x1="{at}" x2="{at}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
            parts.append(f'<text x="{at}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{label}</text>')
        for value, label in self.labels(1):
            at = self.y(value)
            parts.append(f'<line class="grid" x1="{self.left}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>')
            parts.append(f'<text x="{self.left - 6}" y="{at + 4}" text-anchor="end">{label}</text>')
        middle = (self.left + WIDTH - RIGHT) / 2
        parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x)}</text>')
        turned = f'transform="rotate(-90)" x="{-(TOP + HEIGHT - BOTTOM) / 2}" y="13" text-anchor="middle"'
        return "".join([*parts, f"<text {turned}>{escape(y)}</text>"])


def lines(
    drawn: Sequence[Line], x: str, y: str, *, limit: float | None = None, base: float | None = None, ends: bool = True
) -> str:
    """Lines over one another; empty without a finite point.

    Args:
        limit: a level that is drawn across.
        base: where y begins; the lowest value where None.
        ends: of several lines, the one that ends highest and the one that ends lowest get their names.
    """
    paths = [(line, [p for p in line.points if all(map(math.isfinite, p))]) for line in drawn]
    paths = [(line, points) for line, points in paths if points]
    if not paths:
        return ""
    points = [p for _, path in paths for p in path]
    points += [] if limit is None else [(points[0][0], limit)]
    named = ends and len(paths) > 1
    frame = _Frame.around(points, margin=(0, 0.12 if named else 0.05), base=base)
    shapes = []
    for line, path in paths:
        coordinates = " ".join(f"{frame.x(a)},{frame.y(b)}" for a, b in path)
        colour = "" if line.tone is None else f' style="stroke:{_colour(line.tone)}"'
        title = f"<title>{escape(line.name)}</title>"
        shapes.append(f'<polyline class="line" points="{coordinates}"{colour}>{title}</polyline>')
    shapes += [] if limit is None else [frame.level(limit)]
    shapes += _end_labels(frame, paths) if named else []
    return _svg(frame.axes(x, y) + "".join(shapes), f"{y} over {x}")


def _end_labels(frame: _Frame, paths: Sequence[tuple[Line, Sequence[tuple[float, float]]]]) -> list[str]:
    """The names of the lines that end highest and lowest, inside the chart, above and below their ends."""
    by_end = sorted(paths, key=lambda pair: pair[1][-1][1])
    labels = []
    for (line, points), shift in ((by_end[-1], -6), (by_end[0], 14)):
        y = min(max(frame.y(points[-1][1]) + shift, TOP + 10), HEIGHT - BOTTOM - 4)
        name = line.name if len(line.name) <= LONGEST else "…" + line.name[1 - LONGEST :]
        labels.append(f'<text class="end" x="{WIDTH - RIGHT - 4}" y="{y}" text-anchor="end">{escape(name)}</text>')
    return labels


def coloured_lines(points: Mapping[str, Sequence[tuple[float, float]]]) -> list[Line]:
    """A line for each name, in the page's range of colours."""
    last = max(len(points) - 1, 1)
    return [Line(name, path, i / last) for i, (name, path) in enumerate(points.items())]


def legend(drawn: Sequence[Line]) -> str:
    """The names of lines, a dot in the colour of each before it."""
    dots = (
        f'<span class="dot" style="background:{_colour(line.tone or 0)}"></span>{escape(line.name)}' for line in drawn
    )
    return "; ".join(dots) + ". "


def histogram(edges: Sequence[float], before: Sequence[int], after: Sequence[int], x: str) -> str:
    """Two counts over the same bins: before as an outline, after filled."""
    corners = [*zip(edges, [*before, 0], strict=True), *zip(edges, [*after, 0], strict=True)]
    frame = _Frame.around(corners, margin=(0, 0), base=0.0)
    bars = []
    for kind, counts in (("after", after), ("before", before)):
        for left, right, count in zip(edges, edges[1:], counts, strict=False):
            if count:
                x0, y0, width = frame.x(left), frame.y(count), round(frame.x(right) - frame.x(left), 1)
                height = round(frame.y(0) - y0, 1)
                bars.append(f'<rect class="{kind}" x="{x0}" y="{y0}" width="{width}" height="{height}"/>')
    return _svg(frame.axes(x, "weights") + "".join(bars), f"histogram of {x}")


def marks(drawn: Sequence[Mark], x: str, y: str, *, level: float | None = None) -> str:
    """Points with error bars, a series joined in the order of x; `level` draws a line across. Empty without points."""
    if not drawn:
        return ""
    reach = [(mark.x, mark.y + sign * mark.spread) for mark in drawn for sign in (-1, 1)]
    reach += [] if level is None else [(drawn[0].x, level)]
    frame = _Frame.around(reach, margin=(0.05, 0.05))
    shapes = [] if level is None else [frame.level(level)]
    for series in sorted({mark.series for mark in drawn}):
        joined = sorted((mark for mark in drawn if mark.series == series), key=lambda mark: mark.x)
        path = " ".join(f"{frame.x(mark.x)},{frame.y(mark.y)}" for mark in joined)
        shapes.append(f'<g class="s{series % 8}"><polyline class="line" points="{path}"/>')
        for mark in joined:
            a, low, high = frame.x(mark.x), frame.y(mark.y - mark.spread), frame.y(mark.y + mark.spread)
            if mark.spread:
                shapes.append(f'<line class="spread" x1="{a}" x2="{a}" y1="{low}" y2="{high}"/>')
            dot = f'<circle cx="{a}" cy="{frame.y(mark.y)}" r="4">'
            shapes.append(f"{dot}<title>{escape(mark.name)}</title></circle>")
        shapes.append("</g>")
    return _svg(frame.axes(x, y) + "".join(shapes), f"{y} over {x}")


def _svg(shapes: str, label: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label, quote=True)}">{shapes}</svg>'


def _colour(tone: float) -> str:
    return f"hsl({250 - 230 * tone:.0f} 65% var(--tone))"


def _range(low: float, high: float) -> tuple[float, float]:
    """(low, high), or a range around them where both are the same but for rounding errors."""
    least = 1e-12 * max(abs(low), abs(high))
    if high - low > least:
        return low, high
    half = max(0.5, 1e3 * least)
    return low - half, high + half


def _ticks(low: float, high: float) -> list[float]:
    """Round values, five or so, from low to high."""
    raw = (high - low) / 5
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * k for k in (1, 2, 5, 10) if power * k >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _labels(ticks: Sequence[float]) -> list[tuple[float, str]]:
    """(value, label) of ticks, with as many digits as tell neighbours apart."""
    largest = max(map(abs, ticks), default=0) or 1
    step = min((b - a for a, b in itertools.pairwise(ticks)), default=largest)
    power, letter = next((power, letter) for least, power, letter in _LARGE if largest >= least)
    needed = math.floor(math.log10(largest / step * (1 + 1e-9))) + 2, math.floor(math.log10(largest / power)) + 1, 3
    digits = min(max(needed), 15)
    values = [(tick, 0.0 if abs(tick) < step / 2 else tick / power) for tick in ticks]
    return [(tick, f"{_plain(value, digits)}{letter if value else ''}") for tick, value in values]


def _plain(value: float, digits: int) -> str:
    """A number without an exponent, unless it needs more than nine decimals.

    >>> _plain(0.000025, 3), _plain(90.0, 3)
    ('0.000025', '90')
    """
    text = f"{value:.{digits}g}"
    if "e-" not in text or abs(value) < 1e-7:
        return text
    return f"{value:.{digits + 8}f}".rstrip("0")


_LARGE = ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k"), (0, 1, ""))  # from, power, letter
