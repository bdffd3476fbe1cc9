"""A second arithmetic of budgets, in exact fractions, that shares no code with the first: for `benchmarks.hostile`."""

from __future__ import annotations

import math
import random
import re
from fractions import Fraction

from allot.budget.budget import Budget
from allot.budget.costs import Term
from allot.errors import BudgetError


def random_terms(draw: random.Random) -> tuple[Term, ...]:
    """Layers with bounds, steps, MACs and bytes."""
    terms = []
    for i in range(draw.randint(1, 6)):
        step = draw.choice((1, 1, 1, draw.randint(2, 9)))
        total = step * draw.choice((draw.randint(1, 12), draw.randint(1, 10**6)))
        bounds = sorted(step * draw.randint(0, total // step) for _ in range(2))
        lower, upper = bounds if draw.random() < 0.4 else (0, total)
        size = draw.choice((2, 4, 8))
        macs = draw.choice((total * draw.randint(0, 50), draw.randint(0, 10**8)))
        terms.append(Term(f"layer{i}", total, lower, upper, step, macs, size * total, size))
    return tuple(terms)


def random_limits(draw: random.Random) -> list[str]:
    """One to three limits, as a user writes them."""
    share = f"{draw.uniform(0.06, 99.9):.{draw.randint(1, 6)}f}%"
    kinds = draw.sample(("sparsity", "params", "macs", "bytes"), draw.choice((1, 1, 2, 3)))
    return [
        f"{kind}={share if draw.random() < 0.8 or kind == 'sparsity' else draw.randint(1, 10**6)}" for kind in kinds
    ]


def try_budget(terms: tuple[Term, ...], texts: list[str], draw: random.Random) -> str:
    """What came of a budget, "met" or "refused".

    Raises:
        AssertionError: with what is wrong.
        BudgetError: the budget that an error calls the nearest cannot be met.
    """
    ceilings = {text.partition("=")[0]: _ceiling(text, terms) for text in texts}

    def fits(kept: dict[str, int]) -> bool:
        return all(_cost(kind, terms, kept) <= ceiling for kind, ceiling in ceilings.items())

    least, most = {t.name: t.lower for t in terms}, {t.name: t.upper for t in terms}
    short = ceilings.get("sparsity", 0) > sum(most.values()) and fits(most)
    full = sum(_file_bytes(term, term.total) for term in terms)
    try:
        budget = Budget.parse(*texts).on(terms, full_bytes=full)
    except BudgetError as error:
        refused = str(error)
    else:
        assert not short, "was accepted, and cannot be met"
        return _try_counts(budget, terms, ceilings, draw)
    nearest = re.search(r"Nearest that can be met: (.*)\.$", refused)
    if nearest:
        Budget.parse(nearest[1]).on(terms, full_bytes=full)
    assert short or not fits(least), f"was refused, and can be met: {refused}"
    return "refused"


def _try_counts(budget: Budget, terms: tuple[Term, ...], ceilings: dict[str, Fraction], draw: random.Random) -> str:
    def fits(kept: dict[str, int]) -> bool:
        return all(_cost(kind, terms, kept) <= ceiling for kind, ceiling in ceilings.items())

    assert fits({t.name: t.lower for t in terms}), "was accepted, and cannot be met"
    kept = budget.counts({term.name: draw.choice((0.0, draw.random(), 1.0)) for term in terms})
    assert fits(kept), f"{kept} costs more than it may"
    assert all(t.lower <= kept[t.name] <= t.upper and kept[t.name] % t.step == 0 for t in terms), f"{kept}: bounds"
    more = [{**kept, t.name: kept[t.name] + t.step} for t in terms if kept[t.name] < t.upper]
    assert not any(fits(larger) for larger in more), f"{kept}: one more weight fits"
    if list(ceilings) == ["sparsity"] and all(term.step == 1 for term in terms):
        assert sum(kept.values()) == ceilings["sparsity"], f"{kept}: not exact"
    return "met"


def _ceiling(text: str, terms: tuple[Term, ...]) -> Fraction:
    kind, _, amount = text.partition("=")
    if kind == "sparsity":
        return Fraction(round((1 - Fraction(amount[:-1]) / 100) * sum(term.total for term in terms)))
    if not amount.endswith("%"):
        return Fraction(amount)
    return Fraction(math.floor(Fraction(amount[:-1]) / 100 * _cost(kind, terms, {t.name: t.total for t in terms})))


def _cost(kind: str, terms: tuple[Term, ...], kept: dict[str, int]) -> Fraction:
    if kind == "macs":
        return Fraction(math.ceil(sum(Fraction(kept[t.name] * (t.macs or 0), t.total) for t in terms)))
    return Fraction(sum(_file_bytes(t, kept[t.name]) if kind == "bytes" else kept[t.name] for t in terms))


def _file_bytes(term: Term, kept: int) -> int:
    mask = min(term.total, *(kept * (low + 1) + (term.total - 1) // 2**low + 1 for low in range(40)))
    return min(term.dense_bytes, -(-mask // 8) + kept * term.value_bytes)
