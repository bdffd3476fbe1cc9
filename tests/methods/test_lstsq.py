"""Least squares: what is kept of a layer answers as near to the dense net as it can."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from allot.errors import UsageError
from allot.methods.lstsq import LeastSquares
from allot.network.call import call
from allot.pruning.prune import prune
from allot.pruning.setup import make_problem
from allot.run.calibration import Calibration
from allot.run.driver import drive
from allot.run.patterns import Unstructured
from allot.run.problem import Candidate, Problem
from contract.cases import CASES, before, problem_of


def one_layer(*, bias: bool) -> tuple[Problem, Candidate, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 3, bias=bias)).double().eval()
    inputs = torch.randn(64, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64) + 1
    problem = make_problem(model, _half(), Unstructured(), calibration=Calibration.of(inputs, batch_size=16))
    candidate = before("lstsq", problem)
    return problem, candidate, problem.inputs().pick(range(64))


def _half() -> Any:
    from allot.budget.budget import Budget

    return Budget(sparsity=0.5)


@pytest.mark.parametrize("bias", [True, False])
def test_one_layer_is_fitted_as_a_dense_solver_fits_each_row(bias: bool):
    problem, candidate, x = one_layer(bias=bias)
    found = drive(LeastSquares(batches=4, iterations=200), problem, candidate).effective(problem)
    with torch.no_grad():
        y = problem.model(x)
    for row, mask in enumerate(candidate.masks["0.weight"]):
        columns = x[:, mask]
        if bias:
            columns = torch.cat([columns, torch.ones(64, 1, dtype=torch.float64)], 1)
        best = torch.linalg.lstsq(columns, y[:, row : row + 1]).solution[:, 0]
        ours = found["0.weight"][row][mask]
        if bias:
            ours = torch.cat([ours, found["0.bias"][row : row + 1]])
        assert torch.allclose(ours, best, atol=1e-6)


def error(problem: Problem, candidate: Candidate) -> float:
    x = problem.inputs().pick(range(len(problem.inputs())))
    with torch.no_grad():
        dense, ours = (call(problem.model, tensors, x) for tensors in ({}, candidate.effective(problem)))
    return float((ours - dense).square().mean() / dense.square().mean())


@pytest.mark.parametrize("name", ["lstsq", "lstsq on channels"])
@pytest.mark.parametrize("case", ["without batch norm", "linear chain"])
def test_a_net_answers_nearer_to_the_dense_one_than_before(name: str, case: str):
    problem = problem_of(case, "sparsity=0.4", name=name)
    pruned = before(name, problem)
    assert error(problem, drive(LeastSquares(), problem, pruned)) < 0.7 * error(problem, pruned)


def test_more_iterations_fit_better_and_a_layer_that_is_whole_stays():
    problem = problem_of("linear chain", "sparsity=0.4")
    pruned = before("lstsq", problem)
    few, many = (error(problem, drive(LeastSquares(iterations=i), problem, pruned)) for i in (1, 50))
    assert many < few
    whole = replace(
        pruned,
        masks={name: torch.ones_like(mask) for name, mask in pruned.masks.items()},
        allocation=Candidate.dense(problem).allocation,
    )
    found = drive(LeastSquares(), problem, whole)
    for name, value in found.effective(problem).items():
        assert torch.allclose(value, problem.dense[name], atol=1e-5)


def test_tied_weights_beside_several_biases_are_left_alone():
    problem = problem_of("tied weights", "sparsity=0.4")
    found = drive(LeastSquares(), problem, before("lstsq", problem))
    assert "0.weight" not in found.tensors and "3.weight" in found.tensors


@pytest.mark.parametrize("options", [{"batches": 0}, {"iterations": 0}, {"iterations": 1.5}])
def test_options_out_of_range_are_one_clear_line(options: dict[str, Any]):
    with pytest.raises(UsageError, match=next(iter(options))):
        LeastSquares(**options)


def test_it_is_a_repair_by_name():
    case = CASES["with batch norm"]
    result = prune(case.make(), case.inputs(), "sparsity=0.5", allocate="uniform", repair="lstsq,bn", batch_size=8)
    assert result.report()["repair"] == ["lstsq", "bn"]
