"""What one layer costs, for each kind of budget."""

from __future__ import annotations

import itertools
import math
import sys
from bisect import bisect_left
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
        dense_bytes, value_bytes: size in a file stored dense, and per kept weight beside the mask (`mask_bytes`);
            the smaller of the two counts.
    """

    name: str
    total: int
    lower: int = 1
    upper: int = -1
    step: int = 1
    macs: int | None = None
    dense_bytes: int = 0
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


def mask_bits(total: int, kept: float) -> float:
    """Size in bits of the smallest mask of `kept` of `total`: one bit a weight, or positions.

    The lowest l bits of a position are stored as they are. The higher bits are stored in unary, as the difference from
    those of the position before (Elias 1974, Fano 1971):

        bits(l) = kept (l + 1) + floor((total - 1) / 2^l) + 1

    Of a quarter kept or less, that is at most 0.76 kept + 3 above the entropy of the mask (`mask_entropy`); at low
    densities 0.56 kept.
    """
    return min(total, _position_bits(total, kept, low_bits(total, kept)))


def mask_entropy(total: int, kept: int) -> float:
    """Bits of an ideal mask of `kept` of `total`: total H(kept / total), H the entropy of a coin in bits.

    >>> mask_entropy(8, 4)
    8.0
    """
    density = kept / total
    return -total * sum(p * math.log2(p) for p in (density, 1 - density) if p)


def low_bits(total: int, kept: float) -> int:
    """The l of `mask_bits` with which positions take the fewest bits; of equal ones the lowest."""
    guess = max(int(total / max(kept, 1)).bit_length() - 1, 0)  # bits(l) is convex, its minimum at most one away
    return min(range(max(guess - 1, 0), guess + 2), key=lambda low: _position_bits(total, kept, low))


def _position_bits(total: int, kept: float, low: int) -> float:
    return kept * (low + 1) + ((total - 1) >> low) + 1


def _price_bytes(term: Term, kept: int) -> int:
    return min(term.dense_bytes, -(-int(mask_bits(term.total, kept)) // 8) + kept * term.value_bytes)


def _real_price_bytes(term: Term, kept: float) -> float:
    return min(term.dense_bytes, mask_bits(term.total, kept) / 8 + kept * term.value_bytes)


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
    "bytes": _real_price_bytes,
}


def breakpoints(term: Term) -> tuple[float, ...]:
    """Numbers of kept weights between which the cost of a layer is linear: bounds, and where its storage changes."""
    points: list[float] = []
    if term.value_bytes:
        # (bytes of no weight, bytes of one more): a mask of one bit a weight, and of positions
        bitmap = (term.total / 8, float(term.value_bytes))
        positions = [
            (_position_bits(term.total, 0, low) / 8, term.value_bytes + (low + 1) / 8)
            for low in range(term.total.bit_length() + 1)
        ]
        pairs = [*itertools.pairwise(positions), *((line, bitmap) for line in positions)]
        points += [(b - a) / (more_a - more_b) for (a, more_a), (b, more_b) in pairs]
        points += [(term.dense_bytes - a) / more for a, more in (bitmap, *positions)]
    return term.lower, *(kept for kept in points if term.lower < kept < term.upper), term.upper


class Ledger:
    """Running costs while weights are handed out; changes `kept` in place.

    Args:
        ceilings: kind -> the most that all layers may cost.
        kept: layer -> weights at the start.
    """

    def __init__(self, terms: Iterable[Term], ceilings: Mapping[str, int], kept: dict[str, int]) -> None:
        self.kept = kept
        self.left = {
            kind: Fraction(ceiling) - sum(PRICES[kind](term, kept[term.name]) for term in terms)
            for kind, ceiling in ceilings.items()
        }

    def fits(self) -> bool:
        return all(left >= 0 for left in self.left.values())

    def add(self, term: Term, steps: int) -> None:
        """Keep so many steps more of a layer; fewer where `steps` is negative."""
        before = self.kept[term.name]
        self.kept[term.name] = before + steps * term.step
        for kind in self.left:
            self.left[kind] -= PRICES[kind](term, self.kept[term.name]) - PRICES[kind](term, before)

    def room(self, term: Term) -> int:
        """How many more steps of a layer every limit allows."""
        kept = self.kept[term.name]
        costs = {kind: PRICES[kind](term, kept) for kind in self.left}

        def breaks(steps: int) -> bool:
            new = kept + steps * term.step
            return any(PRICES[kind](term, new) - costs[kind] > left for kind, left in self.left.items())

        most = (term.upper - kept) // term.step
        # one step first: most layers have no room left
        return 0 if not most or breaks(1) else bisect_left(range(most + 1), True, lo=1, key=breaks) - 1


def proportions(wished: Mapping[str, float], terms: Iterable[Term], noun: str) -> dict[str, float]:
    """Weights or channels of each term in proportion to the wished densities; the largest density becomes 1.

    No number is exactly 0: a layer with density 0 still takes the weights for which full layers have no room.

    Args:
        noun: what terms are called in an error.
    Raises:
        UsageError: a term is missing, unknown, negative or nan.
    """
    total = {term.name: term.total for term in terms}
    if wished.keys() != total.keys():
        raise UsageError(f"an allocation for other {noun}: {_different_names(wished, total)}")
    for name, value in wished.items():
        if not (isinstance(value, Real) and 0 <= value <= sys.float_info.max):
            raise UsageError(f"density of {name} is {value!r}: a finite number, 0 or more, is accepted.")
    top = max(wished.values()) or 1.0
    return {name: max(wished[name] / top, 1e-12) * n for name, n in total.items()}


def _different_names(names: Iterable[str], expected: Iterable[str]) -> str:
    surplus, missing = sorted(set(names) - set(expected)), sorted(set(expected) - set(names))
    parts = [f"unknown {', '.join(surplus[:5])}"] if surplus else []
    parts += [f"missing {', '.join(missing[:5])}"] if missing else []
    more = max(len(surplus) - 5, 0) + max(len(missing) - 5, 0)
    return "; ".join(parts) + (f" (and {more} more)" if more else "") + "."
