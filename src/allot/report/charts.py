"""Charts as SVG that stands in a page: lines, histograms, points with error bars. Colours are the page's, by class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 250
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 10, 40


@dataclass(frozen=True)
class Line:
    """Points joined by a line.

    Attributes:
        name: shown where the pointer rests on it.
        tone: from 0 to 1, a place in the page's range of colours; None: the page's accent.
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
    def around(cls, points: Sequence[tuple[float, float]], *, from_zero: bool = False) -> _Frame:
        xs, ys = [x for x, _ in points], [y for _, y in points]
        low, high = (min(xs), 0.0 if from_zero else min(ys)), (max(xs), max(ys))
        air = 0 if from_zero else 0.05 * (high[1] - low[1])
        wide = tuple((a, b) if b > a else (a - 0.5, b + 0.5) for a, b in zip(low, high, strict=True))
        return cls((wide[0][0], wide[1][0] - air), (wide[0][1], wide[1][1] + air))

    def x(self, value: float) -> float:
        share = (value - self.low[0]) / (self.high[0] - self.low[0])
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        share = (value - self.low[1]) / (self.high[1] - self.low[1])
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)

    def across(self, value: float) -> str:
        at = self.y(value)
        return f'<line class="limit" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>'

    def axes(self, x: str, y: str) -> str:
        parts = []
        for value in _ticks(self.low[0], self.high[0]):
            at = self.x(value)
            parts.append(f'<line class="grid" x1="{at}" x2="{at}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
            parts.append(f'<text x="{at}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{_short(value)}</text>')
        for value in _ticks(self.low[1], self.high[1]):
            at = self.y(value)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{at + 4}" text-anchor="end">{_short(value)}</text>')
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x)}</text>')
        turned = f'transform="rotate(-90)" x="{-(TOP + HEIGHT - BOTTOM) / 2}" y="13" text-anchor="middle"'
        return "".join([*parts, f"<text {turned}>{escape(y)}</text>"])


def lines(some: Sequence[Line], x: str, y: str, *, limit: float | None = None) -> str:
    """Lines over one another; `limit` draws a level across. Empty where there is nothing to draw."""
    points = [p for line in some for p in line.points if math.isfinite(p[1])]
    if not points:
        return ""
    frame = _Frame.around([*points, *([(points[0][0], limit)] if limit is not None else [])])
    drawn = []
    for line in some:
        path = " ".join(f"{frame.x(a)},{frame.y(b)}" for a, b in line.points if math.isfinite(b))
        colour = "" if line.tone is None else f' style="stroke:{_hue(line.tone)}"'
        drawn.append(f'<polyline class="line" points="{path}"{colour}><title>{escape(line.name)}</title></polyline>')
    if limit is not None:
        drawn.append(frame.across(limit))
    return _svg(frame.axes(x, y) + "".join(drawn), f"{y} over {x}")


def legend(some: Sequence[Line]) -> str:
    """The names of lines, a dot in the colour of each before it."""
    dots = (f'<span class="dot" style="background:{_hue(line.tone or 0)}"></span>{escape(line.name)}' for line in some)
    return "; ".join(dots) + ". "


def histogram(edges: Sequence[float], before: Sequence[int], after: Sequence[int], x: str) -> str:
    """Two counts over the same bins: before as an outline, after filled."""
    top = [*zip(edges, [*before, 0], strict=True), *zip(edges, [*after, 0], strict=True)]
    frame = _Frame.around(top, from_zero=True)
    bars = []
    for kind, counts in (("after", after), ("before", before)):
        for left, right, count in zip(edges, edges[1:], counts, strict=False):
            if count:
                at, width = frame.x(left), round(frame.x(right) - frame.x(left), 1)
                tall = round(frame.y(0) - frame.y(count), 1)
                bars.append(f'<rect class="{kind}" x="{at}" y="{frame.y(count)}" width="{width}" height="{tall}"/>')
    return _svg(frame.axes(x, "weights") + "".join(bars), f"histogram of {x}")


def marks(some: Sequence[Mark], x: str, y: str, *, level: float | None = None) -> str:
    """Points with error bars, a series joined in the order of x; `level` draws a line across. Empty without points."""
    if not some:
        return ""
    at_level = [] if level is None else [(some[0].x, level)]
    frame = _Frame.around([*((m.x, m.y + sign * m.spread) for m in some for sign in (-1, 1)), *at_level])
    drawn = [] if level is None else [frame.across(level)]
    for series in sorted({mark.series for mark in some}):
        own = sorted((mark for mark in some if mark.series == series), key=lambda mark: mark.x)
        path = " ".join(f"{frame.x(mark.x)},{frame.y(mark.y)}" for mark in own)
        drawn.append(f'<g class="s{series % 8}"><polyline class="line" points="{path}"/>')
        for mark in own:
            a, low, high = frame.x(mark.x), frame.y(mark.y - mark.spread), frame.y(mark.y + mark.spread)
            if mark.spread:
                drawn.append(f'<line class="spread" x1="{a}" x2="{a}" y1="{low}" y2="{high}"/>')
            dot = f'<circle cx="{a}" cy="{frame.y(mark.y)}" r="4">'
            drawn.append(f"{dot}<title>{escape(mark.name)}</title></circle>")
        drawn.append("</g>")
    return _svg(frame.axes(x, y) + "".join(drawn), f"{y} over {x}")


def _svg(inside: str, said: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(said, quote=True)}">{inside}</svg>'


def _hue(tone: float) -> str:
    return f"hsl({250 - 230 * tone:.0f} 65% var(--tone))"


def _ticks(low: float, high: float) -> list[float]:
    """Round values, five or so, from low to high."""
    raw = (high - low) / 5
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * k for k in (1, 2, 5, 10) if power * k >= raw)
    first = math.ceil(low / step)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _short(value: float) -> str:
    if abs(value) >= 10_000:
        power, letter = next((p, c) for p, c in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if abs(value) >= p)
        return f"{value / power:g}{letter}"
    return f"{round(value, 10):g}"
