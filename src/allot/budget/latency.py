"""How long a model takes without the channels that were removed, from tables that were measured (no torch).

    T(n) = b + s sum_l T_l(r_l(n), c_l(n)) + m M(n)        nanoseconds a batch

    n            channels kept of each group
    r_l, c_l     first two sides of the weight of layer l;  T_l its measured times on a grid of sides
    M            numbers in the outputs of all layers: what everything between them has to read and write
    b, s, m      fitted to whole nets that were measured; none is negative, so that T is above 0

Between the points of a grid T_l is bilinear. Measured tables are made `monotone`: T grows with every n, and a limit of
time is met like any other limit.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from allot.errors import UsageError

Sides = tuple[float, float]


@dataclass(frozen=True)
class LayerTimes:
    """Nanoseconds of one layer by the sides of its weight.

    Attributes:
        layer: name of the weight.
        rows, columns: the sides that were measured, ascending, one or more each.
        times: one tuple a row side.
        out: the side that counts outputs, 0 or 1.
        places: numbers that one output channel consists of, in a batch.
    """

    layer: str
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    times: tuple[tuple[float, ...], ...]
    out: int
    places: int

    def __post_init__(self) -> None:
        grid = [len(row) for row in self.times] == [len(self.columns)] * len(self.rows) != []
        grows = all(a < b for sides in (self.rows, self.columns) for a, b in itertools.pairwise(sides))
        finite = all(math.isfinite(time) and time >= 0 for row in self.times for time in row)
        if not (grid and self.columns and grows and finite and self.out in (0, 1) and self.places >= 0):
            raise ValueError(f"{self.layer}: times of another grid, or no times")

    def at(self, sides: Sides) -> tuple[float, Sides]:
        """(T_l, its slope by each side)."""
        i, u, wide = _between(self.rows, sides[0])
        j, v, high = _between(self.columns, sides[1])
        lower, upper = self.times[i], self.times[i + 1 if wide else i]
        k = j + 1 if high else j
        before = lower[j] + v * (lower[k] - lower[j])
        after = upper[j] + v * (upper[k] - upper[j])
        across = (1 - u) * (lower[k] - lower[j]) + u * (upper[k] - upper[j])
        return before + u * (after - before), ((after - before) / wide if wide else 0.0, across / high if high else 0.0)


@dataclass(frozen=True)
class Latency:
    """Nanoseconds of a whole model: see the top of this file.

    Attributes:
        runtime, batch: the runtime that was timed, and samples in a batch.
        layers: the tables.
        base, scale, traffic: b, s and m.
        dense: nanoseconds of the whole model, as measured.
        off: the largest relative error of the fit among the nets that it was fitted to.
        slow: factor on the fit, so that it is right for one net that was measured.
    """

    runtime: str
    batch: int
    layers: tuple[LayerTimes, ...]
    base: float
    scale: float
    traffic: float
    dense: int
    off: float = 0.0
    slow: float = 1.0

    def __post_init__(self) -> None:
        finite = all(map(math.isfinite, (self.base, self.scale, self.traffic, self.off)))
        if not (finite and min(self.scale, self.traffic) >= 0 < min(self.slow, self.dense) < math.inf and self.layers):
            raise ValueError("figures that are none of a clock")

    def of(self, sides: Mapping[str, Sides]) -> tuple[float, dict[str, Sides]]:
        """(T, its slope by the two sides of every layer), for these sides of the weights."""
        total, slopes = self.slow * self.base, {}
        scale, traffic = self.slow * self.scale, self.slow * self.traffic
        for layer in self.layers:
            pair = sides[layer.layer]
            time, (by_row, by_column) = layer.at(pair)
            total += scale * time + traffic * layer.places * pair[layer.out]
            slopes[layer.layer] = (
                scale * by_row + traffic * layer.places * (layer.out == 0),
                scale * by_column + traffic * layer.places * (layer.out == 1),
            )
        return total, slopes

    def slowed(self, factor: float) -> Latency:
        """The same tables with `slow` replaced by `factor`; the time of the dense model stays."""
        return replace(self, slow=factor)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: Any) -> Latency:
        """The inverse of `to_json`.

        Raises:
            UsageError: the content is not a table of latencies.
        """
        try:
            layers = tuple(
                LayerTimes(
                    str(layer["layer"]),
                    tuple(map(int, layer["rows"])),
                    tuple(map(int, layer["columns"])),
                    tuple(tuple(map(float, row)) for row in layer["times"]),
                    int(layer["out"]),
                    int(layer["places"]),
                )
                for layer in content["layers"]
            )
            base, scale, traffic, off, slow = (
                float(content[name]) for name in ("base", "scale", "traffic", "off", "slow")
            )
            runtime, batch = str(content["runtime"]), int(content["batch"])
            return cls(runtime, batch, layers, base, scale, traffic, int(content["dense"]), off, slow)
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise UsageError(f"no table of latencies: {type(error).__name__} {error}.") from error


def monotone(times: list[list[float]]) -> tuple[tuple[float, ...], ...]:
    """The table made to grow along both sides: the mean of the lowest such table above it and the highest below.

    >>> monotone([[1.0, 3.0, 2.0]])
    ((1.0, 2.5, 2.5),)
    """
    above, below = [list(row) for row in times], [list(row) for row in times]
    height, width = len(times), len(times[0])
    for i in range(height):
        for j in range(width):
            before = ([above[i - 1][j]] if i else []) + ([above[i][j - 1]] if j else [])
            above[i][j] = max(above[i][j], *before) if before else above[i][j]
    for i in reversed(range(height)):
        for j in reversed(range(width)):
            after = ([below[i + 1][j]] if i + 1 < height else []) + ([below[i][j + 1]] if j + 1 < width else [])
            below[i][j] = min(below[i][j], *after) if after else below[i][j]
    return tuple(tuple((a + b) / 2 for a, b in zip(*rows, strict=True)) for rows in zip(above, below, strict=True))


def _between(grid: tuple[int, ...], side: float) -> tuple[int, float, int]:
    """(index of the point below, fraction of the way to the next, distance of the two); the ends are extrapolated."""
    if len(grid) == 1:
        return 0, 0.0, 0
    i = min(max(bisect_right(grid, side) - 1, 0), len(grid) - 2)
    apart = grid[i + 1] - grid[i]
    return i, (side - grid[i]) / apart, apart
