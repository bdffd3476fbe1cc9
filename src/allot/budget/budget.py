"""Budgets of single weights: how many each layer may keep, as arithmetic on layer sizes (no torch).

The relaxed problem has one unknown. Given wished densities d_l and a price c,

    x_l(c) = clip(c * d_l * n_l, lower_l, upper_l)           n_l weights in layer l
    project:  the largest c for which every limit holds       (between two breakpoints of x every cost is linear in c)
    counts:   floor x_l to whole steps, hand out the rest by largest remainder, then add weights while they fit

so that the kept total equals the tightest limit to the last weight.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from numbers import Number
from typing import Any

from allot.budget import model_budget
from allot.budget.costs import PRICES, REAL_PRICES, Ledger, Term, breakpoints, proportions
from allot.budget.model_budget import Limit, ModelBudget
from allot.budget.units import KINDS, Amount
from allot.errors import BudgetError, InvalidBudget, NothingInScope, UsageError, unknown

_FORMS = 'text like "macs=50%", a dict like {"macs": "50%"} or a Budget'


@dataclass(frozen=True)
class Budget(ModelBudget):
    """What the sparse model may cost: one or several limits that all hold.

    Args:
        sparsity: fraction of the weights in scope to remove, in (0, 1); the kept count is
            round((1 - sparsity) * total) to the weight.
        params: most weights kept in scope; a whole number, "20k", or a fraction of the dense model, "10%".
        macs: most effective multiply-accumulates in scope, kept weights x uses; a whole number, "5M" or "50%".
        bytes: largest bitmask file; a whole number, "300kB", "3MB", "2MiB", or a fraction of the dense file, "20%".
        latency: longest time of one batch in a runtime, "5ms", "300us", or a fraction of the dense model's time,
            "50%"; for channels only.
    Raises:
        InvalidBudget: no limit, or one that is not in its range.

    `on(terms)` ties a budget to the layers of one model; `project` and `counts` need that.

    >>> budget = Budget(sparsity=0.9).on((Term("conv", 100), Term("fc", 300)))
    >>> budget.counts({"conv": 0.2, "fc": 0.1})
    {'conv': 16, 'fc': 24}
    >>> Budget.parse("macs=50%, bytes=3MB") == Budget(macs="50%", bytes="3MB")
    True
    """

    sparsity: float | str | None = None
    params: int | str | None = None
    macs: int | str | None = None
    bytes: int | str | None = None
    latency: str | None = None
    terms: tuple[Term, ...] = field(default=(), repr=False)
    fixed_bytes: int = field(default=0, repr=False)
    full_bytes: int = field(default=0, repr=False)
    full_latency: int = field(default=0, repr=False)
    factor: float = field(default=1.0, repr=False)

    def __post_init__(self) -> None:
        if not self.asked:
            raise InvalidBudget(
                'an empty budget: give at least one of sparsity=0.9, params="10%", macs="50%", bytes="3MB".'
            )
        for kind, value in self.asked.items():
            Amount.read(kind, value)

    @classmethod
    def of(cls, given: Budget | str | float | Mapping[str, float | int | str]) -> Budget:
        """The budget itself, or from text, from a mapping of limits by kind, or from a number: a sparsity.

        Raises:
            InvalidBudget: nothing that says what the sparse model may cost.

        >>> Budget.of(0.9) == Budget.of({"sparsity": 0.9}) == Budget(sparsity=0.9)
        True
        """
        if isinstance(given, Budget):
            return given
        if isinstance(given, str):
            return cls.parse(given)
        if isinstance(given, Mapping):
            return cls._of_limits((str(kind), amount) for kind, amount in given.items())
        if isinstance(given, Number) and not isinstance(given, bool):
            return cls(sparsity=given)
        raise InvalidBudget(f"budget {given!r}: a sparsity like 0.9, {_FORMS} is accepted.")

    @classmethod
    def parse(cls, *texts: str) -> Budget:
        """The budget from text: `parse("sparsity=0.9")`, `parse("macs=50%", "bytes=3MB")`, or with commas.

        A single number below 1, or a single percentage, is a sparsity; kinds may be written in capitals.

        Raises:
            InvalidBudget: text that is no budget.

        >>> Budget.parse("90%") == Budget(sparsity="90%")
        True
        """
        limits = []
        if others := [text for text in texts if not isinstance(text, str)]:
            raise InvalidBudget(f"budget {others[0]!r}: text like 'sparsity=0.9' is accepted.")
        for part in (part.strip() for text in texts for part in re.split(r",|\band\b", text)):
            kind, equals, value = (piece.strip() for piece in part.partition("="))
            if (
                re.fullmatch(r"0?\.[0-9]+|[0-9]+(\.[0-9]*)? *%|\.[0-9]+ *%", part)
                and len(texts) == 1
                and part == texts[0].strip()
            ):
                kind, equals, value = "sparsity", "=", part
            if not equals or not value:
                raise InvalidBudget(f"budget {part!r}: write KIND=VALUE, like sparsity=0.9 or macs=50%.")
            limits.append((kind, value))
        return cls._of_limits(limits)

    @classmethod
    def _of_limits(cls, limits: Iterable[tuple[str, Any]]) -> Budget:
        asked: dict[str, Any] = {}
        for written, value in limits:
            kind = written.lower()
            if kind not in KINDS:
                raise InvalidBudget(str(unknown("budget", written, KINDS)))
            if kind in asked:
                raise InvalidBudget(f"budget {kind} is given twice: {asked[kind]} and {value}.")
            asked[kind] = value
        return cls(**asked)

    @property
    def asked(self) -> dict[str, float | int | str]:
        """The limits as the user wrote them."""
        return {kind: value for kind in KINDS if (value := getattr(self, kind)) is not None}

    def on(self, terms: tuple[Term, ...], *, fixed_bytes: int = 0, full_bytes: int = 0) -> Budget:
        """This budget for the layers of one model.

        Args:
            terms: one entry for each layer, in any order.
            fixed_bytes: bytes of the bitmask file beside the layers.
            full_bytes: size of the dense file, to which a percentage of bytes refers.
        Raises:
            BudgetError: even the floors cost more than a limit, or the caps keep sparsity out of reach.
        """
        if self.latency is not None:
            raise BudgetError(
                f"latency={self.latency}: no runtime here is faster for single weights that are gone. "
                "What a latency budget can share out are channels: give --pattern channels, or --method dsa."
            )
        if not terms:
            raise NothingInScope("nothing in scope: no weight can be pruned. Widen the include rules.")
        bound = self.with_terms(terms, fixed_bytes=fixed_bytes, full_bytes=full_bytes)
        bound._check_reachable()
        return bound

    def with_terms(
        self, terms: Iterable[Term], *, fixed_bytes: int = 0, full_bytes: int = 0, full_latency: int = 0
    ) -> Budget:
        """`on` without a check that the limits can be met, and with the nanoseconds of the dense model."""
        by_name = tuple(sorted(terms, key=lambda term: term.name))
        return replace(self, terms=by_name, fixed_bytes=fixed_bytes, full_bytes=full_bytes, full_latency=full_latency)

    @property
    def total(self) -> int:
        """Weights in scope."""
        return sum(term.total for term in self.terms)

    @property
    def limits(self) -> tuple[Limit, ...]:
        """Every limit as a whole number of weights, MACs or bytes."""
        tied = tuple(Limit(kind, value, self._ceiling(kind, value)) for kind, value in self.asked.items())
        return model_budget.widened(tied, self.factor, self, self.fixed_bytes)

    def widened(self, factor: float) -> Budget:
        """This budget with room for `factor` times as much beside what is fixed, at most for everything.

        Schedules train with wider budgets first; `project`, `counts` and `meets` work for them as well.

        Args:
            factor: 1 or more; 1 is this budget.
        """
        return replace(self, factor=factor)

    @property
    def widest(self) -> float:
        """The factor from which on `widened` allows every weight in bounds.

        >>> Budget(sparsity=0.75).on((Term("conv", 100), Term("fc", 300))).widest
        4.0
        """
        return model_budget.widest(self.widened(1.0).limits, self, self.fixed_bytes)

    def with_limits(self, limits: Mapping[str, float | int | str]) -> Budget:
        """This budget for the same model with other limits, by kind, which are not checked."""
        asked: dict[str, Any] = {kind: limits.get(kind) for kind in KINDS}
        return replace(self, **asked)

    def prices(self, kept: Mapping[str, int]) -> dict[str, float]:
        """What one more weight of each layer costs, in units of the limit that `kept` is nearest to using up.

        0 for a layer that is stored dense in a bytes budget: its last weights are free.
        """
        price = REAL_PRICES[self.binding(kept)]

        def price_of(term: Term) -> float:
            low = max(kept[term.name] - term.step, 0)
            return (price(term, low + term.step) - price(term, low)) / term.step

        return {term.name: price_of(term) for term in self.terms}

    def cost(self, kind: str, kept: Mapping[str, int]) -> int:
        """What `kept` weights per layer cost: weights, MACs (rounded up) or bytes."""
        price = PRICES[kind]
        return math.ceil(self._fixed(kind) + sum(price(term, kept[term.name]) for term in self.terms))

    def real_cost(self, kind: str, kept: Mapping[str, float]) -> float:
        """What real numbers of weights per layer cost."""
        return self._fixed(kind) + math.fsum(REAL_PRICES[kind](term, kept[term.name]) for term in self.terms)

    def sizes(self, kept: Mapping[str, int]) -> dict[str, int]:
        """Remaining weights of each layer: `kept` itself."""
        return dict(kept)

    def fits(self, kept: Mapping[str, int]) -> bool:
        """Whether whole numbers of weights meet every limit."""
        return all(self.cost(limit.kind, kept) <= limit.ceiling for limit in self.limits)

    def meets(self, kept: Mapping[str, int]) -> bool:
        """Whether `kept` is an answer: it fits, layers are in their bounds, and sparsity alone is met exactly.

        Exactly: to the weight, or where a pattern keeps whole groups, until not one more group fits.
        """
        bounded = all(
            term.lower <= kept[term.name] <= term.upper and kept[term.name] % term.step == 0 for term in self.terms
        )
        left = self.limits[0].ceiling - sum(kept.values())
        more = any(kept[term.name] < term.upper and term.step <= left for term in self.terms)
        exact = self.sparsity is None or len(self.limits) > 1 or not more
        return bounded and exact and self.fits(kept)

    def counts(self, wished: Mapping[str, float]) -> dict[str, int]:
        """Whole numbers of weights per layer that meet every limit, in proportion to `wished`.

        Weights that rounding leaves over go to the largest remainders, ties by name. The rest of a limit is used up by
        the most expensive weights first, until not one more weight fits. Counts that use up a limit already stay.

        Raises:
            BudgetError, UsageError: as in `project`.
        """
        relaxed = self._relaxed(wished)
        if max(wished.values()) <= 1 + 1e-9:  # densities, and no other proportions
            sizes = {term.name: wished[term.name] * term.total for term in self.terms}
            rounded = {name: round(size) for name, size in sizes.items()}
            if all(math.isclose(sizes[name], rounded[name], abs_tol=1e-6) for name in sizes) and self._uses_up(rounded):
                return rounded
        # a whole number less a rounding error is not floored to the number below
        steps = {term.name: relaxed[term.name] / term.step * (1 + 1e-13) + 1e-9 for term in self.terms}
        kept = {term.name: max(term.step * math.floor(steps[term.name]), term.lower) for term in self.terms}
        ledger = self._ledger(kept)
        by_remainder = sorted(
            self.terms, key=lambda term: (-round((relaxed[term.name] - kept[term.name]) / term.step, 9), term.name)
        )
        for term in reversed(by_remainder):  # a rounding error may have lifted a floor by one
            while not ledger.fits() and kept[term.name] - term.step >= term.lower:
                ledger.add(term, -1)
        for term in by_remainder:
            if relaxed[term.name] > kept[term.name]:
                ledger.add(term, min(1, ledger.room(term)))
        # the rest goes to the most expensive weights in the scarcest unit: cheaper weights alone may not use it up
        scarcest = min(ledger.left, key=lambda kind: ledger.left[kind])
        dearness = {term.name: float(PRICES[scarcest](term, term.total)) / term.total for term in self.terms}
        for term in sorted(self.terms, key=lambda term: (-dearness[term.name], term.name)):
            ledger.add(term, ledger.room(term))
        return dict(kept)

    def _ledger(self, kept: dict[str, int]) -> Ledger:
        return Ledger(self.terms, {limit.kind: limit.ceiling - self._fixed(limit.kind) for limit in self.limits}, kept)

    def _uses_up(self, kept: dict[str, int]) -> bool:
        """Whether `kept` is an answer, and no layer can keep more."""
        if not self.meets(kept):
            return False
        ledger = self._ledger(kept)
        return not any(ledger.room(term) for term in self.terms)

    def _fixed(self, kind: str) -> int:
        return self.fixed_bytes if kind == "bytes" else 0

    def _dense_cost(self, kind: str) -> int:
        if kind in ("bytes", "latency"):
            return self.full_bytes if kind == "bytes" else self.full_latency
        return self.cost(kind, {term.name: term.total for term in self.terms})

    def _ceiling(self, kind: str, value: float | int | str) -> int:
        if not self.terms:
            raise BudgetError("this budget is not tied to a model yet: use budget.on(terms).")
        if kind == "macs" and any(term.macs is None for term in self.terms):
            raise UsageError(
                "a macs budget needs an example input to count MACs: give --data or --input (example= in Python)."
            )
        amount = Amount.read(kind, value)
        if kind == "sparsity":
            return round((1 - amount.value) * self.total)
        return math.floor(amount.value * self._dense_cost(kind)) if amount.relative else int(amount.value)

    def _check_reachable(self) -> None:
        model_budget.check_floors(self, "floors, rules and pattern need at least")
        most = {term.name: term.upper for term in self.terms}
        if limit := model_budget.out_of_reach(self, most):
            raise BudgetError(
                f"sparsity={limit.asked} keeps {limit.ceiling:,} weights; maximum densities and pattern allow only "
                f"{self.cost('sparsity', most):,}.{model_budget.nearest(self, most, 'sparsity')}"
            )

    def _relaxed(self, wished: Mapping[str, float]) -> dict[str, float]:
        ceilings = [(limit.kind, limit.ceiling) for limit in self.limits]
        proportion = proportions(wished, self.terms, "layers")
        prices = sorted({kept / proportion[term.name] for term in self.terms for kept in breakpoints(term)})

        def kept_at(price: float) -> dict[str, float]:
            return self.clip({name: price * x for name, x in proportion.items()})

        def costs(price: float) -> list[float]:
            return [self.real_cost(kind, kept_at(price)) for kind, _ in ceilings]

        def breaks(price: float) -> bool:
            return any(cost > ceiling for cost, (_, ceiling) in zip(costs(price), ceilings, strict=True))

        i = bisect_left(prices, True, key=breaks)
        if i == len(prices):
            return kept_at(prices[-1] * (1 + 1e-12))
        if i == 0:
            return kept_at(0.0)
        low, high = prices[i - 1 : i + 1]
        fractions = [
            (ceiling - before) / (after - before)
            for (_, ceiling), before, after in zip(ceilings, costs(low), costs(high), strict=True)
            if after > ceiling
        ]
        return kept_at(low + (high - low) * min(fractions))
