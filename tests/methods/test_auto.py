"""The start chosen after short repairs: the lowest held-out loss wins, and nobody judges what he trained on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from allot.calibration import Calibration
from allot.errors import UsageError
from allot.masks import masked
from allot.methods import METHODS
from allot.methods.auto import Auto
from allot.run import Candidate, drive
from allot.training import Training
from contract.cases import CASES, problem_of

AMONG = tuple((name, METHODS[name]) for name in ("uniform", "erk", "global"))


def test_the_allocation_with_the_lowest_held_out_loss_is_taken():
    problem = problem_of("without batch norm", "sparsity=0.9", batch_size=5)
    method = Auto(AMONG, Training(steps=4))
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
    drive(Auto((("uniform", METHODS["uniform"]),), Training(steps=3)), problem, Candidate.dense(problem))
    handle.remove()
    every = CASES["linear chain"].inputs()
    trained, judged = (
        {i for i in samples for x in xs if bool((x == every[i]).all(1).any())} for xs in (seen[:-2], seen[-2:])
    )
    assert trained == set(samples[::2]) and judged == set(samples[1::2])


def test_without_training_the_loss_is_that_of_the_pruned_net():
    problem = problem_of("linear chain", "sparsity=0.6", batch_size=10)
    method = Auto((("uniform", METHODS["uniform"]),), Training(steps=1, learning_rate=0.0, loss="mse"))
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


def test_one_sample_cannot_be_split():
    problem = problem_of("linear chain")
    alone = replace(problem, calibration=Calibration.of(torch.zeros(1, 6)))
    with pytest.raises(UsageError, match="at least 2 calibration samples"):
        drive(METHODS["auto"], alone, Candidate.dense(alone))
