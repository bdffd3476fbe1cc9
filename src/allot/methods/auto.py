"""Choose among allocations by a short repair: the one whose net, briefly distilled, answers most like the dense net.

    for each allocation:   train `steps` steps on one half of the calibration samples (masks selected again on the way)
                           score = mean loss on the other half, in eval mode
    keep the allocation with the lowest score; equal scores go to the earlier one

The one-shot loss is no judge: at high sparsity a net that was not trained yet is near chance, and the allocations that
look best then starve layers that training would need.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from allot.allocation import Allocation
from allot.errors import UsageError
from allot.run import Candidate, Evidence, Method, Metrics, Problem, drive
from allot.store import State
from allot.training import Schedule, Training


@dataclass(frozen=True)
class Auto:
    """Take the best of a few allocations, judged after a short repair on held-out calibration samples.

    Args:
        among: (name, allocator) pairs; allocators that need no data.
    """

    among: tuple[tuple[str, Method], ...]
    training: Training = field(default_factory=lambda: Training(steps=40))
    schedule: Schedule = field(default_factory=Schedule)

    role = "allocate"
    needs_data = True

    def init(self, problem: Problem, candidate: Candidate) -> State:
        """No allocation tried."""
        if len(problem.inputs()) < 2:
            raise UsageError("auto needs at least 2 calibration samples: one half trains, the other judges.")
        each = self.training.steps + self._half(problem, 1).inputs().batches
        return {"step": 0, "steps": len(self.among) * each, "tried": {}}

    def step(self, problem: Problem, candidate: Candidate, state: State) -> Metrics:
        """One calibration batch: of the training half, then of the judging half, for one allocation after the other."""
        name, allocator = self.among[len(state["tried"])]
        train, judge = (self._half(problem, i) for i in (0, 1))
        if "training" not in state:
            state["kept"] = drive(allocator, problem, candidate).allocation.kept
            state |= {"training": self.training.begin(train, candidate), "masks": {}, "squares": {}, "losses": []}
        training = state["training"]
        evidence = Evidence(train, candidate, state["squares"])
        state["step"] += 1
        t, steps = training["step"], self.training.steps
        if t < steps:
            if self.schedule.due(t, steps):
                budget = problem.budget.widened(self.schedule.factor(t, steps))
                kept = budget.counts(Allocation.of(state["kept"], candidate.allocation.total))
                state["masks"] = self.training.select(train, training, evidence, kept)
            gradients, metrics = self.training.gradients(train, training, state["masks"])
            self.training.update(training, gradients)
            return metrics | {"forward": metrics["forward"] + evidence.forward}
        loss, forward = self.training.judge(judge, training, state["masks"], len(state["losses"]))
        state["losses"].append(loss)
        if len(state["losses"]) == judge.inputs().batches:
            score = math.fsum(state["losses"]) / len(state["losses"])
            state["tried"][name] = {"kept": state["kept"], "loss": score}
            del state["training"]
        return {"forward": forward, "backward": 0, "loss": loss}

    def done(self, state: State) -> bool:
        """After every allocation."""
        return bool(state["step"] >= state["steps"])

    def finish(self, problem: Problem, candidate: Candidate, state: State) -> Candidate:
        """The candidate with the best allocation, not with its tensors: they saw half of the samples."""
        tried = state["tried"]
        best = min(tried, key=lambda name: tried[name]["loss"])
        allocation = Allocation.of(tried[best]["kept"], candidate.allocation.total)
        told = {"chosen": best, "loss": {name: row["loss"] for name, row in tried.items()}}
        return replace(candidate, allocation=allocation, diagnostics={**candidate.diagnostics, "auto": told})

    def _half(self, problem: Problem, i: int) -> Problem:
        calibration = problem.inputs()
        return replace(problem, calibration=replace(calibration, indices=calibration.indices[i::2]))
