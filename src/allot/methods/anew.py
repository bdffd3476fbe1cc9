"""A training from the dense weights that learns the densities as well, as one repair among others.

The net that earlier repairs made is set aside, and so is its allocation: weights and densities are learned anew. The
guard then keeps this net, unless the earlier one is closer to the dense net on the watch set: at mild budgets these are
often the weights that `admm` refits layer by layer, at hard ones those that were trained through the whole net.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from allot.errors import NotFinite, check_number
from allot.methods.training.rounds import in_rounds
from allot.methods.training.selection import Selection
from allot.methods.training.where_it_helps import Helps
from allot.run.problem import Candidate, Method, Metrics, Problem, finished
from allot.run.store import State


@dataclass(frozen=True)
class Anew:
    """Allocate again, from the dense weights, with an allocator that trains; then repair what it made.

    Where the loss is not finite, the net before stays.

    Args:
        allocate: the allocator.
        then: repairs that follow; where batch norms are frozen, trainings alone.
        mixtures: of each input, how many mixtures with another one all parts see beside it, where inputs are numbers:
            statistics of batch norms have to be those that weights were trained with.
        helps: when it runs at all.
    Raises:
        UsageError: a value out of its range.
    State:
        part: which part runs: 0 the allocator, 1 the selection, from 2 on those of `then`.
        candidate: as `Candidate.to_state`, the net that the part begins with.
        inner: the state of the part; empty where its loss was not finite.
    """

    allocate: Method
    then: tuple[Method, ...] = field(default=(), metadata={"option": False})
    mixtures: int = 0
    helps: Helps = field(default_factory=Helps)

    role = "repair"
    needs_data = True
    parallel = True
    chooses_masks = True
    starts_over = True

    def __post_init__(self) -> None:
        check_number("mixtures", self.mixtures, 0, whole=True)

    @property
    def allocates(self) -> tuple[str, ...]:
        """The units that the allocator can allocate."""
        return getattr(self.allocate, "allocates", ("weights",))

    def init(self, problem: Problem, candidate: Candidate) -> State:
        dense = Candidate.dense(problem)
        inner = self.allocate.init(problem, dense)
        return {"step": 0, "steps": inner["steps"], "part": 0, "candidate": dense.to_state(), "inner": inner}

    def step(self, problem: Problem, candidate: Candidate, state: State) -> Metrics:
        """One step of a part; after its last one the next part begins."""
        parts, start = self._parts(problem), Candidate.from_state(state["candidate"], problem)
        try:
            metrics = parts[state["part"]].step(problem, start, state["inner"])
        except NotFinite:
            samples = len(problem.inputs().positions(state["step"]))
            state |= {"step": state["step"] + 1, "steps": state["step"] + 1, "inner": {}}
            return {"forward": samples, "backward": 0}
        state["step"] += 1
        while finished(state["inner"]) and state["part"] + 1 < len(parts):
            start = parts[state["part"]].finish(problem, start, state["inner"])
            state["part"] += 1
            state |= {"candidate": start.to_state(), "inner": parts[state["part"]].init(problem, start)}
        state["steps"] = state["step"] + state["inner"]["steps"] - state["inner"]["step"]
        return metrics

    def finish(self, problem: Problem, candidate: Candidate, state: State) -> Candidate:
        if not state["inner"]:
            return candidate
        start = Candidate.from_state(state["candidate"], problem)
        learned = self._parts(problem)[state["part"]].finish(problem, start, state["inner"])
        return replace(learned, diagnostics={**candidate.diagnostics, **learned.diagnostics})

    def _parts(self, problem: Problem) -> list[Method]:
        follow = [m for m in self.then if problem.batch_norm == "batch" or hasattr(m, "training")]
        return [self.allocate, Selection(), *(in_rounds(method, problem) for method in follow)]
