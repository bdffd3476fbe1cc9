"""What every budget for a model answers, whether it counts weights or channels, and the arithmetic that they share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from allot.budget.allocation import Allocation
from allot.budget.costs import Term
from allot.budget.units import Amount, amount_text, sparsity_keeping, unit
from allot.errors import BudgetError

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Limit:
    """One bound on one cost, in whole units: weights, MACs, bytes or nanoseconds."""

    kind: str
    asked: float | int | str
    ceiling: int


class ModelBudget(Protocol):
    """A budget tied to one model: `Budget` of single weights, `ChannelBudget` of channels.

    `kept` counts weights of each layer, or channels of each group; every term has an entry.
    """

    terms: tuple[Term, ...]

    @property
    def asked(self) -> dict[str, float | int | str]: ...

    @property
    def limits(self) -> tuple[Limit, ...]: ...

    @property
    def total(self) -> int: ...

    def sizes(self, kept: Mapping[str, int]) -> dict[str, int]: ...

    def cost(self, kind: str, kept: Mapping[str, int]) -> int: ...

    def real_cost(self, kind: str, kept: Mapping[str, float]) -> Any: ...

    def fits(self, kept: Mapping[str, int]) -> bool: ...

    def meets(self, kept: Mapping[str, int]) -> bool: ...

    def counts(self, wished: Mapping[str, float]) -> dict[str, int]: ...

    def prices(self, kept: Mapping[str, int]) -> dict[str, float]: ...

    def widened(self, factor: float) -> ModelBudget: ...

    @property
    def widest(self) -> float: ...

    def with_limits(self, limits: Mapping[str, float | int | str]) -> ModelBudget: ...

    def _relaxed(self, wished: Mapping[str, float]) -> dict[str, float]: ...

    def to_json(self) -> dict[str, str]:
        """The limits as text, by kind."""
        return {kind: str(value) for kind, value in self.asked.items()}

    def project(self, wished: Mapping[str, float]) -> Allocation:
        """The densities nearest to `wished` in proportion that use up the tightest limit (real numbers).

        Args:
            wished: name -> density or any non-negative weight; only proportions matter.
        Raises:
            BudgetError: the budget is not tied to a model yet.
            UsageError: a layer or group is missing, unknown, negative or nan.
        """
        relaxed, total = self._relaxed(wished), {term.name: term.total for term in self.terms}
        return Allocation({name: relaxed[name] / total[name] for name in total}, total)

    def fits_real(self, kept: Mapping[str, float]) -> bool:
        """Whether real numbers meet every limit."""
        return all(self.real_cost(limit.kind, kept) <= limit.ceiling for limit in self.limits)

    def clip(self, kept: Mapping[str, Number]) -> dict[str, Number]:
        """`kept` brought within the bounds of each term."""
        return {term.name: min(max(kept[term.name], term.lower), term.upper) for term in self.terms}

    def binding(self, kept: Mapping[str, int]) -> str:
        """The kind of the limit that `kept` is nearest to using up."""
        return max(self.limits, key=lambda limit: self.cost(limit.kind, kept) / max(limit.ceiling, 1)).kind

    def rows(self, kept: Mapping[str, int]) -> list[dict[str, Any]]:
        """One row for each limit: `{kind, asked, limit, achieved, met}`; sparsity as a fraction."""
        table = []
        for limit in self.limits:
            cost = self.cost(limit.kind, kept)
            sparsity = limit.kind == "sparsity"
            table.append(
                {
                    "kind": limit.kind,
                    "asked": str(limit.asked),
                    "limit": float(Amount.read(limit.kind, limit.asked).value) if sparsity else limit.ceiling,
                    "achieved": 1 - cost / self.total if sparsity else cost,
                    "met": cost <= limit.ceiling,
                }
            )
        return table


def widened(limits: Iterable[Limit], factor: float, budget: ModelBudget, fixed_bytes: int) -> tuple[Limit, ...]:
    """Limits with room for `factor` times as much beside fixed bytes, at most for everything in bounds."""
    if factor == 1:
        return tuple(limits)
    everything = {term.name: term.upper for term in budget.terms}

    def ceiling(limit: Limit) -> int:
        fixed = fixed_bytes if limit.kind == "bytes" else 0
        most = budget.cost(limit.kind, everything)
        # the smaller one first: a product beyond every float has no floor
        return max(limit.ceiling, fixed + math.floor(min(factor * (limit.ceiling - fixed), most - fixed)))

    return tuple(replace(limit, ceiling=ceiling(limit)) for limit in limits)


def widest(limits: Iterable[Limit], budget: ModelBudget, fixed_bytes: int) -> float:
    """The factor from which on `widened` limits allow everything in bounds, 1 or more."""
    everything, factors = {term.name: term.upper for term in budget.terms}, [1.0]
    for limit in limits:
        fixed = fixed_bytes if limit.kind == "bytes" else 0
        factors.append((budget.cost(limit.kind, everything) - fixed) / max(limit.ceiling - fixed, 1))
    return max(factors)


def check_floors(budget: ModelBudget, need: str) -> None:
    """Raises where the lower bounds cost more than a limit.

    Args:
        need: subject and verb of the error: what needs that cost.
    Raises:
        BudgetError: with the nearest budget that can be met.
    """
    least = {term.name: term.lower for term in budget.terms}
    for limit in budget.limits:
        if (cost := budget.cost(limit.kind, least)) > limit.ceiling:
            raise BudgetError(
                f"{limit.kind}={limit.asked} allows {limit.ceiling:,} {unit(limit.kind)}; {need} {cost:,}."
                f"{nearest(budget, least)}"
            )


def nearest(budget: ModelBudget, kept: Mapping[str, int], moved: str = "") -> str:
    """The sentence that offers limits which this model meets, as `Budget.parse` reads them; "" where none is found.

    Limits that `kept` breaks, and `moved`, become what `kept` costs. They are tried: bounds that allow no other count
    move the sparsity as well, and an offer that `counts` does not meet is not made.
    """
    texts = {}
    for limit in budget.limits:
        cost = budget.cost(limit.kind, kept)
        if cost <= limit.ceiling and limit.kind != moved:
            texts[limit.kind] = limit.asked
        elif limit.kind == "sparsity":
            texts["sparsity"] = sparsity_keeping(cost, budget.total)
        else:
            texts[limit.kind] = amount_text(limit.kind, cost)
    offered = budget.with_limits(texts)
    most = {term.name: term.upper for term in budget.terms}
    if out_of_reach(offered, most) and moved != "sparsity":
        return nearest(offered, most, "sparsity")
    if not offered.meets(offered.counts(dict.fromkeys(most, 1.0))):
        return ""
    return f" Nearest that can be met: {','.join(f'{kind}={text}' for kind, text in texts.items())}."


def out_of_reach(budget: ModelBudget, most: Mapping[str, int]) -> Limit | None:
    """The limit of sparsity where even `most` keeps fewer weights, though the other limits allow more."""
    limit = next((limit for limit in budget.limits if limit.kind == "sparsity"), None)
    return limit if limit and budget.cost("sparsity", most) < limit.ceiling and budget.fits(most) else None
