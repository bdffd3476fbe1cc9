"""Scores by the inputs of layers, block by block: the masks of the whole net, a batch a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import allot
from allot import METHODS, Budget, Calibration, PatternError, UsageError, prune
from allot.errors import Stopped
from allot.methods.layerwise.part_names import renamed_text
from allot.methods.layerwise.streamed import Streamed
from allot.methods.training.selection import Selection
from allot.pruning.setup import make_problem
from allot.run import patterns
from allot.run.driver import Progress, drive
from allot.run.problem import Candidate, Problem, finished
from allot.run.scores import SCORES
from contract.cases import same
from methods.layerwise.nets import NETS, TRANSFORMERS, Case, Encoder, words
from methods.layerwise.test_streamed_masks import reloaded

CPU = torch.device("cpu")
STREAMED = Streamed(Selection(by_inputs=True), CPU)


def posed(case: Case, *, pattern: str = "unstructured", score: Any = SCORES["wanda"]) -> tuple[Problem, Candidate]:
    inputs = Calibration.of(case.inputs(), batch_size=4)
    problem = make_problem(case.model(), Budget(sparsity=0.5), patterns.parse(pattern), calibration=inputs, score=score)
    return problem, drive(METHODS["uniform"], problem, Candidate.dense(problem))


def by_name(layer: Any, weight: Tensor, evidence: Any) -> Tensor:
    """Depends on the name that the layer has in the model, and on the seed."""
    sign = -1 if "attention" in layer.name or layer.name.startswith("stage2") else 1
    return sign * SCORES["wanda"](layer, weight, evidence) + SCORES["random"](layer, weight, evidence) / 100


@pytest.mark.parametrize("score", [SCORES["wanda"], by_name])
@pytest.mark.parametrize("pattern", ["unstructured", "rows"])
@pytest.mark.parametrize("net", NETS)
def test_masks_are_those_of_the_whole_net(net: str, pattern: str, score: Any):
    problem, candidate = posed(NETS[net], pattern=pattern, score=score)
    whole, streamed = drive(Selection(), problem, candidate), drive(STREAMED, problem, candidate)
    assert same(streamed, whole)


@pytest.mark.parametrize("net", ["llama"])
def test_masks_of_transformers_are_those_of_the_whole_net(net: str):
    problem, candidate = posed(TRANSFORMERS[net], pattern="rows")
    assert same(drive(STREAMED, problem, candidate), drive(Selection(), problem, candidate))


def test_each_batch_of_a_block_is_a_step_and_steps_are_known_from_the_start():
    problem, candidate = posed(NETS["encoder"])
    seen: list[Progress] = []
    log = allot.run.store.Log()
    drive(STREAMED, problem, candidate, on_step=seen.append, log=log)
    batches, parts = problem.inputs().batches, 4  # before the blocks, two blocks, behind them
    assert [(step.step, step.steps) for step in seen] == [
        (i + 1, batches * parts + len(problem.scope)) for i in range(batches * parts + len(problem.scope))
    ]
    assert log.forward <= len(problem.inputs()) * 1.5  # once through the net, and through the modules outside again


def test_a_state_that_is_loaded_goes_on_to_the_same_bits():
    problem, candidate = posed(NETS["encoder"])
    method, state = STREAMED, STREAMED.init(problem, candidate)
    for stop in (2, 5, 9):
        while state["step"] < stop:
            method.step(problem, candidate, state)
        method, state = Streamed(Selection(by_inputs=True), CPU), reloaded(state)
    while not finished(state):
        method.step(problem, candidate, state)
    assert same(method.finish(problem, candidate, state), drive(STREAMED, problem, candidate))


def test_a_streamed_run_selects_block_by_block_and_resumes(tmp_path: Path):
    case = NETS["encoder"]
    asked: dict[str, Any] = {
        "method": "uniform",
        "score": "wanda",
        "pattern": "rows",
        "batch_size": 4,
        "repair": "none",
    }
    steps: list[Progress] = []
    whole = prune(case.model(), case.inputs(), "sparsity=0.5", **asked)
    result = prune(case.model(), case.inputs(), "sparsity=0.5", **asked, stream="cpu", on_step=steps.append)
    assert same(result.candidate, whole.candidate)
    assert result.report()["score"] == "wanda"
    calls = iter(range(100))
    with pytest.raises(Stopped):
        prune(
            case.model(), case.inputs(), "sparsity=0.5", **asked, stream="cpu", save_to=tmp_path / "run",
            should_stop=lambda: next(calls) > len(steps) // 2,
        )  # fmt: skip
    assert (tmp_path / "run" / "state-select.pt").exists()
    again = prune(case.model(), case.inputs(), "sparsity=0.5", **asked, stream="cpu", save_to=tmp_path / "run")
    assert same(again.candidate, whole.candidate)


def test_a_repair_after_it_streams_on():
    case = NETS["stages"]
    asked: dict[str, Any] = {"method": "uniform", "score": "wanda", "repair": "bias", "batch_size": 4}
    streamed = prune(case.model(), case.inputs(), "sparsity=0.5", **asked, stream="cpu")
    whole = prune(case.model(), case.inputs(), "sparsity=0.5", **asked)
    assert all(torch.equal(mask, whole.masks[name]) for name, mask in streamed.masks.items())
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(streamed.state_dict()[name], value, rtol=1e-4, atol=1e-5)


class Standardised(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        # zeros stay zeros: a layer whose zeros do not arrive leaves the scope
        return nn.functional.linear(x, self.weight / self.weight.std(), self.bias)


class Odd(Encoder):
    def __init__(self) -> None:
        super().__init__()
        self.layers[1].mlp[0] = Standardised(8, 12)


def test_errors_name_layers_as_the_model_does():
    case = Case(Odd, words)
    with pytest.raises(UsageError, match=r"^select: layers\.1\.mlp\.0\.weight: Standardised is not linear"):
        prune(case.model(), case.inputs(), "sparsity=0.5", score="wanda", stream="cpu")

    def broken(layer: Any, weight: Tensor, evidence: Any) -> Tensor:
        score = SCORES["wanda"](layer, weight, evidence)
        if layer.name == "layers.0.mlp.2.weight":
            raise PatternError(f"{layer.name}: no")
        return score

    case = NETS["encoder"]
    with pytest.raises(PatternError, match=r"layers\.0\.mlp\.2\.weight: no"):
        prune(case.model(), case.inputs(), "sparsity=0.5", score=broken, stream="cpu")


def test_names_in_a_text_are_replaced_as_whole_words():
    names = {"steps.0.w": "a.w", "steps.0.w.w": "b"}
    assert renamed_text("steps.0.w, steps.0.w.w: xsteps.0.w steps.0.w1 steps.0.w.", names) == (
        "a.w, b: xsteps.0.w steps.0.w1 a.w."
    )
