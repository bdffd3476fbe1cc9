"""OWL: blocks with more outliers keep more.

Yin et al., *Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning LLMs to High Sparsity* (ICML
2024, arXiv:2310.05175):

    A_ij = |W_ij| |x_j|                                       |x_j|: norm of input j over the calibration data
    D_b  = share of the A_ij of block b that are above M times their mean
    d_b  = d + 2 lambda (D_b - min D) / (max D - min D) - shift         shift: so that the mean over blocks is d

Differences from the paper's code:
    lambda      at most d / 2: at high sparsity densities below 0 would follow from the paper's 0.08
    c           d_b is scaled to meet the budget, whatever the sizes of blocks and the costs; there: blocks are equal
    blocks      of any model: elements of a ModuleList or Sequential, and layers outside of these; there: of a decoder
    layers      any product of a weight with its inputs; there: linear layers
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from allot.errors import check_number
from allot.methods.layerwise.execution import block_names
from allot.methods.training.selection import CollectedEvidence, allocated
from allot.network.input_squares import Squares, input_norms
from allot.run.problem import Candidate, Metrics, Problem
from allot.run.store import State


@dataclass(frozen=True)
class Owl:
    """Allocate by how many weights of a block are outliers: magnitude times the norm of the input, far above the mean.

    Args:
        multiple: M: an outlier is above this many times the mean, above 0.
        spread: lambda: densities stand within twice this of the mean.
    Raises:
        UsageError: a value out of its range.
    State:
        squares: sums of squared inputs, as in `CollectedEvidence`.
        outliers: block -> D; empty before the last step.
    """

    multiple: float = 5.0
    spread: float = 0.08

    role = "allocate"
    needs_data = True
    parallel = True

    def __post_init__(self) -> None:
        check_number("multiple", self.multiple, 0)
        check_number("spread", self.spread, 0, 1)

    def init(self, problem: Problem, candidate: Candidate) -> State:
        return {"step": 0, "steps": problem.inputs().batches + 1, "squares": {}, "outliers": {}}

    def step(self, problem: Problem, candidate: Candidate, state: State) -> Metrics:
        """One batch for the norms; last, the outliers of every block."""
        state["step"] += 1
        if state["step"] < state["steps"]:
            return {"forward": CollectedEvidence(problem, candidate, state["squares"]).add_batch(), "backward": 0}
        members: dict[str, list[str]] = {}
        for name, block in sorted(block_names(problem).items()):
            members.setdefault(block, []).append(name)
        for block, names in members.items():
            scores = [A for name in names for A in _scores(problem, name, state["squares"]["inputs"])]
            state["outliers"][block] = outlier_share(scores, self.multiple)
        return {"forward": 0, "backward": 0}

    def finish(self, problem: Problem, candidate: Candidate, state: State) -> Candidate:
        """The candidate with the allocation; the shares of outliers go to the report."""
        uniform = problem.budget.project({term.name: 1.0 for term in problem.budget.terms})
        mean = sum(uniform[name] * total for name, total in uniform.total.items()) / sum(uniform.total.values())
        density = owl_densities(state["outliers"], mean, self.spread)
        kept = problem.budget.counts({name: density[block] for name, block in block_names(problem).items()})
        return allocated(candidate, kept, {"owl": {"outliers": dict(state["outliers"]), "density": density}})


def outlier_share(layer_scores: Sequence[Tensor], multiple: float) -> float:
    """D: the share of the scores of a block that are above `multiple` times their mean; 0 without scores.

    >>> outlier_share([Tensor([9.0, 1.0]), Tensor([1.0, 1.0])], 2.0)
    0.25
    """
    total = sum(scores.numel() for scores in layer_scores)
    bound = multiple * sum(float(scores.double().sum()) for scores in layer_scores) / max(total, 1)
    return sum(int((scores > bound).sum()) for scores in layer_scores) / max(total, 1)


def owl_densities(outliers: Mapping[str, float], mean: float, spread: float) -> dict[str, float]:
    """d_b of every block.

    >>> owl_densities({"a": 0.01, "b": 0.03, "c": 0.02}, 0.5, 0.1)
    {'a': 0.4, 'b': 0.6, 'c': 0.5}
    """
    least, width = min(outliers.values()), max(outliers.values()) - min(outliers.values())
    raised = {b: 2 * min(spread, mean / 2) * (D - least) / width if width else 0.0 for b, D in outliers.items()}
    shift = sum(raised.values()) / len(raised)
    return {b: max(mean + more - shift, 0.0) for b, more in raised.items()}


def _scores(problem: Problem, name: str, squares: Squares) -> list[Tensor]:
    """A of one layer; none where no product was seen."""
    layer = problem.scope[name]
    if name not in squares and layer.kind != "lookup":
        return []
    weight = problem.dense[name]
    return [(weight.abs() * input_norms(layer, squares.get(name, {})).to(weight.device)).float()]
