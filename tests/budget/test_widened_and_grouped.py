"""Budgets with more room (`widened`), prices, and patterns that keep whole groups of weights (n:m)."""

from __future__ import annotations

import itertools
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from allot.budget.allocation import Allocation
from allot.budget.budget import Budget
from allot.budget.costs import Term
from allot.errors import BudgetError, PatternError
from allot.network.layers import Rules, Scope
from allot.pruning.prune import prune
from allot.pruning.setup import make_problem
from allot.run.patterns import NM, parse

TERMS = (
    Term("a", 300, macs=3_000, dense_bytes=1_200, value_bytes=4),
    Term("b", 50, lower=5, upper=40, macs=5_000, dense_bytes=200, value_bytes=4),
    Term("c", 1_000, macs=1_000, dense_bytes=4_000, value_bytes=4),
)
BUDGETS: list[dict[str, Any]] = [
    {"sparsity": 0.9},
    {"params": "10%"},
    {"macs": "15%"},
    {"bytes": 1_000},
    {"macs": "20%", "params": "12%"},
    {"params": "99.9%"},  # more than the caps allow
]


def bound(limits: dict[str, Any], terms: tuple[Term, ...] = TERMS) -> Budget:
    return Budget(**limits).on(terms, fixed_bytes=100, full_bytes=5_500)


@pytest.mark.parametrize("limits", BUDGETS)
@pytest.mark.parametrize("factor", [1.0, 1.3, 4.0, 1e6])
def test_a_widened_budget_is_met_until_not_one_more_weight_fits(limits: dict[str, Any], factor: float):
    budget = bound(limits)
    wide = budget.widened(factor)
    kept = wide.counts({"a": 0.5, "b": 1.0, "c": 0.2})
    assert wide.meets(kept)
    for term in TERMS:
        assert kept[term.name] == term.upper or not wide.fits(kept | {term.name: kept[term.name] + 1})
    for limit, wider in zip(budget.limits, wide.limits, strict=True):
        most = budget.cost(limit.kind, {term.name: term.upper for term in TERMS})
        base = 100 if limit.kind == "bytes" else 0
        assert wider.ceiling == max(limit.ceiling, min(int(base + factor * (limit.ceiling - base)), most))
    if factor == 1:
        assert kept == budget.counts({"a": 0.5, "b": 1.0, "c": 0.2})


@pytest.mark.parametrize("limits", BUDGETS)
def test_a_price_is_what_one_more_weight_costs(limits: dict[str, Any]):
    budget = bound(limits)
    kept = budget.counts({"a": 0.3, "b": 0.5, "c": 0.1})
    nearest = max(budget.limits, key=lambda limit: budget.cost(limit.kind, kept) / limit.ceiling).kind
    whole = {term.name: 0 for term in TERMS}
    for term in TERMS:  # over eight weights, of which positions fill whole bytes
        few = kept[term.name] - 8
        cost = budget.cost(nearest, whole | {term.name: few + 8}) - budget.cost(nearest, whole | {term.name: few})
        assert budget.prices(kept)[term.name] == pytest.approx(cost / 8)


def test_a_factor_beyond_every_float_is_room_for_everything():
    assert bound({"sparsity": 0.9}).widened(1e308).counts({"a": 1, "b": 1, "c": 1}) == {"a": 300, "b": 40, "c": 1_000}


def test_weights_of_a_layer_that_is_stored_dense_are_free():
    kept = {"a": 300, "b": 10, "c": 10}
    assert bound({"bytes": 3_000}).prices(kept) == {"a": 0.0, "b": 4 + 3 / 8, "c": 4 + 7 / 8}


def test_whole_groups_meet_a_sparsity_when_not_one_more_fits():
    terms = (Term("a", 16, lower=4, upper=16, step=4), Term("b", 24, lower=6, upper=24, step=6))
    budget = Budget(sparsity=0.5).on(terms)  # 20 of 40
    met = {(a, b) for a, b in itertools.product(range(4, 17), range(6, 25)) if budget.meets({"a": a, "b": b})}
    assert met == {(8, 12), (12, 6)}  # not (4, 12): 16 kept, 4 more would fit
    assert tuple(budget.counts({"a": 1, "b": 1}).values()) in met
    assert budget.prices({"a": 8, "b": 12}) == {"a": 1.0, "b": 1.0}  # of one weight, though a group comes or goes


@st.composite
def grouped(draw: st.DrawFn) -> tuple[Term, ...]:
    """Up to three layers of up to six groups each."""
    terms = []
    for i in range(draw(st.integers(1, 3))):
        step, groups = draw(st.integers(1, 12)), draw(st.integers(1, 6))
        lower = draw(st.integers(0, groups))
        upper = draw(st.integers(lower, groups))
        total = step * groups
        terms.append(
            Term(
                f"layer{i}", total, step * lower, step * upper, step, total * draw(st.integers(1, 9)),
                dense_bytes=4 * total, value_bytes=4,
            )
        )  # fmt: skip
    return tuple(terms)


