"""Errors of layers as functions of density: what they are, and their least sum against every choice there is."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from allot.budget.budget import Budget
from allot.errors import UsageError
from allot.methods.layer_errors import LayerErrors, fine, in_passes, refits
from allot.methods.layerwise.sites import sites_of, together
from allot.network.call import call
from allot.pruning.setup import make_problem
from allot.run.calibration import Calibration
from allot.run.driver import drive
from allot.run.patterns import Unstructured
from allot.run.problem import Candidate, Problem
from contract.cases import problem_of
from methods.columns import gram_of


def tiny(kept: int) -> Problem:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3))
    inputs = torch.randn(40, 4) @ torch.randn(4, 4)
    calibration = Calibration.of(inputs, batch_size=20)
    return make_problem(model, Budget(params=kept), Unstructured(), calibration=calibration)


def report_of(method: LayerErrors, problem: Problem) -> tuple[dict[str, int], dict[str, Any]]:
    candidate = drive(method, problem, Candidate.dense(problem))
    return candidate.allocation.kept, candidate.diagnostics["layer-errors"]


EVERY_COUNT = tuple(sorted({k / n for n in (6, 8, 9) for k in range(n)}))


@pytest.mark.parametrize("weighting", ["relative", "log", "outputs"])
@pytest.mark.parametrize("kept", [7, 11, 16])
def test_the_sum_of_errors_is_the_least_of_all_choices(weighting: str, kept: int):
    problem = tiny(kept)
    found, report = report_of(LayerErrors(densities=EVERY_COUNT, weighting=weighting), problem)
    error = {name: dict(itertools.accumulate(curve, falling)) for name, curve in report["error"].items()}
    sizes = {layer.name: layer.total for layer in problem.scope}

    def cost(name: str, k: int) -> float:
        if k == sizes[name]:
            return 0.0
        e = next(e for d, e in error[name].items() if round(d * sizes[name]) == k)
        if weighting == "outputs":
            _, at, loss = report["loss"][name]
            return e * loss / at
        return e if weighting == "relative" else -math.log(1 - e)

    def total(row: dict[str, int]) -> float:
        return sum(cost(name, k) for name, k in row.items())

    rows = (dict(zip(sizes, row, strict=True)) for row in itertools.product(*(range(1, n + 1) for n in sizes.values())))
    best = min(total(row) for row in rows if sum(row.values()) == kept)
    step = max(cost(name, k - 1) - cost(name, k) for name, k in found.items() if k > 1)
    assert sum(found.values()) == kept and total(found) <= best + step + 1e-9


def falling(before: list[float], at: list[float]) -> list[float]:
    return [at[0], min(before[1], at[1])]


def test_an_error_is_that_of_outputs_on_samples_that_the_weight_was_not_fitted_to():
    torch.manual_seed(0)
    mixing = torch.randn(6, 6)
    fit, judge = torch.randn(50, 6) @ mixing, torch.randn(50, 6) @ mixing
    W_d = torch.randn(3, 6)
    parts = {("w", 0, 3): gram_of(fit, judge)}
    seen = []
    for kept, W, error in refits(W_d, parts, largest, [4, 9, 15], 6, 30):
        seen.append(kept)
        assert int(W.count_nonzero()) == kept
        outputs = judge @ W_d.T
        assert error == pytest.approx(float((judge @ W.T - outputs).square().sum() / outputs.square().sum()), rel=1e-3)
        mask = W != 0  # on its mask, W is the damped least squares of the first half
        for row, w, dense in zip(mask, W, W_d, strict=True):
            x = fit[:, row]
            plain = torch.linalg.lstsq(x, fit @ dense).solution
            assert float((x @ w[row] - x @ plain).norm()) < 0.2 * float((fit @ dense).norm())
    assert seen == [15, 9, 4]


def largest(score: Tensor, kept: int) -> Tensor:
    return (
        torch.zeros(score.numel(), dtype=torch.bool)
        .index_fill(0, score.flatten().topk(kept).indices, True)
        .view_as(score)
    )


def test_no_layer_needs_its_second_half_where_there_is_one_position():
    gram = gram_of(torch.zeros(0, 3), torch.eye(3))
    [(_, W, error)] = refits(torch.tensor([[3.0, 2.0, 1.0]]), {("w", 0, 1): gram}, largest, [2], 8, 8)
    assert (W != 0).tolist() == [[True, True, False]] and error == pytest.approx(1 / 14, abs=0.01)


@pytest.mark.parametrize("case", ["with batch norm", "attention", "recurrent, and experts"])
def test_several_passes_give_the_curves_of_one(case: str):
    problem = problem_of(case, "sparsity=0.6")
    sites = sites_of(problem)
    assert len(in_passes(problem, sites, 2**30)) == 1 and len(in_passes(problem, sites, 0)) == len(sites)
    one, several = (report_of(LayerErrors(memory=memory), problem) for memory in (2**30, 0))
    assert one[0] == several[0]
    assert one[1]["error"].keys() == {layer.name for layer in problem.scope}
    for name, curve in one[1]["error"].items():
        assert torch.allclose(torch.tensor(curve), torch.tensor(several[1]["error"][name]), rtol=1e-3, atol=1e-5)


def test_together_sites_visit_what_each_visits():
    sites = sites_of(problem_of("attention"))
    whole = together(sites)
    assert whole.visits == sum(site.visits for site in sites)
    assert set(whole.source) == {part for site in sites for part in site.source}
    assert not together([*sites, replace(sites[0], visits=0)]).visits


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(self.unused(x) if float(x.max()) > 50 else x)


def test_a_layer_without_inputs_has_the_share_of_squared_weights_that_goes_as_error():
    reaches = Calibration.of(torch.cat([torch.randn(8, 4), torch.full((1, 4), 99.0)]))  # else it leaves the scope
    problem = make_problem(Unused(), Budget(params=20), Unstructured(), calibration=reaches)
    problem = replace(problem, calibration=Calibration.of(torch.randn(8, 4)))
    _, report = report_of(LayerErrors(densities=(0.0, 0.25, 0.5)), problem)
    squares = problem.dense["unused.weight"].square().flatten().sort().values
    for density, error in report["error"]["unused.weight"]:
        gone = 16 - round(density * 16)
        assert error == pytest.approx(float(squares[:gone].sum() / squares.sum()), rel=1e-4)


def test_inputs_too_large_to_be_squared_count_as_none():
    problem = make_problem(
        nn.Linear(4, 4), Budget(params=8), Unstructured(), calibration=Calibration.of(1e25 * torch.randn(8, 4))
    )
    kept, report = report_of(LayerErrors(), problem)
    assert sum(kept.values()) == 8
    assert all(0 <= error <= 1 for _, error in report["error"]["weight"])


def test_outputs_weigh_a_layer_by_what_its_refit_does_to_the_net():
    problem = tiny(12)
    _, report = report_of(LayerErrors(weighting="outputs"), problem)
    inputs, _ = problem.inputs().batch(0)
    dense = call(problem.model, {}, inputs)
    uniform = problem.budget.project({layer.name: 1.0 for layer in problem.scope})
    for layer in problem.scope:
        density, error, loss = report["loss"][layer.name]
        assert [density, error] in report["error"][layer.name] and loss > 0
        nearest = min((d for d, _ in report["error"][layer.name]), key=lambda d: abs(d - uniform[layer.name]))
        assert density == nearest
    assert dense.shape == (20, 3)


def test_a_fine_curve_falls_through_every_measured_point():
    measured = [[0.01, 0.9], [0.1, 0.3], [0.3, 0.32], [0.6, 0.05]]
    curve = fine(measured)
    assert [0.1, 0.3] in curve and [0.6, 0.05] in curve and curve[0] == [0.01, 0.9]
    assert all(a < c and b >= d for (a, b), (c, d) in itertools.pairwise(curve))
    assert all(d < 1 and e > 0 for d, e in curve)
    halfway = next(e for d, e in curve if d == pytest.approx(0.01 * 10**0.5))
    assert halfway == pytest.approx((0.9 * 0.3) ** 0.5)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"densities": (0.1, 0.5)}, "densities"),
        ({"densities": (0.0, 0.5, 0.3)}, "densities"),
        ({"densities": 0.5}, "densities"),
        ({"iterations": 0}, "iterations"),
        ({"refinement": -1}, "refinement"),
        ({"memory": -1}, "memory"),
        ({"weighting": "none"}, "weighting='none': relative, log, outputs are accepted"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], named: str):
    with pytest.raises(UsageError, match=named):
        LayerErrors(**options)
