"""Separable sensitivity: each layer is pruned alone, at a few densities; the sum of the errors is minimised.

    e_l(d)   loss against the dense net, in eval mode, when layer l alone keeps the best-scored d of its weights
    min over d_1..d_L:  sum_l e_l(d_l),   the cost of d within the budget

e_l is replaced by its lower convex hull, whose slopes are the error that one unit of cost more saves. Slopes are taken
from the steepest down until the budget is used up; that is the optimum of the hulls (the multiple-choice knapsack
relaxed).

The errors are measured with all other layers dense, where the loss still differs from layer to layer; around a net that
is sparse already it does not. Layers act together at high sparsity, which a sum cannot see.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from allot.methods.training.distillation import Training
from allot.methods.training.selection import CollectedEvidence, allocated, scored
from allot.methods.training.separable import best_densities, grid
from allot.network.applied_masks import masked
from allot.processes import one_per_process
from allot.run.problem import Candidate, Metrics, Problem
from allot.run.store import State


@dataclass(frozen=True)
class Knapsack:
    """Allocate the budget by how much the pruning of each layer alone moves the outputs.

    Args:
        training: its loss judges, on one calibration batch; nothing is trained.
        densities: at which each layer is tried, ascending from 0, below 1; at 0 the layer keeps its floor.
    Raises:
        UsageError: a value out of its range.
    State:
        error: layer -> [[density, e_l(density)], ...] measured so far.
        squares: sums that the score asks for, as in `CollectedEvidence`.
        answers: batch -> the dense net's outputs on it; None where inputs do not repeat.
    """

    training: Training = field(default_factory=Training)
    densities: tuple[float, ...] = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7)

    role = "allocate"
    needs_data = True
    parallel = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "densities", grid(self.densities))

    def init(self, problem: Problem, candidate: Candidate) -> State:
        return {
            "step": 0,
            "steps": len(problem.scope) * len(self.densities),
            "error": {layer.name: [] for layer in problem.scope},
            "squares": {},
            "answers": {} if problem.inputs().repeats() else None,
        }

    def step(self, problem: Problem, candidate: Candidate, state: State) -> Metrics:
        """One layer at one density; of several processes, as many as there are."""
        evidence = CollectedEvidence(problem, candidate, state["squares"])

        def measured(index: int) -> tuple[str, float, float, int]:
            i, j = divmod(index, len(self.densities))
            layer = problem.scope.layers[i]
            step, fewest, most = problem.pattern.feasible(layer)
            kept = min(max(round(self.densities[j] * layer.total / step) * step, fewest), most)
            weight = problem.dense[layer.name]
            mask = problem.pattern.mask(layer, scored(problem, layer, weight, evidence), kept)
            loss, forward = self.training.judge(problem, {layer.name: masked(weight, mask)}, 0, state["answers"])
            return layer.name, kept / layer.total, loss, forward

        if not state["step"]:  # the sums that the score asks for are collected once
            scored(problem, problem.scope.layers[0], problem.dense[problem.scope.layers[0].name], evidence)
        results = one_per_process(range(state["step"], state["steps"]), measured)
        for name, density, loss, _ in results:
            state["error"][name].append([density, loss])
        state["step"] += len(results)
        forward = evidence.forward + sum(pushed for *_, pushed in results)
        return {"forward": forward, "backward": 0, "loss": results[-1][2]}

    def finish(self, problem: Problem, candidate: Candidate, state: State) -> Candidate:
        """The candidate with the allocation; the measured curves go to the report."""
        kept = problem.budget.counts(best_densities(problem.budget, state["error"]))
        return allocated(candidate, kept, {"knapsack": {"error": state["error"]}})
