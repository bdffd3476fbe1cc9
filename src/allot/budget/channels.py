"""Budgets of channels: the limits of single weights, with costs that are multilinear in channels (no torch).

A tensor whose dimensions hold channels of groups has, when n_g channels of each group g are kept,

    size(n) = rest * prod_d ( fixed_d + sum_g r_gd n_g )

places. Weights are the sizes of the layers in scope; MACs are sizes times uses; bytes are sizes of all tensors times
the size of a number, plus the header of the file; latency is read off tables (`allot.budget.latency`). Every cost grows
with every n_g, so that along n(c) = clip(c wished) the largest c that fits is found by bisection; the rest is handed
out channel by channel until none fits.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from allot.budget import model_budget
from allot.budget.bisection import largest
from allot.budget.budget import Budget
from allot.budget.costs import Term, proportions
from allot.budget.latency import Latency
from allot.budget.model_budget import Limit, ModelBudget
from allot.errors import BudgetError, UsageError

Dimension = tuple[int, tuple[tuple[str, int], ...]]  # places of no group, (group, places a channel)


@dataclass(frozen=True)
class Extent:
    """The size of one tensor as channels are removed: see the top of this file.

    Attributes:
        uses: multiply-accumulates a place; 0 where the tensor belongs to no layer in scope.
        counted: whether its places are weights in scope.
        place_bytes: bytes a place takes in a file.
    """

    name: str
    rest: int
    dims: tuple[Dimension, ...]
    uses: Fraction = Fraction(0)
    counted: bool = False
    place_bytes: int = 4

    def size(self, kept: Mapping[str, Any]) -> Any:
        """Remaining places: a whole number for whole numbers of channels; any arithmetic type is accepted."""
        size: Any = self.rest
        for side in self.sides(kept):
            size = size * side
        return size

    def sides(self, kept: Mapping[str, Any]) -> list[Any]:
        """Length of the tensor along each dimension."""
        return [fixed + sum(each * kept[name] for name, each in groups) for fixed, groups in self.dims]


@dataclass(frozen=True)
class ChannelBudget(ModelBudget):
    """A budget tied to the channels of one model: `kept` counts the channels of each group.

    Args:
        weights: the budget tied to the weights of the model, which has the limits.
        terms: one for each group; `total` counts channels, and `step` those that are removed together.
        extents: every tensor of the model.
        header: bytes of a file beside its tensors.
        latency: tables of times, where time is limited.
        factor: see `widened`.
    Raises:
        BudgetError: even the floors cost more than a limit.
    """

    weights: Budget
    terms: tuple[Term, ...]
    extents: tuple[Extent, ...]
    header: int = 0
    latency: Latency | None = None
    factor: float = 1.0

    def __post_init__(self) -> None:
        if not self.terms:
            raise BudgetError("no channels can be removed from this model.")
        model_budget.check_floors(self, "the fewest channels that rules and model allow need")

    @property
    def asked(self) -> dict[str, float | int | str]:
        return self.weights.asked

    @property
    def total(self) -> int:
        return self.weights.total

    @property
    def limits(self) -> tuple[Limit, ...]:
        return model_budget.widened(self.weights.limits, self.factor, self, self.header)

    def widened(self, factor: float) -> ChannelBudget:
        return replace(self, factor=factor)

    @property
    def widest(self) -> float:
        return model_budget.widest(self.weights.limits, self, self.header)

    def with_limits(self, limits: Mapping[str, float | int | str]) -> ChannelBudget:
        return replace(self, weights=self.weights.with_limits(limits))

    def sizes(self, kept: Mapping[str, int]) -> dict[str, int]:
        """Remaining weights of each layer in scope."""
        return {extent.name: int(extent.size(kept)) for extent in self.extents if extent.counted}

    def cost(self, kind: str, kept: Mapping[str, int]) -> int:
        """What the kept channels of all groups cost: weights, MACs, bytes or nanoseconds, rounded up."""
        return math.ceil(self.real_cost(kind, kept))

    def real_cost(self, kind: str, kept: Mapping[str, Any]) -> Any:
        """`cost` of real numbers of channels, not rounded; tensors of numbers are accepted too."""
        if kind == "bytes":
            return self.header + sum(extent.size(kept) * extent.place_bytes for extent in self.extents)
        if kind == "latency":
            return self.time(kept)[0]
        counted = (extent for extent in self.extents if extent.counted)
        if kind == "macs":
            return sum(_scaled(extent.size(kept), extent.uses) for extent in counted)
        assert kind in ("sparsity", "params"), kind  # a new kind has a branch of its own
        return sum(extent.size(kept) for extent in counted)

    def time(self, kept: Mapping[str, float]) -> tuple[float, dict[str, float]]:
        """(nanoseconds by the tables, their slope by the channels of each group).

        Raises:
            BudgetError: there are no tables.
        """
        if self.latency is None:
            raise BudgetError("nothing was timed: a budget of latency brings its tables.")
        by_name = {extent.name: extent for extent in self.extents}
        sides = {}
        for layer in self.latency.layers:
            first, second, *_ = by_name[layer.layer].sides(kept)
            sides[layer.layer] = (first, second)
        total, by_side = self.latency.of(sides)
        slope = {term.name: 0.0 for term in self.terms}
        for name, pair in by_side.items():
            for side, (_, groups) in zip(pair, by_name[name].dims, strict=False):  # kernels have more dimensions
                for group, each in groups:
                    slope[group] += each * side
        return total, slope

    def slowed(self, factor: float) -> ChannelBudget:
        """This budget with every time of the tables multiplied by `factor`; the limits stay.

        Args:
            factor: above 0, measured on a whole net; it replaces an earlier factor.
        """
        assert self.latency is not None  # called only where time is limited
        slower = copy.copy(self)  # not `replace`: a budget that nothing meets is an answer here
        object.__setattr__(slower, "latency", self.latency.slowed(factor))
        return slower

    def fits(self, kept: Mapping[str, int]) -> bool:
        return self.fits_real(kept)

    def height(self, kept: Mapping[str, float]) -> float:
        """The largest cost over limit, of all limits; above 1 where a limit is broken."""
        return max(float(self.real_cost(limit.kind, kept)) / max(limit.ceiling, 1) for limit in self.limits)

    def prices(self, kept: Mapping[str, int]) -> dict[str, float]:
        """Cost of one of the last channels of each group, in units of the limit that `kept` is nearest to using up."""
        tightest = self.binding(kept)
        cost = self.real_cost(tightest, kept)

        def price_of(term: Term) -> float:
            fewer = max(kept[term.name] - term.step, 0)
            return float(cost - self.real_cost(tightest, {**kept, term.name: fewer})) / max(kept[term.name] - fewer, 1)

        return {term.name: price_of(term) for term in self.terms}

    def levels(self, term: Term, below: int) -> list[int]:
        """Every number of channels that a group may have and that is smaller than `below`, ascending."""
        levels, k = [], term.lower
        while k < below:
            levels.append(k)
            k = _next_level(term, k) or below
        return levels

    def meets(self, kept: Mapping[str, int]) -> bool:
        """Whether `kept` fits, is within bounds, and leaves no room for a channel where sparsity is the only limit."""
        bounded = all(
            term.lower <= kept[term.name] <= term.upper
            and (kept[term.name] % term.step == 0 or kept[term.name] == term.total)
            for term in self.terms
        )
        alone = "sparsity" in self.asked and len(self.limits) == 1
        more = alone and any(
            self.fits({**kept, t.name: up}) for t in self.terms if (up := _next_level(t, kept[t.name]))
        )
        return bounded and self.fits(kept) and not more

    def counts(self, wished: Mapping[str, float]) -> dict[str, int]:
        """Whole numbers of channels that meet every limit, in proportion to `wished`; not one more channel fits.

        After flooring, channels go one step at a time to the group that is furthest below its wish, ties by name.

        Raises:
            UsageError: as in `project`.
        """
        relaxed = self._relaxed(wished)
        kept = {t.name: _level_at_most(t, relaxed[t.name] * (1 + 1e-13) + 1e-9) for t in self.terms}
        for term in sorted(self.terms, key=lambda t: (relaxed[t.name] - kept[t.name], t.name)):
            while not self.fits(kept) and kept[term.name] > term.lower:  # a rounding error may have lifted a floor
                kept[term.name] = _level_at_most(term, kept[term.name] - 1)
        open_terms = {term.name: term for term in self.terms}
        while open_terms:
            name = min(open_terms, key=lambda n: ((kept[n] - relaxed[n]) / open_terms[n].step, n))
            more = _next_level(open_terms[name], kept[name])
            if more is None or not self.fits({**kept, name: more}):
                del open_terms[name]  # costs only grow: no channel of this group fits later either
            else:
                kept[name] = more
        return kept

    def _relaxed(self, wished: Mapping[str, float]) -> dict[str, float]:
        proportion = proportions(wished, self.terms, "groups of channels")

        def kept_at(price: float) -> dict[str, float]:
            return self.clip({name: price * x for name, x in proportion.items()})

        most = max(term.upper / proportion[term.name] for term in self.terms)
        return kept_at(largest(lambda price: self.fits_real(kept_at(price)), most))


def channel_terms(named: Iterable[tuple[str, int, int, int]], step: int = 1) -> tuple[Term, ...]:
    """Terms of groups (name, channels, fewest, most) that keep a multiple of `step` channels, or all.

    A group of at most `step` channels, such as attention heads, keeps any number.

    Raises:
        BudgetError: no multiple lies within the bounds of a group.

    >>> [(term.lower, term.upper) for term in channel_terms([("stem", 10, 3, 7)], step=2)]
    [(4, 6)]
    """
    terms = []
    for name, total, lower, upper in named:
        group_step = step if total > step else 1
        low, high = -(-lower // group_step) * group_step, upper if upper == total else upper // group_step * group_step
        low = min(low, total) if upper == total else low
        if low > high:
            raise BudgetError(
                f"{name}: no multiple of {step} lies between {lower} and {upper} of its {total} channels. "
                "Loosen its rules."
            )
        terms.append(Term(name, total, low, high, group_step))
    return tuple(sorted(terms, key=lambda term: term.name))


def _scaled(size: Any, uses: Fraction) -> Any:
    """Size times uses, exact where both are whole."""
    if uses.denominator == 1:
        return size * uses.numerator
    return Fraction(size) * uses if isinstance(size, int) else size * float(uses)


def _level_at_most(term: Term, kept: float) -> int:
    """The largest number of channels that the group may have and that is at most `kept`."""
    if kept >= term.total == term.upper:
        return term.total
    return max(term.step * math.floor(min(kept, term.upper) / term.step), term.lower)


def _next_level(term: Term, kept: int) -> int | None:
    """The next larger number of channels that the group may have; None where there is none."""
    more = (kept // term.step + 1) * term.step
    if more <= term.upper:
        return more
    return term.total if kept < term.total == term.upper else None


def channel_budget(budget: ModelBudget) -> ChannelBudget:
    """The budget itself, of a problem of channels.

    Raises:
        UsageError: single weights are pruned.
    """
    if not isinstance(budget, ChannelBudget):
        raise UsageError("this shares out channels: give --pattern channels.")
    return budget
