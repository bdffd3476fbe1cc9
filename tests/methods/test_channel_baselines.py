"""Baselines of channel allocation against the slow way to say the same."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from allot.budget.channels import channel_budget
from allot.errors import UsageError
from allot.methods.channel_baselines import GlobalChannels, Sensitivity
from allot.methods.training.distillation import Training
from allot.methods.training.selection import CollectedEvidence, channel_masks, importance
from allot.network.call import call
from allot.network.layers import is_batch_norm
from allot.run.driver import Progress, drive
from allot.run.problem import Candidate, Problem, finished
from allot.run.store import Log
from contract.cases import ON_CHANNELS, nothing_more_fits, problem_of

SEVERAL = "macs=60%,params=45%,bytes=80%"
CHANNEL_CASES = ["with batch norm", "without batch norm", "linear chain"]


def channel_problem(case: str = "with batch norm", budget: str = "macs=40%", **more: Any) -> Problem:
    return problem_of(case, budget, name="uniform" + ON_CHANNELS, **more)


def told(method: Any, problem: Problem, **more: Any) -> tuple[dict[str, int], list[Progress]]:
    steps: list[Progress] = []
    found = drive(method, problem, Candidate.dense(problem), on_step=steps.append, **more)
    return found.allocation.kept, steps


def scores_of(problem: Problem) -> dict[str, Tensor]:
    evidence = CollectedEvidence(problem, Candidate.dense(problem), {})
    return {group.name: importance(problem, group, evidence) for group in problem.scope.groups}


def best_of(scores: dict[str, Tensor], kept: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """The channels that score highest, ties to the lower index."""
    return {
        name: tuple(sorted(sorted(range(len(score)), key=lambda i: (-float(score[i]), i))[: kept[name]]))
        for name, score in scores.items()
    }


# sensitivity


def loss_without(problem: Problem, kept: dict[str, int], k: int) -> float:
    """KL to the dense net on batch k of a net in which every tensor's channels were zeroed."""
    masks = channel_masks(problem, best_of(scores_of(problem), kept))
    tensors = {name: problem.dense[name] * mask for name, mask in masks.items()}
    inputs, _ = problem.inputs().batch(k)
    with torch.no_grad():
        theirs = (call(problem.model, {}, inputs) / 2).softmax(-1)
        ours = (call(problem.model, tensors, inputs, training=is_batch_norm) / 2).softmax(-1)
    return float(4 * (theirs * (theirs.log() - ours.log())).sum(-1).mean())


@pytest.mark.parametrize("case", CHANNEL_CASES)
@pytest.mark.parametrize("budget", ["macs=40%", "params=50%", SEVERAL])
def test_every_choice_of_sensitivity_is_that_of_trying_all_proposals(case: str, budget: str):
    problem, rounds = channel_problem(case, budget), 3
    bound = channel_budget(problem.budget)
    method = Sensitivity(Training(temperature=2.0), rounds)
    candidate = Candidate.dense(problem)
    state = method.init(problem, candidate)
    kept = {term.name: term.total for term in bound.terms}
    drop = (bound.height(kept) - 1) / rounds
    for k in range(2):
        tried: dict[str, tuple[float, int]] = {}
        for name in kept:
            fewer = [n for n in range(1, kept[name]) if bound.height(kept | {name: n}) <= bound.height(kept) - drop]
            if fewer:
                batch = k % problem.inputs().batches
                tried[name] = loss_without(problem, kept | {name: max(fewer)}, batch), max(fewer)
        if not tried:
            break  # nothing alone gives that much: the step of cost is halved
        losses = {}
        for _ in tried:
            name = state["open"][0][0]
            losses[name] = method.step(problem, candidate, state)["loss"]
        assert losses == pytest.approx({name: loss for name, (loss, _) in tried.items()}, rel=1e-3, abs=1e-6)
        best = min(tried, key=lambda name: tried[name])
        kept[best] = tried[best][1]
        assert state["kept"] == kept
        if finished(state):
            break


