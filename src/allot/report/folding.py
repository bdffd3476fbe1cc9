"""Layers that are alike in repeated blocks, in one row of a table."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

Report = Mapping[str, Any]


def folded(layers: Sequence[Report]) -> list[tuple[str, list[Report]]]:
    """(name, layers) of every row: three layers or more that are alike but for one number in their names share a row.

    Alike: of one size, with the same MACs and as many weights kept, but for the one weight by which rounding parts
    them. In the name of the row `*` stands for the number where all layers of such names share it, else the numbers.
    Blocks within blocks fold twice.

    >>> rows = [{"name": f"h.{i}.up", "kept": 5 + (i > 1), "total": 9, "macs": None} for i in range(4)]
    >>> [(name, len(alike)) for name, alike in folded([*rows, {**rows[0], "name": "h.4.up", "kept": 9}])]
    [('h.0-3.up', 4), ('h.4.up', 1)]
    """
    rows = [(tuple(layer["name"].split(".")), [layer]) for layer in layers]
    for place in range(max((len(parts) for parts, _ in rows), default=0)):
        rows = _folded_at(place, rows)
    names = [layer["name"].split(".") for layer in layers]
    return [(".".join(_starred(parts, len(alike), names)), alike) for parts, alike in rows]


def _folded_at(
    place: int, rows: Sequence[tuple[tuple[str, ...], list[Report]]]
) -> list[tuple[tuple[str, ...], list[Report]]]:
    """The rows, folded over the number at one place of their names."""
    by_name: dict[tuple[Any, ...], list[int]] = {}  # the name without the number -> rows
    for i, (parts, _) in enumerate(rows):
        if len(parts) > place and parts[place].isdigit():
            by_name.setdefault((parts[:place], parts[place + 1 :]), []).append(i)
    first_of: dict[int, tuple[tuple[str, ...], list[Report]]] = {}  # a row -> the row that it becomes
    gone: set[int] = set()
    for same_name in by_name.values():
        for alike in _alike([rows[i][1] for i in same_name]):
            indices = [same_name[j] for j in alike]
            if len(indices) >= 3:
                parts = rows[indices[0]][0]
                numbers = [int(rows[i][0][place]) for i in indices]
                row = (*parts[:place], _ranges(numbers), *parts[place + 1 :])
                first_of[indices[0]] = row, [layer for i in indices for layer in rows[i][1]]
                gone.update(indices[1:])
    return [first_of.get(i, row) for i, row in enumerate(rows) if i not in gone]


def _starred(parts: tuple[str, ...], count: int, names: Sequence[list[str]]) -> list[str]:
    """The parts of a row's name with `*` for its numbers, where its `count` layers are all of such names."""
    if count == 1:
        return list(parts)
    starred = ["*" if not part.isdigit() and re.fullmatch(r"[\d,-]+", part) else part for part in parts]
    such = sum(
        len(name) == len(starred)
        and all(part.isdigit() if star == "*" else part == star for part, star in zip(name, starred, strict=True))
        for name in names
    )
    return starred if such == count else list(parts)


def _alike(groups: Sequence[list[Report]]) -> list[list[int]]:
    """Places of the groups, together where their layers have the same sizes and keep as much, to one weight."""
    clusters: list[tuple[Any, int, int, list[int]]] = []  # sizes, fewest and most kept, places
    for i, layers in enumerate(groups):
        sizes = sorted((layer["total"], layer.get("macs") or 0) for layer in layers)
        fewest, most = (pick(layer["kept"] for layer in layers) for pick in (min, max))
        for j, (other, low, high, places) in enumerate(clusters):
            if other == sizes and max(high, most) - min(low, fewest) <= 1:
                clusters[j] = other, min(low, fewest), max(high, most), [*places, i]
                break
        else:
            clusters.append((sizes, fewest, most, [i]))
    return [places for *_, places in clusters]


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers in short.

    >>> _ranges([1, 2, 3, 5])
    '1-3,5'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
