"""A training is left out where the net is near enough, or fits its inputs already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from allot.errors import Stopped, UsageError
from allot.methods.distill import Distill
from allot.methods.training.distillation import Training
from allot.methods.training.where_it_helps import Helps
from allot.pruning.prune import prune
from allot.pruning.result import Result
from contract.cases import CASES, bits

CASE = CASES["attention"]
INPUTS = torch.randn(64, *CASE.inputs().shape[1:], generator=torch.Generator().manual_seed(3))


def trained(*whens: Helps, **more: Any) -> Result:
    repair = tuple(Distill(Training(steps=4, learning_rate=0.02), helps=when) for when in whens)
    return prune(CASE.make(), INPUTS, "sparsity=0.6", repair=repair, batch_size=16, **more)


def rows_of(result: Result) -> list[dict[str, Any]]:
    return result.report()["diagnostics"]["helps"]


def backward(result: Result) -> int:
    return result.log.backward


def test_the_share_is_the_distance_on_training_inputs_over_that_on_watched_ones():
    (row,) = rows_of(trained(Helps(unfitted=1e-9)))
    before = trained()
    problem = before.problem
    net, dense = before.model().eval(), problem.model.eval()
    watched = problem.watch.inputs.indices

    def distance(indices: tuple[int, ...]) -> float:
        batch = INPUTS[list(indices)]
        with torch.no_grad():
            ours, theirs = (model(batch).log_softmax(-1) for model in (net, dense))
        return float((theirs.exp() * (theirs - ours)).sum(-1).double().mean())

    used = problem.inputs().indices[: len(watched)]
    assert row["distance"] == pytest.approx(distance(watched), rel=1e-4)
    assert row["share"] == pytest.approx(distance(used) / distance(watched), rel=1e-4)


@pytest.mark.parametrize(("when", "runs"), [
    (Helps(unfitted=1e-9), True), (Helps(unfitted=100.0), False), (Helps(far=1e-9), True), (Helps(far=1e9), False),
])  # fmt: skip
def test_it_runs_where_the_net_is_far_and_does_not_fit_its_inputs(when: Helps, runs: bool):
    result = trained(when)
    assert [row["ran"] for row in rows_of(result)] == [runs]
    assert (backward(result) > 0) is runs
    if not runs:
        assert {n: bits(v) for n, v in result.state_dict().items()} == {
            n: bits(v) for n, v in trained().state_dict().items()
        }


def test_the_share_is_that_of_the_net_before_any_training():
    first, second = rows_of(trained(Helps(unfitted=1e-9), Helps(unfitted=1e-9)))
    assert first["share"] == second["share"] and first["distance"] != second["distance"]


@pytest.mark.parametrize("steps", [1, 6, 8])
def test_a_run_stopped_anywhere_ends_as_an_uninterrupted_one(steps: int, tmp_path: Path):
    whens = Helps(unfitted=1e-9), Helps(far=1e9)
    whole = trained(*whens, save_to=tmp_path / "whole")
    told = iter([False] * steps)
    with pytest.raises(Stopped):
        trained(*whens, save_to=tmp_path / "run", should_stop=lambda: next(told, True))
    resumed = trained(*whens, save_to=tmp_path / "run")
    assert rows_of(resumed) == rows_of(whole)
    assert resumed.report()["watch"] == whole.report()["watch"]
    assert {n: bits(v) for n, v in resumed.state_dict().items()} == {n: bits(v) for n, v in whole.state_dict().items()}


def test_what_is_left_out_is_said_with_the_reason():
    near, fitted_inputs = (trained(when).report() for when in (Helps(far=1e9), Helps(unfitted=100.0)))
    assert near["guard"] == [
        f"Distill left out: the net is near enough ({near['diagnostics']['helps'][0]['distance']:.3g})."
    ]
    assert "Distill left out: the net fits its inputs" in fitted_inputs["guard"][0]
    assert trained(Helps(far=1e-9)).report()["guard"] == []


def test_values_out_of_range_are_refused():
    with pytest.raises(UsageError, match="far"):
        Helps(far=-1)
