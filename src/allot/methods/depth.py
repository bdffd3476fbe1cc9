"""Depth: density falls from the first to the last block by equal steps.

    d_b = c (1 + slope (1 - 2 b / (B - 1)))         b = 0 .. B-1: blocks in order of execution

Huang et al., *Determining Layer-wise Sparsity for Large Language Models Through a Theoretical Perspective* (ICML 2025,
arXiv:2502.14770): an error in an early layer grows on its way through all others.

Differences from the paper:
    step        a share of the mean density, so that one default does for every budget; there: an absolute step of the
                sparsity, searched for each budget by perplexity
    c           all costs of the budget, with d_b cut at 1; there: the mean over blocks is the sparsity
    blocks      of any model: elements of a ModuleList or Sequential, and layers outside of these
"""

from __future__ import annotations

from dataclasses import dataclass

from allot.errors import check_number
from allot.methods.layerwise.execution import block_names, ran_in_order
from allot.methods.training.selection import allocated
from allot.run.problem import Candidate, Metrics, Problem
from allot.run.store import State


@dataclass(frozen=True)
class Depth:
    """Allocate by depth alone: an arithmetic progression of densities over the blocks, the first one densest.

    Without an example the order is that in which the model's modules were registered.

    Args:
        slope: from -1 to 1: (first - last) / (first + last) density; negative: the last block is densest.
    Raises:
        UsageError: a value out of its range.
    State:
        kept: layer -> weights kept; empty before the step.
    """

    slope: float = 0.3

    role = "allocate"
    needs_data = False

    def __post_init__(self) -> None:
        check_number("slope", self.slope, -1, 1)

    def init(self, problem: Problem, candidate: Candidate) -> State:
        return {"step": 0, "steps": 1, "kept": {}}

    def step(self, problem: Problem, candidate: Candidate, state: State) -> Metrics:
        runs = problem.example is not None
        order = ran_in_order(problem) if runs else [layer.name for layer in problem.scope]
        blocks = block_names(problem)
        position = {block: b for b, block in enumerate(dict.fromkeys(blocks[name] for name in order))}
        last = max(len(position) - 1, 1)
        wished = {name: 1 + self.slope * (1 - 2 * position[blocks[name]] / last) for name in order}
        state["kept"] = problem.budget.counts(wished)
        state["step"] = 1
        return {"forward": int(runs), "backward": 0, "kept": sum(state["kept"].values())}

    def finish(self, problem: Problem, candidate: Candidate, state: State) -> Candidate:
        return allocated(candidate, state["kept"])