@pytest.mark.parametrize("rounds", [1, 4, 16])
@pytest.mark.parametrize("budget", ["macs=40%", "bytes=75%", "sparsity=0.6", SEVERAL])
def test_sensitivity_ends_within_the_budget_with_no_room_for_a_channel(budget: str, rounds: int):
    problem = channel_problem(budget=budget)
    kept, _ = told(Sensitivity(rounds=rounds), problem)
    nothing_more_fits(problem, kept)


@pytest.mark.parametrize("case", ["attention", "zero weights", "equal weights"])
def test_sensitivity_ends_on_odd_nets(case: str):
    problem = channel_problem(case, "params=75%")
    nothing_more_fits(problem, told(Sensitivity(rounds=3), problem)[0])


def test_what_fits_already_is_left_whole():
    problem = channel_problem(budget="macs=10M")
    kept, steps = told(Sensitivity(rounds=3), problem)
    assert steps == [] and kept == {term.name: term.total for term in channel_budget(problem.budget).terms}


def test_more_rounds_cost_more_images_and_each_is_counted():
    problem, cost = channel_problem("linear chain", "params=30%"), []
    for rounds in (1, 4, 16):
        log = Log()
        passed: list[int] = []
        hook = problem.model.register_forward_hook(lambda module, args, output: passed.append(len(output)))
        told(Sensitivity(rounds=rounds), problem, log=log)
        hook.remove()
        assert log.forward == sum(passed) and log.backward == 0
        cost.append(log.forward)
    assert cost[0] < cost[1] < cost[2]


def test_steps_told_ahead_never_fall_short_of_those_done():
    _, steps = told(Sensitivity(rounds=6), channel_problem())
    assert all(progress.step <= progress.steps for progress in steps)


@pytest.mark.parametrize("rounds", [0, 1.5, True, "many"])
def test_rounds_out_of_range_are_one_line(rounds: Any):
    with pytest.raises(UsageError, match=r"rounds=.* is accepted") as refused:
        Sensitivity(rounds=rounds)
    assert "\n" not in str(refused.value)


# one ranking of all channels


@pytest.mark.parametrize("case", [*CHANNEL_CASES, "equal weights", "dead channels", "one huge outlier"])
@pytest.mark.parametrize("budget", ["macs=40%", "params=50%", "sparsity=0.7", SEVERAL])
def test_global_channels_are_the_first_of_one_sorted_list(case: str, budget: str):
    problem = channel_problem(case, budget)
    bound, scores = channel_budget(problem.budget), scores_of(problem)
    ranked = sorted(
        ((-float(value), name, i) for name, score in scores.items() for i, value in enumerate(score)),
    )
    for r in itertools.count(len(ranked), -1):
        counted = {name: max(sum(owner == name for _, owner, _ in ranked[:r]), 1) for name in scores}
        if bound.fits(counted):
            break
    kept, _ = told(GlobalChannels(), problem)
    nothing_more_fits(problem, kept)
    assert all(kept[name] >= counted[name] for name in kept)  # what is left over is handed out in proportion
    assert kept == bound.counts({name: n / len(scores[name]) for name, n in counted.items()})


def test_global_channels_need_no_images_but_those_of_the_score():
    log = Log()
    told(GlobalChannels(), channel_problem(), log=log)
    assert log.forward == log.backward == 0


def test_global_channels_look_at_scores_alone():
    """A group of which every channel scores above all others stays whole where the budget allows it."""
    problem = channel_problem(budget="params=60%")
    high = {"pointwise": 2.0, "full": 1.0, "grouped": 0.0}

    def score(group: Any, evidence: Any) -> Tensor:
        return high[group.name] + torch.linspace(0, 0.5, group.total, dtype=torch.float64)

    kept, _ = told(GlobalChannels(), replace(problem, score=score))
    assert kept["pointwise"] == 9
