"""Choose among allocations by a short repair: the one whose net, briefly distilled, answers most like the dense net.

The loss of an allocation is the loss of its trial (`allot.methods.training.trial`): `steps` steps on one half of the
calibration samples, judged on the other half. The lowest loss wins; equal losses go to the earlier allocation.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

from allot.methods.training.selection import allocated
from allot.methods.training.trial import Trial
from allot.run.driver import drive
from allot.run.problem import Candidate, Method, Metrics, Problem
from allot.run.store import State


@dataclass(frozen=True)
class Auto:
    """Take the best of a few allocations, judged after a short repair on held-out calibration samples.

    Args:
        among: (name, allocator) pairs; allocators that need no data.
        trial: how allocations are judged.
    State:
        tried: name -> {"kept": layer -> weights, "loss": of its trial}.
        answers: batch of the judging half -> the dense net's outputs on it; None where inputs do not repeat.
        trial: as in `Trial`, of the allocation that is tried now.
    """

    among: tuple[tuple[str, Method], ...]
    trial: Trial = field(default_factory=Trial)

    role = "allocate"
    needs_data = True
    parallel = True

    def init(self, problem: Problem, candidate: Candidate) -> State:
        steps = len(self.among) * self.trial.steps(problem, candidate)
        return {"step": 0, "steps": steps, "tried": {}, "answers": {} if problem.inputs().repeats() else None}

    def step(self, problem: Problem, candidate: Candidate, state: State) -> Metrics:
        """One calibration batch of the trial of one allocation after the other, or whole trials (`Trial.try_first`)."""
        untried = self.among[len(state["tried"]) :]
        waiting = [partial(drive, allocator, problem, candidate) for _, allocator in untried]
        metrics, losses = self.trial.try_first(problem, state, waiting, state["answers"])
        for (name, _), make, loss in zip(untried, waiting, losses, strict=False):
            state["tried"][name] = {"kept": make().allocation.kept, "loss": loss}
        return metrics

    def finish(self, problem: Problem, candidate: Candidate, state: State) -> Candidate:
        """The candidate with the best allocation, not with its tensors: they saw half of the samples."""
        tried = state["tried"]
        best = min(tried, key=lambda name: tried[name]["loss"])
        report = {"chosen": best, "loss": {name: row["loss"] for name, row in tried.items()}}
        return allocated(candidate, tried[best]["kept"], {"auto": report})
