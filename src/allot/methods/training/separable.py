"""Errors of layers that add up: the densities that minimise their sum within a budget.

Each curve is replaced by its lower convex hull, whose slopes are the error that one unit of cost more saves. Slopes are
taken from the steepest down until the budget is used up: the optimum of the hulls (the multiple-choice knapsack
relaxed).
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from allot.budget.model_budget import ModelBudget
from allot.errors import UsageError, check_number

Curve = list[Sequence[float]]  # [density, error], densities ascending


def grid(densities: Any) -> tuple[float, ...]:
    """The densities at which curves are measured, checked.

    Raises:
        UsageError: no numbers that ascend from 0 and end below 1.
    """
    values = tuple(densities) if isinstance(densities, list | tuple) else (densities,)
    for value in values:
        check_number("densities", value, 0, 1)
    if list(values) != sorted(set(values)) or values[:1] != (0,) or values[-1] == 1:
        raise UsageError(f"densities={list(values)}: ascending from 0, below 1, is accepted.")
    return values


def best_densities(budget: ModelBudget, error: Mapping[str, Curve]) -> dict[str, float]:
    """Densities that minimise the sum of the curves' lower hulls within the budget.

    Args:
        error: layer -> [[density, error], ...], densities ascending from the floor; a whole layer has error 0.
    """
    terms = {term.name: term for term in budget.terms}
    kept = {name: term.lower for name, term in terms.items()}
    price = budget.prices(kept)

    def breaks(name: str, k: int) -> bool:
        return not budget.fits(kept | {name: k})

    pieces = []
    for name, term in terms.items():
        hull = lower_hull([*error[name], *([[1.0, 0.0]] if term.upper == term.total else [])])
        for (d, e), (more, less) in itertools.pairwise(hull):
            saved = (e - less) / max((more - d) * term.total * price[name], 1e-12)
            pieces.append((-saved, name, math.ceil(more * term.total / term.step) * term.step))
    for _, name, more in sorted(pieces):
        steps = range(kept[name], more + 1, terms[name].step)
        fitting = bisect_left(steps, True, key=partial(breaks, name))
        kept[name] = steps[max(fitting - 1, 0)]
        if fitting < len(steps):
            break
    return {name: kept[name] / terms[name].total for name in terms}


def lower_hull(points: Iterable[Sequence[float]]) -> Curve:
    """The lower convex hull of points (x, y) with ascending x; of equal x the first counts.

    >>> lower_hull([(0, 4), (1, 3), (2, 0)])
    [[0, 4], [2, 0]]
    """
    hull: Curve = []
    for x, y in points:
        if hull and x <= hull[-1][0]:
            continue
        while len(hull) > 1 and _above(hull[-2], hull[-1], [x, y]):
            hull.pop()
        hull.append([x, y])
    return hull


def _above(a: Sequence[float], b: Sequence[float], c: Sequence[float]) -> bool:
    """Whether b lies on or above the line from a to c."""
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])