@settings(max_examples=150, deadline=None)
@given(grouped(), st.sampled_from(["sparsity", "params", "macs", "bytes"]), st.floats(0.05, 0.95), st.data())
def test_whole_groups_are_one_of_the_fullest_answers_that_there_are(terms, kind, share, data):
    limit = share if kind == "sparsity" else max(1, round(share * PRICED[kind](terms)))
    try:
        budget = Budget(**{kind: limit}).on(terms, full_bytes=PRICED["bytes"](terms))
    except BudgetError:
        return
    names = [term.name for term in terms]
    every = itertools.product(*(range(term.lower, term.upper + 1, term.step) for term in terms))
    fitting = [kept for kept in (dict(zip(names, row, strict=True)) for row in every) if budget.fits(kept)]
    fullest = [
        kept
        for kept in fitting
        if not any(kept | {term.name: kept[term.name] + term.step} in fitting for term in terms)
    ]
    kept = budget.counts({name: data.draw(st.floats(0, 1)) for name in names})
    assert kept in fullest
    assert budget.counts(Allocation.of(kept, {term.name: term.total for term in terms})) == kept
    assert [kept for kept in fitting if budget.meets(kept)] == (fullest if kind == "sparsity" else fitting)


PRICED: dict[str, Any] = {
    "params": lambda terms: sum(term.total for term in terms),
    "macs": lambda terms: sum(term.macs for term in terms),
    "bytes": lambda terms: sum(term.dense_bytes for term in terms),
}


# n of every m, an n per layer


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


def test_n_to_m_reads_and_writes_itself():
    assert parse("n:4") == NM(None, 4) and str(parse("n:4")) == "n:4" and parse("2:4") == NM(2, 4)
    for wrong in (lambda: NM(0, 4), lambda: NM(None, 1), lambda: NM(4, 4)):
        with pytest.raises(PatternError, match="n:4"):
            wrong()


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.61, 0.74])
def test_each_layer_keeps_a_whole_n_and_not_one_more_fits(sparsity: float):
    result = prune(net(), None, f"sparsity={sparsity}", allocate="erk", pattern="n:4", repair="none")
    room = round((1 - sparsity) * result.problem.budget.total) - sum(result.allocation.kept.values())
    assert room >= 0
    for layer in result.problem.scope:
        per_group = layer.matrix(result.masks[layer.name]).unflatten(1, (-1, 4)).sum(-1)
        n = int(per_group[0, 0])
        assert bool((per_group == n).all()) and 1 <= n <= 4
        assert n == 4 or layer.total // 4 > room


@pytest.mark.parametrize("budget", ["sparsity=0.5", "macs=60%", "bytes=2000", "sparsity=0.3,macs=55%"])
def test_layers_have_an_n_of_their_own_under_every_budget_and_keep_it_in_repair(budget: str):
    wished = {"0.weight": 1.0, "2.weight": 0.2, "4.weight": 0.6}
    options = {"distill": {"steps": 6, "every": 2, "ramp": 3.0}}
    inputs = torch.randn(16, 8)
    result = prune(net(), inputs, budget, allocate=wished, pattern="n:4", repair="distill", options=options)
    chosen = set()
    for layer in result.problem.scope:
        per_group = layer.matrix(result.masks[layer.name]).unflatten(1, (-1, 4)).sum(-1)
        assert per_group.min() == per_group.max()
        chosen.add(int(per_group.min()))
    assert len(chosen) > 1
    kept, bound = result.allocation.kept, result.problem.budget
    assert bound.meets(kept)
    for term in bound.terms:
        assert kept[term.name] == term.upper or not bound.fits(kept | {term.name: kept[term.name] + term.step})


def test_caps_and_floors_are_rounded_to_whole_n():
    rules = Rules(min_density={"0": 0.3}, max_density={"4": 0.6})
    scope = Scope.of(net(), rules)
    assert NM(None, 4).feasible(scope["0.weight"]) == (32, 64, 128)
    assert NM(None, 4).feasible(scope["4.weight"]) == (16, 16, 32)
    assert NM(None, 4).feasible(Scope.of(net(), Rules(floor=0))["4.weight"]) == (16, 16, 64)
    assert NM(None, 4).feasible(Scope.of(net(), Rules(floor="5/row"))["4.weight"]) == (16, 32, 64)
    with pytest.raises(PatternError, match="multiples of 16"):
        NM(None, 4).feasible(Scope.of(net(), Rules(max_density={"4": 0.2}))["4.weight"])


def test_below_one_in_m_is_an_error_that_names_the_nearest_budget():
    with pytest.raises(BudgetError, match=r"Nearest that can be met: sparsity=0\.75"):
        prune(net(), None, "sparsity=0.9", pattern="n:4", repair="none")


def test_every_layer_that_does_not_fit_is_named_at_once():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 8, 1))
    with pytest.raises(PatternError, match=r"2 layers: --exclude 0\.weight --exclude 2\.weight"):
        make_problem(model, Budget(sparsity=0.5), NM(2, 4))
