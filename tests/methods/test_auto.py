"""The start chosen after short repairs: the lowest held-out loss wins, and nobody judges what he trained on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import allot
from allot.errors import AllotError, UsageError
from allot.methods import METHODS
from allot.methods.auto import Auto
from allot.methods.distill import Distill
from allot.methods.training.distillation import Training
from allot.methods.training.schedule import Schedule
from allot.methods.training.selection import Selection
from allot.methods.training.trial import Trial
from allot.network.applied_masks import masked
from allot.network.call import call
from allot.run.calibration import Calibration
from allot.run.driver import drive
from allot.run.problem import Candidate
from allot.run.scores import wanda
from allot.run.store import Log
from contract.cases import CASES, problem_of

AMONG = tuple((name, METHODS[name]) for name in ("uniform", "erk", "global"))


def test_the_allocation_with_the_lowest_held_out_loss_is_taken():
    problem = problem_of("without batch norm", "sparsity=0.9", batch_size=5)
    method = Auto(AMONG, Trial(Training(steps=4)))
    candidate = drive(method, problem, Candidate.dense(problem))
    told = candidate.diagnostics["auto"]
    assert told["loss"].keys() == dict(AMONG).keys() and len(set(told["loss"].values())) == 3
    assert told["chosen"] == min(told["loss"], key=told["loss"].__getitem__)
    chosen = drive(METHODS[told["chosen"]], problem, Candidate.dense(problem))
    assert candidate.allocation.kept == chosen.allocation.kept
    assert not candidate.masks and not candidate.tensors


def test_the_loss_is_that_of_the_trained_net_on_the_other_half():
    problem = problem_of("linear chain", "sparsity=0.6", batch_size=10)
    samples = problem.inputs().indices
    seen: list[Tensor] = []
    handle = problem.model.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    drive(Auto((("uniform", METHODS["uniform"]),), Trial(Training(steps=3))), problem, Candidate.dense(problem))
    handle.remove()
    every = CASES["linear chain"].inputs()
    trained, judged = (
        {i for i in samples for x in xs if bool((x == every[i]).all(1).any())} for xs in (seen[:-2], seen[-2:])
    )
    assert trained == set(samples[::2]) and judged == set(samples[1::2])


def test_without_training_the_loss_is_that_of_the_pruned_net():
    problem = problem_of("linear chain", "sparsity=0.6", batch_size=10)
    method = Auto((("uniform", METHODS["uniform"]),), Trial(Training(steps=1, learning_rate=0.0, loss="mse")))
    candidate = drive(method, problem, Candidate.dense(problem))
    model, kept = problem.model, candidate.allocation.kept
    half = CASES["linear chain"].inputs()[list(problem.inputs().indices[1::2])]
    pruned = {
        layer.name: masked(w := problem.dense[layer.name], problem.pattern.mask(layer, w.abs(), kept[layer.name]))
        for layer in problem.scope
    }
    with torch.no_grad():
        ours, dense = torch.func.functional_call(model, pruned, half), model(half)
        expected = float((ours - dense).square().mean() / dense.square().mean())
    assert candidate.diagnostics["auto"]["loss"]["uniform"] == pytest.approx(expected, rel=1e-5)


def test_the_losses_are_those_of_distilling_on_one_half_and_judging_on_the_other():
    problem = problem_of("with batch norm", "sparsity=0.7", batch_size=5)
    training, schedule = Training(steps=6, learning_rate=0.2), Schedule(every=2, ramp=3.0)
    candidate = drive(Auto(AMONG, Trial(training, schedule)), problem, Candidate.dense(problem))
    inputs, indices = CASES["with batch norm"].inputs(), problem.inputs().indices
    train = replace(problem, calibration=replace(problem.inputs(), indices=indices[0::2]))
    half = inputs[list(indices[1::2])]
    for name, allocator in AMONG:
        start = drive(Selection(), train, drive(allocator, train, Candidate.dense(train)))
        trained = drive(Distill(training, schedule), train, start)
        with torch.no_grad():
            p, q = (
                call(problem.model, tensors, half).div(2).softmax(1) for tensors in ({}, trained.effective(problem))
            )
        expected = float(4 * (p * (p.log() - q.log())).sum(1).mean())
        assert candidate.diagnostics["auto"]["loss"][name] == pytest.approx(expected, rel=1e-4)


def test_equal_losses_go_to_the_earlier_one_and_the_report_tells_of_all():
    method = Auto((("second", METHODS["erk"]), ("first", METHODS["erk"])), Trial(Training(steps=2)))
    case = CASES["linear chain"]
    told = allot.prune(case.make(), case.inputs(), "sparsity=0.5", allocate=method, repair="none").report()
    auto = told["diagnostics"]["auto"]
    assert auto["chosen"] == "second" and auto["loss"]["first"] == auto["loss"]["second"] > 0


def test_every_sample_that_is_pushed_through_is_counted():
    problem = replace(problem_of("linear chain", batch_size=5), score=wanda)
    log = Log()
    drive(
        Auto((("uniform", METHODS["uniform"]),), Trial(Training(steps=3))), problem, Candidate.dense(problem), log=log
    )
    # halves of two batches of 5; the score looks at one of them; dense answers are there in the third step
    assert log.forward == 10 + (10 + 10 + 5) + 2 * 10 and log.backward == 3 * 5


def test_a_loss_that_is_not_finite_is_no_lowest_loss():
    problem = problem_of("linear chain")
    method = Auto(AMONG, Trial(Training(steps=1, learning_rate=1e38)))
    with pytest.raises(AllotError, match="lower learning_rate"):
        drive(method, problem, Candidate.dense(problem))


def test_one_sample_cannot_be_split():
    problem = problem_of("linear chain")
    alone = replace(problem, calibration=Calibration.of(torch.zeros(1, 6)))
    with pytest.raises(UsageError, match="give 2 or more"):
        drive(METHODS["auto"], alone, Candidate.dense(alone))
