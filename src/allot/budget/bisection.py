"""Where a rule stops to hold, by halving; of whole numbers `bisect` of the standard library does it."""

from __future__ import annotations

from collections.abc import Callable


def bracket(holds: Callable[[float], bool], low: float, high: float, *, rounds: int = 200) -> tuple[float, float]:
    """The last number from `low` to `high` where a rule holds, and the first where it does not.

    Args:
        holds: true up to some number, false above it; taken to hold at `low` and not to hold at `high`.
        rounds: halvings at the most; with 200 the two are neighbours among floats.

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
    """The largest number from 0 to `most` that fits, to float precision; 0 where none does."""
    return most if fits(most) else bracket(fits, 0.0, most)[0]
