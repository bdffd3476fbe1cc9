"""What a result, and a directory that is opened again, may not get away with."""

import dataclasses
import json

import pytest
import torch
from torch import nn

import allot
from allot.budget.allocation import Allocation


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


@dataclasses.dataclass(frozen=True)
class Tenth:
    """An allocator that keeps less than it was asked to."""

    role = "allocate"
    needs_data = False

    def init(self, problem, candidate):
        return {"step": 0, "steps": 0}

    def step(self, problem, candidate, state):
        raise AssertionError

    def done(self, state):
        return True

    def finish(self, problem, candidate, state):
        tenth = {layer.name: layer.total // 10 for layer in problem.scope}
        return dataclasses.replace(candidate, allocation=Allocation.of(tenth, candidate.allocation.total))


def test_a_result_that_keeps_less_than_the_sparsity_asks_for_is_refused():
    with pytest.raises(allot.BudgetError, match="broken"):
        allot.prune(net(), None, "sparsity=0.5", allocate=Tenth(), repair="none")


def test_a_result_outside_the_bounds_of_a_layer_is_refused():
    rules = allot.Rules(min_density={"0": 0.3})
    with pytest.raises(allot.BudgetError, match="bounds"):
        allot.prune(net(), None, "params=50%", allocate=Tenth(), repair="none", rules=rules)


def test_a_slack_second_limit_does_not_hide_a_sparsity_out_of_reach():
    with pytest.raises(allot.BudgetError, match=r"Nearest that can be met: sparsity=0\.5,bytes=99%"):
        allot.prune(net(), None, allot.Budget(sparsity=0.1, bytes="99%"), pattern="2:4", repair="none")


def test_a_finished_run_is_read_from_what_is_certified_not_from_the_report(tmp_path):
    kept = allot.prune(net(), None, "sparsity=0.5", repair="none", save_to=tmp_path / "run").allocation.kept
    path = tmp_path / "run" / "report.json"
    told = json.loads(path.read_text())
    told["layers"][0]["kept"] = 3
    path.write_text(json.dumps(told))
    assert allot.prune(net(), None, "sparsity=0.5", repair="none", save_to=tmp_path / "run").allocation.kept == kept


def test_another_function_of_the_same_name_is_another_configuration(tmp_path):
    def scored(sign):
        return lambda layer, weight, evidence: sign * weight.abs()

    allot.prune(net(), None, "sparsity=0.5", score=scored(1), repair="none", save_to=tmp_path / "run")
    allot.prune(net(), None, "sparsity=0.5", score=scored(1), repair="none", save_to=tmp_path / "run")
    with pytest.raises(allot.UsageError, match="another configuration"):
        allot.prune(net(), None, "sparsity=0.5", score=scored(-1), repair="none", save_to=tmp_path / "run")


def test_other_samples_at_the_end_are_other_data(tmp_path):
    data = torch.randn(100, 8)
    allot.prune(net(), data, "sparsity=0.5", repair="bias", save_to=tmp_path / "run")
    data[-1] = 0
    with pytest.raises(allot.UsageError, match="another configuration"):
        allot.prune(net(), data, "sparsity=0.5", repair="bias", save_to=tmp_path / "run")


def test_a_finished_run_is_scored_when_test_data_comes_later(tmp_path):
    data = [(torch.randn(8), i % 4) for i in range(8)]
    assert allot.prune(net(), None, "sparsity=0.5", repair="none", save_to=tmp_path / "run").scores is None
    again = allot.prune(net(), None, "sparsity=0.5", repair="none", save_to=tmp_path / "run", test=data)
    assert again.scores is not None and again.scores["samples"] == 8


def test_nan_in_the_calibration_inputs_is_refused_before_a_run_begins(tmp_path):
    data = torch.randn(64, 8)
    data[3, 2] = float("nan")
    with pytest.raises(allot.UsageError, match="nan or infinite"):
        allot.prune(net(), data, "sparsity=0.5", repair="bias", save_to=tmp_path / "run")
    assert not (tmp_path / "run").exists()
