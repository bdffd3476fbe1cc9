"""Network-wise distillation of a sparse net with given densities; equations: `methods.training.distillation`.

    before step t, where it is due:   m_l = the k_l best-scored of layer l's current weights
    w <- w - lr_t Adam(G)             G at all entries: pruned weights learn as well, and may come back

k_l stays as allocated (with `ramp`, it comes down to that from a wider budget). From `freeze_at` of the steps on the
masks stay, and the kept weights settle.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from allot.errors import check_number
from allot.methods.training.distillation import Training, distil, distilled, distilling
from allot.methods.training.schedule import Schedule
from allot.methods.training.where_it_helps import Helps
from allot.run.problem import Candidate, Metrics, Problem
from allot.run.store import State


@dataclass(frozen=True)
class Distill:
    """Train all weights of the sparse net until it answers like the dense one; how much each layer keeps is fixed.

    Args:
        frozen: whether batch norms keep their running statistics, whatever the run does: right after a repair that
            brought their inputs back.
        mixtures: of each input, how many mixtures with another one it trains on beside it, where inputs are numbers.
        helps: when it runs at all.
    Raises:
        UsageError: a value out of its range.
    State:
        training: as in `Training`.
        masks: layer -> mask, bool, shape of the weight; empty before the first step.
        squares: sums that the score asks for, as in `CollectedEvidence`.
    """

    training: Training = field(default_factory=Training)
    schedule: Schedule = field(default_factory=Schedule)
    frozen: bool = False
    mixtures: int = 0
    helps: Helps = field(default_factory=Helps)

    role = "repair"
    needs_data = True
    parallel = True
    watched = True

    def __post_init__(self) -> None:
        check_number("mixtures", self.mixtures, 0, whole=True)

    def init(self, problem: Problem, candidate: Candidate) -> State:
        return distilling(self.training, self._norms(problem), candidate)

    def step(self, problem: Problem, candidate: Candidate, state: State) -> Metrics:
        return distil(self.training, self.schedule, self._norms(problem), candidate, state)

    def finish(self, problem: Problem, candidate: Candidate, state: State) -> Candidate:
        return distilled(self.training, problem, candidate, state)

    def _norms(self, problem: Problem) -> Problem:
        return replace(problem, batch_norm="frozen") if self.frozen else problem
