"""Bisection over floats; for whole numbers there is `bisect` in the standard library."""

from __future__ import annotations

from collections.abc import Callable


def bracket(holds: Callable[[float], bool], low: float, high: float, *, rounds: int = 200) -> tuple[float, float]:
    """The last number from `low` to `high` for which a condition holds, and the first for which it does not.

    Args:
        holds: the condition: true up to a number, false above it; assumed true at `low` and false at `high`.
        rounds: halvings at most; with 200 the two are neighbours among floats.

    >>> bracket(lambda x: x * x <= 2, 0.0, 2.0)
    (1.414213562373095, 1.4142135623730951)
    """
    for _ in range(rounds):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low, high


def largest(fits: Callable[[float], bool], most: float) -> float:
    """The largest number from 0 to `most` that fits, to float precision; 0 where none does.

    >>> largest(lambda x: x <= 0.25, 1.0)
    0.25
    """
    return most if fits(most) else bracket(fits, 0.0, most)[0]
