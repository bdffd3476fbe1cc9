"""Separable sensitivities: hulls, and the cheapest sum of errors against every choice that there is."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from allot.budget.budget import Budget
from allot.budget.costs import Term
from allot.errors import UsageError
from allot.methods.knapsack import Knapsack
from allot.methods.training.separable import best_densities, lower_hull
from allot.network.applied_masks import masked
from allot.network.call import call
from allot.run.driver import drive
from allot.run.problem import Candidate
from contract.cases import problem_of

SIZES = {"a": 12, "b": 20, "c": 9}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 20), st.floats(-5, 5)), min_size=1, max_size=8))
def test_a_hull_is_convex_and_below_every_point(points):
    points = sorted({x: (x, y) for x, y in points}.values())
    hull = lower_hull(points)
    assert hull[0] == list(points[0]) and hull[-1] == list(points[-1])
    slopes = [(d - b) / (c - a) for (a, b), (c, d) in itertools.pairwise(hull)]
    assert all(one < other + 1e-9 for one, other in itertools.pairwise(slopes))
    for x, y in points:
        (a, b), (c, d) = next(((p, q) for p, q in itertools.pairwise(hull) if p[0] <= x <= q[0]), (hull[0], hull[0]))
        assert y >= (b if a == c else b + (d - b) * (x - a) / (c - a)) - 1e-9


@pytest.mark.parametrize("budget", [{"sparsity": 0.5}, {"params": 15}, {"macs": "40%"}])
@pytest.mark.parametrize("curvature", [(1.0, 1.0, 1.0), (9.0, 1.0, 3.0), (0.1, 5.0, 20.0)])
def test_convex_errors_are_shared_out_as_the_best_of_all_choices(budget: dict[str, Any], curvature: tuple[float, ...]):
    terms = tuple(Term(name, n, macs=3 * n if name == "b" else n) for name, n in SIZES.items())
    bound = Budget(**budget).on(terms)
    scale = dict(zip(SIZES, curvature, strict=True))

    def error(name: str, kept: int) -> float:
        return scale[name] * (1 - kept / SIZES[name]) ** 2

    curves = {name: [[k / n, error(name, k)] for k in range(1, n)] for name, n in SIZES.items()}
    kept = bound.counts(best_densities(bound, curves))
    assert bound.meets(kept)
    every = (
        dict(zip(SIZES, row, strict=True)) for row in itertools.product(*(range(1, n + 1) for n in SIZES.values()))
    )
    best = min(sum(error(name, k) for name, k in row.items()) for row in every if bound.fits(row))
    ours = sum(error(name, k) for name, k in kept.items())
    # greedy along hulls is optimal up to the last step
    assert ours <= best + max(error(n, k - 1) - error(n, k) for n, k in kept.items() if k > 1) + 1e-9


def test_what_saves_as_much_at_a_lower_price_goes_first():
    terms = (Term("cheap", 10, macs=10), Term("dear", 10, macs=1_000))
    bound = Budget(macs=520).on(terms)
    curve = [[k / 10, (1 - k / 10) ** 2] for k in range(1, 10)]
    kept = bound.counts(best_densities(bound, {"cheap": curve, "dear": curve}))
    assert kept == {"cheap": 10, "dear": 5}


def test_an_error_is_the_loss_of_the_net_with_that_layer_alone_pruned():
    problem = problem_of("without batch norm", "sparsity=0.6", batch_size=20)
    told = drive(Knapsack(densities=(0.0, 0.25)), problem, Candidate.dense(problem)).diagnostics["knapsack"]["error"]
    inputs = problem.inputs().batch(0)[0]
    for layer in problem.scope:
        (least, _), (density, loss) = told[layer.name]
        w = problem.dense[layer.name]
        assert least == 1 / layer.total and density == pytest.approx(0.25, abs=0.5 / layer.total)
        mask = problem.pattern.mask(layer, w.abs(), round(density * layer.total))
        with torch.no_grad():
            y, z = (call(problem.model, t, inputs) for t in ({}, {layer.name: masked(w, mask)}))
        p, q = (logits.div(2).softmax(1) for logits in (y, z))
        assert loss == pytest.approx(float(4 * (p * (p.log() - q.log())).sum(1).mean()), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("densities", [(), (0.1, 0.5), (0.0, 0.5, 0.3), (0.0, 1.0), (0.0, 2.0), 0.5])
def test_densities_that_are_no_grid_are_refused(densities: Any):
    with pytest.raises(UsageError, match="densities"):
        Knapsack(densities=densities)
