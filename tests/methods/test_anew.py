"""Training anew: densities and weights from the dense net, whatever repairs before made."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from allot.errors import NotFinite, UsageError
from allot.methods import METHODS
from allot.methods.anew import Anew
from allot.methods.batchnorm import BatchNorm
from allot.methods.fcpts import Fcpts
from allot.methods.rules import erk
from allot.methods.training.distillation import Training
from allot.methods.training.schedule import Schedule
from allot.pruning.prune import prune
from allot.pruning.result import Result
from allot.run.problem import Candidate, Metrics, Problem, Rule
from allot.run.store import State
from contract.cases import CASES, bits

CASE = CASES["with batch norm"]
INPUTS = torch.randn(24, *CASE.inputs().shape[1:], generator=torch.Generator().manual_seed(1))
LEARNED = Fcpts(Rule(erk), Training(steps=6), Schedule())


def pruned(**parts: Any) -> Result:
    return prune(CASE.make(), INPUTS, "sparsity=0.6", batch_size=8, batch_norm="batch", **parts)


def state_of(result: Result) -> dict[str, Any]:
    return {name: bits(value) for name, value in result.state_dict().items()}


def test_it_makes_what_its_allocator_and_repairs_make_as_a_chain(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("allot.run.guard.Guard.after", lambda self, stage, step, before, after, **_: after)
    chain = pruned(allocate=LEARNED, repair="bn")
    anew = pruned(allocate="uniform", repair=("bias", Anew(LEARNED, then=(BatchNorm(),))))
    assert state_of(anew) == state_of(chain)
    assert anew.allocation.kept == chain.allocation.kept
    assert anew.report()["diagnostics"].keys() >= {"fcpts"}


def test_a_loss_that_is_not_finite_leaves_the_net_before_it():
    @dataclass(frozen=True)
    class Diverges(Fcpts):
        def step(self, problem: Problem, candidate: Candidate, state: State) -> Metrics:
            if state["step"] == 3:
                raise NotFinite("the loss is not finite")
            return super().step(problem, candidate, state)

    before = pruned(allocate="erk", repair="bias")
    after = pruned(allocate="erk", repair=("bias", Anew(Diverges(Rule(erk), Training(steps=6), Schedule()))))
    assert state_of(after) == state_of(before)


def test_errors_of_use_are_not_swallowed():
    @dataclass(frozen=True)
    class Wrong(Fcpts):
        def step(self, problem: Problem, candidate: Candidate, state: State) -> Metrics:
            raise UsageError("no such thing")

    with pytest.raises(UsageError, match="no such thing"):
        pruned(allocate="erk", repair=(Anew(Wrong(Rule(erk))),))


def test_what_it_cannot_share_out_is_refused():
    with pytest.raises(UsageError, match=r"anew cannot share out channels .*leave this repair out"):
        pruned(allocate="uniform", pattern="channels", repair="anew")


def test_frozen_norms_keep_their_statistics():
    fit = replace(METHODS["anew"].then[1], training=Training(steps=2))
    anew = Anew(LEARNED, then=(BatchNorm(), fit))
    norms = {"running_mean", "running_var"}
    made = prune(CASE.make(), INPUTS, "sparsity=0.6", batch_norm="frozen", allocate="uniform", repair=(anew,))
    dense = CASE.make().state_dict()
    assert all(torch.equal(v, dense[n]) for n, v in made.state_dict().items() if n.rpartition(".")[2] in norms)
