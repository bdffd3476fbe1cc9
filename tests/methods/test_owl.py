"""OWL against its equations, computed by hand."""

from __future__ import annotations

import doctest

import pytest
import torch
from torch import nn

from allot.budget.budget import Budget
from allot.errors import UsageError
from allot.methods import owl
from allot.methods.owl import Owl, owl_densities
from allot.pruning.setup import make_problem
from allot.run.calibration import Calibration
from allot.run.driver import drive
from allot.run.patterns import Unstructured
from allot.run.problem import Candidate, Problem


def diagonal(first: list[float], second: list[float], kept: int) -> Problem:
    """Two layers of 10 x 1 and 1 x 10 weights; inputs of the first have norm 2."""
    model = nn.Sequential(nn.Linear(1, 10, bias=False), nn.Linear(10, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor(first)[:, None])
        model[1].weight.copy_(torch.tensor(second)[None])
    calibration = Calibration.of(torch.ones(4, 1), batch_size=2)
    return make_problem(model, Budget(params=kept), Unstructured(), calibration=calibration)


def test_outliers_are_weights_times_input_norms_above_a_multiple_of_their_mean():
    # the second layer reads w of the first, so that its norms are 2 |w|: scores 2 w_1 and 2 w_1 w_2
    problem = diagonal([1.0] * 9 + [6.0], [6.0, 6.0, *[1.0] * 7, 0.5], 10)
    candidate = drive(Owl(multiple=2.0), problem, Candidate.dense(problem))
    report = candidate.diagnostics["owl"]
    # means 3 and 4.4: above 6 is one of ten (12), above 8.8 are two (12, 12)
    assert report["outliers"] == {"0": 0.1, "1": 0.2}
    assert report["density"] == {"0": pytest.approx(0.42), "1": pytest.approx(0.58)}
    assert candidate.allocation.kept in ({"0.weight": 4, "1.weight": 6},)


def test_equal_blocks_are_uniform():
    problem = diagonal([1.0] * 10, [1.0] * 10, 8)
    assert drive(Owl(), problem, Candidate.dense(problem)).allocation.kept == {"0.weight": 4, "1.weight": 4}


@pytest.mark.parametrize("mean", [0.02, 0.05, 0.5, 0.95])
def test_densities_have_the_mean_and_are_never_below_nothing(mean: float):
    found = owl_densities({"a": 0.0, "b": 0.1, "c": 0.11, "d": 0.12}, mean, 0.08)
    assert sum(found.values()) / 4 == pytest.approx(mean)
    assert all(density >= 0 for density in found.values()) and found["a"] < found["b"] < found["c"] < found["d"]
    assert found["d"] - found["a"] == pytest.approx(min(0.16, mean))


def test_examples_in_docstrings_run():
    assert doctest.testmod(owl).failed == 0


@pytest.mark.parametrize("options", [{"multiple": -1}, {"spread": 2}, {"spread": "wide"}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(UsageError, match=next(iter(options))):
        Owl(**options)
