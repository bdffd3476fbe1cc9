"""Distillation as a repair: it brings the outputs back, masks move within their counts, draws are by seed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import allot
from allot.budget.budget import Budget
from allot.errors import UsageError
from allot.methods import METHODS
from allot.methods.distill import Distill
from allot.methods.training.distillation import Training
from allot.methods.training.schedule import Schedule
from allot.methods.training.selection import Selection
from allot.pruning.setup import make_problem
from allot.run.calibration import Calibration
from allot.run.driver import drive
from allot.run.patterns import NM, Pattern, Unstructured
from allot.run.problem import Candidate, Problem
from contract.cases import CASES, bits, problem_of


def selected(problem: Problem) -> Candidate:
    return drive(Selection(), problem, drive(METHODS["uniform"], problem, Candidate.dense(problem)))


def distilled(problem: Problem, method: Distill) -> tuple[Candidate, Candidate, list[float]]:
    """Before, after, and the loss of every step."""
    before, losses = selected(problem), []
    after = drive(method, problem, before, on_step=lambda progress: losses.append(progress.metrics["loss"]))
    return before, after, losses


@pytest.mark.parametrize("case", ["with batch norm", "without batch norm", "attention", "tied weights"])
def test_the_sparse_net_comes_to_answer_like_the_dense_one(case: str):
    problem = problem_of(case, "sparsity=0.5", batch_size=20)
    _, after, losses = distilled(problem, Distill(Training(steps=60)))
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert after.allocation.kept == {name: int(mask.sum()) for name, mask in after.masks.items()}


def test_masks_stay_with_freeze_at_0_and_change_within_their_counts_otherwise():
    problem = problem_of("without batch norm", "sparsity=0.7")
    before, fixed, _ = distilled(problem, Distill(Training(steps=30), Schedule(freeze_at=0.0)))
    assert all(torch.equal(fixed.masks[name], mask) for name, mask in before.masks.items())
    _, moving, _ = distilled(problem, Distill(Training(steps=30, learning_rate=0.2), Schedule(every=2)))
    assert any(not torch.equal(moving.masks[name], mask) for name, mask in before.masks.items())
    for after in (fixed, moving):
        assert after.allocation.kept == before.allocation.kept
        assert {name: int(mask.sum()) for name, mask in after.masks.items()} == before.allocation.kept


def test_a_ramp_ends_on_the_allocation_it_was_given():
    problem = problem_of("with batch norm", "sparsity=0.8")
    before, after, _ = distilled(problem, Distill(Training(steps=20), Schedule(every=2, ramp=4.0)))
    assert after.allocation.kept == before.allocation.kept
    assert {name: int(mask.sum()) for name, mask in after.masks.items()} == before.allocation.kept


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured()])
def test_the_pattern_holds_while_masks_move(pattern: Pattern):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    problem = make_problem(model, Budget(sparsity=0.5), pattern, calibration=Calibration.of(torch.randn(32, 8)))
    _, after, _ = distilled(problem, Distill(Training(steps=20, learning_rate=0.2), Schedule(every=2)))
    for layer in problem.scope:
        per_group = layer.matrix(after.masks[layer.name]).unflatten(1, (-1, 4)).sum(-1)
        assert bool((per_group == 2).all()) == isinstance(pattern, NM)


class Drawn(torch.utils.data.Dataset[Tensor]):
    """Samples with noise of their own each time that they are read."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Tensor:
        return torch.full((6,), index / 12) + torch.rand(6)


def test_what_data_and_model_draw_is_decided_by_the_seed():
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3)).eval()
    options = {"distill": {"steps": 6}}

    def run(seed: int) -> dict[str, Tensor]:
        torch.rand(1)  # the caller's own draws do not matter
        arguments: dict[str, Any] = {"allocate": "uniform", "repair": "distill,bn", "options": options, "seed": seed}
        return allot.prune(model, Drawn(), "sparsity=0.5", **arguments).state_dict()

    first, again, other = run(1), run(1), run(2)
    assert all(bits(first[name]) == bits(again[name]) for name in first)
    assert any(bits(first[name]) != bits(other[name]) for name in first)


def test_options_reach_training_and_schedule_by_one_name_each():
    problem = problem_of("linear chain")
    arguments: dict[str, Any] = {"allocate": "uniform", "repair": "distill", "batch_size": 8}
    inputs = CASES["linear chain"].inputs()
    result = allot.prune(
        problem.model,
        inputs,
        "sparsity=0.5",
        options={"distill": {"steps": 4, "learning_rate": 0.05, "every": 2, "loss": "mse"}},
        **arguments,
    )
    # 20 samples, of which two are watched, are 3 batches of 6; the teacher runs once on each
    assert result.log.backward == 18 + 6 and result.log.forward == 2 * 18 + 6
    wanda = allot.prune(
        problem.model,
        inputs,
        "sparsity=0.5",
        score="wanda",
        options={"distill": {"steps": 4, "learning_rate": 0.05}},
        **arguments,
    )
    # the score looks at all samples to select, and once more, at the pruned net, to train
    assert wanda.log.forward == 2 * 18 + 6 + 2 * 18
    with pytest.raises(UsageError, match="did you mean 'steps'"):
        allot.prune(problem.model, inputs, "sparsity=0.5", options={"distill": {"step": 4}}, **arguments)
