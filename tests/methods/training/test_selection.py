"""Selection by a score of the inputs: a batch a step, and a state of a few numbers a layer."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from allot import METHODS, Budget, Calibration, Unstructured, prune
from allot.methods.training.selection import Selection
from allot.pruning.setup import make_problem
from allot.run.driver import Progress, drive
from allot.run.problem import Candidate, Problem, finished
from allot.run.scores import SCORES
from contract.cases import same

GENERATOR = torch.Generator().manual_seed(0)
INPUTS = torch.randn(10, 3, 8, 8, generator=GENERATOR)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 64)
    ).eval()


def posed(score: Any = SCORES["wanda"]) -> tuple[Problem, Candidate]:
    inputs = Calibration.of(INPUTS, batch_size=4)
    problem = make_problem(net(), Budget(sparsity=0.5), Unstructured(), calibration=inputs, score=score)
    return problem, drive(METHODS["uniform"], problem, Candidate.dense(problem))


def test_every_batch_of_statistics_is_a_step_before_the_layers():
    problem, candidate = posed()
    seen: list[Progress] = []
    found = drive(Selection(), problem, candidate, on_step=seen.append)
    assert [(step.step, step.steps, step.metrics["forward"]) for step in seen] == [
        (1, 5, 4), (2, 5, 3), (3, 5, 3), (4, 5, 0), (5, 5, 0),
    ]  # fmt: skip
    assert sorted(found.masks) == ["0.weight", "4.weight"]
    seen.clear()
    drive(Selection(), *posed(SCORES["magnitude"]), on_step=seen.append)
    assert [(step.step, step.steps) for step in seen] == [(1, 2), (2, 2)]


def test_masks_are_those_of_the_score_by_the_inputs_of_all_samples():
    problem, candidate = posed()
    found = drive(Selection(), problem, candidate)
    columns = nn.functional.unfold(INPUTS, 3).double().square().sum((0, 2)).view(3, 3, 3)
    hidden = problem.model[:4](INPUTS).double().square().sum(0)
    for name, squares in (("0.weight", columns), ("4.weight", hidden)):
        score = (problem.dense[name].abs() * squares.sqrt()).flatten()
        kept = candidate.allocation.kept[name]
        assert set(score.topk(kept).indices.tolist()) == set(found.masks[name].flatten().nonzero().flatten().tolist())


def test_the_state_holds_a_number_an_input_and_not_one_a_weight():
    problem, candidate = posed()
    state = Selection().init(problem, candidate)
    for _ in range(problem.inputs().batches):
        Selection().step(problem, candidate, state)
    tensors = [part for of_layer in state["squares"]["inputs"].values() for part in of_layer.values()]
    assert sum(part.nbytes for part in tensors) == 8 * (27 + 32)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    assert len(buffer.getvalue()) < 4096 < sum(layer.total for layer in problem.scope) * 8


def test_a_state_loaded_between_batches_goes_on_to_the_same_bits():
    problem, candidate = posed()
    state = Selection().init(problem, candidate)
    while not finished(state):
        Selection().step(problem, candidate, state)
        buffer = io.BytesIO()
        torch.save(state, buffer)
        state = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    assert same(Selection().finish(problem, candidate, state), drive(Selection(), problem, candidate))


def test_a_score_may_ask_for_norms_of_one_layer_only():
    def mixed(layer: Any, weight: Tensor, evidence: Any) -> Tensor:
        return SCORES["magnitude" if layer.name == "0.weight" else "wanda"](layer, weight, evidence)

    problem, candidate = posed(mixed)
    found = drive(Selection(), problem, candidate)
    for name, score in (("0.weight", "magnitude"), ("4.weight", "wanda")):
        assert torch.equal(found.masks[name], drive(Selection(), *posed(SCORES[score])).masks[name])


@pytest.mark.parametrize("pattern", ["unstructured", "rows"])
def test_progress_of_a_run_counts_batches(pattern: str):
    steps: list[Progress] = []
    result = prune(
        net(), INPUTS, "sparsity=0.5", score="wanda", pattern=pattern, repair="none", batch_size=2, on_step=steps.append
    )
    assert [step.steps for step in steps if step.stage == "select"] == [7] * 7
    assert result.log.forward == len(INPUTS) - 1  # one is watched
