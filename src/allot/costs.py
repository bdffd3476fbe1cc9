"""What one layer costs, by kind of budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from numbers import Real
from typing import Any

from allot.errors import BudgetError, UsageError


@dataclass(frozen=True)
class Term:
    """What one layer adds to every cost.

    Attributes:
        total: weights in the layer.
        lower, upper: fewest and most weights that rules, floor and pattern allow; multiples of `step`.
        step: the layer keeps whole multiples of this many weights (1 unless a pattern says more).
        macs: dense multiply-accumulates of the layer for one example; None where they were not measured.
        dense_bytes, mask_bytes, value_bytes: size in a file stored dense, and stored as a bit mask plus
            `value_bytes` per kept weight; the smaller of the two counts.
    """

    name: str
    total: int
    lower: int = 1
    upper: int = -1
    step: int = 1
    macs: int | None = None
    dense_bytes: int = 0
    mask_bytes: int = 0
    value_bytes: int = 0

    def __post_init__(self) -> None:
        if self.total < 1:
            raise BudgetError(f"{self.name}: {self.total} weights; a layer of at least 1 weight is accepted.")
        if self.upper < 0:
            object.__setattr__(self, "upper", self.total)
        if not 0 <= self.lower <= self.upper <= self.total:
            raise BudgetError(
                f"{self.name}: its rules ask for at least {self.lower:,} and at most {self.upper:,} "
                f"of {self.total:,} weights. Lower the floor or raise the maximum density."
            )


def _price_bytes(term: Term, kept: Any) -> Any:
    return min(term.dense_bytes, term.mask_bytes + kept * term.value_bytes)


def _price_macs(term: Term, kept: int) -> int | Fraction:
    whole, part = divmod(kept * (term.macs or 0), term.total)
    return whole + Fraction(part, term.total) if part else whole


# cost of `kept` weights of one layer, exact
PRICES: dict[str, Callable[[Term, int], Any]] = {
    "sparsity": lambda term, kept: kept,
    "params": lambda term, kept: kept,
    "macs": _price_macs,
    "bytes": _price_bytes,
}
# the same for real numbers
REAL_PRICES: dict[str, Callable[[Term, float], float]] = {
    "sparsity": lambda term, kept: kept,
    "params": lambda term, kept: kept,
    "macs": lambda term, kept: kept * (term.macs or 0) / term.total,
    "bytes": _price_bytes,
}


def corners(term: Term) -> tuple[float, ...]:
    """Where the cost of a layer stops being linear in what is kept: its bounds, and where dense is smaller."""
    dense_from = (term.dense_bytes - term.mask_bytes) / term.value_bytes if term.value_bytes else 0
    return term.lower, min(max(dense_from, term.lower), term.upper), term.upper


def shares(wished: Mapping[str, float], terms: Iterable[Term], of: str) -> dict[str, float]:
    """What is wished of each term, in its own units, the largest density as 1; never exactly 0.

    A layer wished away still takes what full layers cannot.

    Args:
        of: what terms are called in an error.
    Raises:
        UsageError: a term is missing, unknown, negative or nan.
    """
    total = {term.name: term.total for term in terms}
    if wished.keys() != total.keys():
        raise UsageError(f"an allocation for other {of}: {_difference(wished.keys(), total.keys())}")
    for name, value in wished.items():
        if not (isinstance(value, Real) and value >= 0 and math.isfinite(value)):
            raise UsageError(f"density of {name} is {value!r}: a finite number, 0 or more, is accepted.")
    top = max(wished.values()) or 1.0
    return {name: max(wished[name] / top, 1e-12) * n for name, n in total.items()}


def _difference(given: Any, expected: Any) -> str:
    surplus, missing = sorted(set(given) - set(expected)), sorted(set(expected) - set(given))
    parts = [f"unknown {', '.join(surplus[:5])}"] if surplus else []
    parts += [f"missing {', '.join(missing[:5])}"] if missing else []
    more = max(len(surplus) - 5, 0) + max(len(missing) - 5, 0)
    return "; ".join(parts) + (f" (and {more} more)" if more else "") + "."
