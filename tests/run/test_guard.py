"""The guard: no stage makes a net worse without a word, and none that does is kept."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import allot
from allot.errors import Stopped
from allot.pruning.prune import prune
from allot.pruning.result import Result
from allot.run.fidelity import Fidelity
from allot.run.guard import Guard
from allot.run.problem import Candidate, Problem
from allot.run.store import State
from contract.cases import CASES, bits

CASE = CASES["with batch norm"]
INPUTS = torch.randn(64, *CASE.inputs().shape[1:], generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Scaled:
    """A repair, or an allocator, that multiplies every weight by a number that changes with each step."""

    factors: tuple[float, ...]
    role: str = "repair"
    watched: bool = False
    starts_over: bool = False

    needs_data = False
    allocates = ("weights", "channels")

    def init(self, problem: Problem, candidate: Candidate) -> State:
        return {"step": 0, "steps": len(self.factors)}

    def step(self, problem: Problem, candidate: Candidate, state: State) -> dict[str, float]:
        state["step"] += 1
        return {"forward": 0, "backward": 0}

    def finish(self, problem: Problem, candidate: Candidate, state: State) -> Candidate:
        factor = self.factors[state["step"] - 1]
        tensors = {layer.name: factor * candidate.tensor(problem, layer.name) for layer in problem.scope}
        if self.role == "allocate":
            total = candidate.allocation.total
            counts = problem.budget.counts(dict.fromkeys(total, 1.0))
            candidate = replace(candidate, allocation=allot.Allocation.of(counts, total))
        return replace(candidate, tensors={**candidate.tensors, **tensors})


def pruned(*repair: Any, **more: Any) -> Result:
    return prune(CASE.make(), INPUTS, "sparsity=0.3", repair=repair, batch_size=16, **more)


def state_of(result: Result) -> dict[str, Any]:
    return {name: bits(value) for name, value in result.state_dict().items()}


def entries(result: Result) -> list[dict[str, Any]]:
    return result.report()["fidelity"]


def distance(result: Result) -> float:
    return entries(result)[-1]["kl"]


# stages


@pytest.mark.parametrize("factor", [3.0, 1e18, float("nan")])
def test_a_stage_that_made_the_net_worse_is_undone_and_said(factor: float):
    plain, guarded = pruned(), pruned(Scaled((factor,)))
    assert state_of(guarded) == state_of(plain)
    (sentence,) = guarded.report()["guard"]
    assert sentence.startswith("Scaled made it worse: KL ") and sentence.endswith("; kept the selected weights.")
    assert [entry["stage"] for entry in entries(guarded) if entry.get("undone")] == ["repair-1-Scaled"]
    assert distance(guarded) == distance(plain)


@pytest.mark.parametrize(("starts_over", "shift"), [(False, 0.2), (True, 0.2), (True, -0.2), (True, 0.0)])
def test_a_net_that_started_over_has_to_be_nearer_by_its_mean(
    starts_over: bool, shift: float, monkeypatch: pytest.MonkeyPatch
):
    noise = torch.tensor([1.0, -1.0] * 4)  # a standard error of 0.38

    def distances(guard: Guard, candidate: Candidate) -> Fidelity:
        return Fidelity("kl", 2 + (noise + shift if candidate.tensors else torch.zeros(8)), None)

    monkeypatch.setattr(Guard, "fidelity", distances)
    said = pruned(Scaled((0.5,), starts_over=starts_over)).report()["guard"]
    undone = starts_over and shift > 0
    assert said == (["Scaled made it worse: KL 2 -> 2.2; kept the selected weights."] if undone else [])


def test_a_stage_that_made_it_better_is_kept():
    better = pruned("admm")
    assert not better.report()["guard"]
    assert [entry["stage"] for entry in entries(better)] == ["dense", "select", "repair-1-admm"]
    assert distance(better) < entries(better)[1]["kl"]


def test_later_stages_begin_with_the_net_that_was_kept():
    assert state_of(pruned(Scaled((5.0,)), "bias")) == state_of(pruned("bias"))
    said = pruned("bias", Scaled((5.0,))).report()["guard"]
    assert len(said) == 1 and said[0].endswith("; kept bias.")


def test_steps_of_50_times_the_weights_are_undone():
    options = {"distill": {"steps": 5, "learning_rate": 50.0}}
    assert state_of(pruned("distill", options=options)) == state_of(pruned())


def test_statistics_that_do_not_fit_are_undone():
    """Batch statistics of inputs that are all alike say nothing of those that the net was trained on."""
    model = CASE.make()
    alike = INPUTS[:1] + 1e-3 * INPUTS
    result = prune(model, alike, "sparsity=0.01", repair="bn", batch_norm="batch", batch_size=16)
    assert [sentence.split()[0] for sentence in result.report()["guard"]] == ["bn"]


def test_a_channel_repair_that_inflates_a_tensor_is_undone():
    chain = {"method": "uniform", "pattern": "channels", "batch_size": 16}
    case = CASES["with batch norm"]
    plain = prune(case.make(), INPUTS, "macs=60%", repair=[], **chain)
    inflated = prune(case.make(), INPUTS, "macs=60%", repair=[Scaled((1e4,))], **chain)
    assert state_of(inflated) == state_of(plain) and inflated.report()["guard"]


def test_weights_that_an_allocator_trained_for_the_worse_are_the_dense_ones_again():
    plain = pruned(allocate="uniform")
    trained = pruned(allocate=Scaled((40.0,), role="allocate"))
    assert trained.report()["guard"][0].startswith("training in Scaled made it worse: KL ")
    assert state_of(trained) == state_of(plain)
    kept = pruned(allocate=Scaled((1.0,), role="allocate"))
    assert not kept.report()["guard"] and entries(kept)[-1]["stage"] == "select"


# training


PATH = (0.3, 0.6, 1.0, 0.9, 0.5, 0.2)  # of one factor while it is "trained": best after step 3


def test_training_ends_with_its_best_state():
    result = pruned(Scaled(PATH, watched=True))
    assert state_of(result) == state_of(pruned())
    assert result.report()["guard"][0].startswith("Scaled: kept the state after step 3 of 6: KL ")
    looks = [entry for entry in entries(result) if entry["stage"] == "repair-1-Scaled"]
    assert [entry["step"] for entry in looks] == [1, 2, 3, 4, 5, 6, 6]
    assert looks[-1]["kl"] == looks[2]["kl"] and looks[-2]["undone"]


def test_training_that_still_helps_at_its_end_keeps_its_end():
    result = pruned(Scaled((0.5, 0.8, 1.0), watched=True))
    assert state_of(result) == state_of(pruned())
    assert not result.report()["guard"]


def test_looks_are_in_the_steps_of_a_run(tmp_path: Path):
    pruned(Scaled(PATH, watched=True), save_to=tmp_path / "run")
    steps = [json.loads(line) for line in (tmp_path / "run" / "steps.jsonl").read_text().splitlines()]
    looks = ["watch_kl" in step for step in steps if step["stage"] == "repair-1-Scaled"]
    assert looks == [True] * 5 + [False]  # the end is on record as that of the stage


@pytest.mark.parametrize("steps", range(1, 12))
def test_a_guarded_run_that_was_stopped_ends_as_an_uninterrupted_one(steps: int, tmp_path: Path):
    def chain(run: Path, **more: Any) -> Result:
        return pruned(Scaled(PATH, watched=True), Scaled((7.0,)), "bias", save_to=run, **more)

    whole = chain(tmp_path / "whole")
    told = iter([False] * steps)
    with pytest.raises(Stopped):
        chain(tmp_path / "run", should_stop=lambda: next(told, True))
    resumed = chain(tmp_path / "run")
    assert state_of(resumed) == state_of(whole)
    for key in ("fidelity", "guard", "watch"):
        assert resumed.report()[key] == whole.report()[key]
    again = chain(tmp_path / "run")  # opened, not run
    assert again.report()["fidelity"] == whole.report()["fidelity"]


def test_a_run_that_was_stopped_before_the_selection_compares_what_the_allocator_trained(tmp_path: Path):
    def chain(run: Path, **more: Any) -> Result:
        return pruned(allocate=Scaled((40.0,), role="allocate"), save_to=run, **more)

    whole = chain(tmp_path / "whole")
    told = iter([False, True])
    with pytest.raises(Stopped, match="stage select"):
        chain(tmp_path / "run", should_stop=lambda: next(told, True))
    resumed = chain(tmp_path / "run")
    assert state_of(resumed) == state_of(whole) and resumed.report()["guard"] == whole.report()["guard"] != []


# what a run says


def test_few_inputs_make_the_guard_unsure():
    few = prune(CASE.make(), INPUTS[:31], "sparsity=0.3", repair="none").report()
    enough = prune(CASE.make(), INPUTS[:32], "sparsity=0.3", repair="none").report()
    assert few["watch"]["unsure"] and not enough["watch"]["unsure"]
    assert few["watch"]["samples"] == 3 and enough["watch"]["samples"] == 16


def test_without_inputs_nothing_is_watched():
    report = prune(nn.Linear(4, 4), None, "sparsity=0.5", repair="none").report()
    assert report["watch"] == {} and report["fidelity"] == [] and report["guard"] == []


def test_outputs_that_cannot_be_compared_are_said_and_stop_nothing():
    class Found(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Any:
            return {"boxes": self.inner(x), "labels": self.inner(x).argmax(1)}

    report = prune(Found(), torch.randn(40, 6), "sparsity=0.5", repair="none").report()
    assert "cannot be compared" in report["watch"]["reason"] and report["fidelity"] == []


def test_watched_inputs_are_no_inputs_of_methods():
    result = pruned("bn", "bias")
    used, watched = (set(part.indices) for part in (result.problem.inputs(), result.problem.watch.inputs))
    assert len(watched) == 16 and not used & watched
    assert result.report()["watch"]["images"] == 16 * (1 + len(entries(result)))  # and once the dense net


def test_a_net_that_is_no_better_than_a_constant_is_said():
    """Weights that cancel out on the inputs: without one of them the outputs are far off."""
    net, x = nn.Linear(2, 3, bias=False), torch.randn(64, 1, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[10.0, -9.0], [8.0, -7.0], [-5.0, 6.0]]))
    inputs = torch.cat([x, x], 1)
    useless, fine = (prune(net, inputs, "sparsity=0.5", loss="mse", repair=repair) for repair in ("none", "admm"))
    assert useless.report()["guard"][-1].startswith("the net is no better than a constant: relative error ")
    assert not any("constant" in sentence for sentence in fine.report()["guard"])
