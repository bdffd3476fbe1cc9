"""Looks at a net while it is trained, on the watch set: its fidelity by the way, and its best state."""

from __future__ import annotations

from dataclasses import replace

from allot.network.trees import cloned
from allot.run.fidelity import Fidelity
from allot.run.problem import Candidate, Method, Metrics, Problem, finished
from allot.run.store import State

LOOKS = 10  # in a training, the last one at its end
LOOKED = "watch_"  # before the names of what a look shows, among the metrics of a step


class Looks:
    """Looks at a net while it is trained, and its best state so far.

    Args:
        best: the state of `best` that was saved; None for a training that begins.
    """

    def __init__(self, problem: Problem, method: Method, start: Candidate, best: State | None) -> None:
        self.problem, self.method, self.start, self.best = problem, method, start, best

    def after_step(self, state: State) -> Metrics:
        """What a look shows, as metrics of the step; nothing where no look is due, or the budget is not met yet."""
        step, watch = state["step"], self.problem.watch
        if watch is None or step % max(1, -(-state["steps"] // LOOKS)) or finished(state):
            return {}
        candidate = self.method.finish(self.problem, self.start, state)
        if not meets(self.problem, candidate) or (found := fidelity_of(self.problem, candidate)) is None:
            return {}
        if self.best is None or found.mean < self.best["values"].mean():
            best = {"step": step, "candidate": candidate.to_state(), "values": found.values}
            self.best = cloned(best) | {"kind": found.kind, "agreement": found.agreement}
        return {**as_metrics(found), "watched": watch.images}

    def chosen(self, last: Candidate) -> tuple[Candidate, Fidelity | None, State | None]:
        """(`last`, the net at the end, or its best state where that is better; fidelity of the net at the end; the best
        state where that was chosen).
        """
        final = fidelity_of(self.problem, last) if self.best else None
        if self.best is None or final is None or not final.is_worse_than(fidelity_in(self.best)):
            return last, final, None
        return Candidate.from_state(self.best["candidate"], self.problem), final, self.best


def fidelity_of(problem: Problem, candidate: Candidate) -> Fidelity | None:
    """The fidelity of a candidate's net, which keeps no masked copy of the model; None without a watch set."""
    return problem.watch.fidelity(replace(candidate).effective(problem)) if problem.watch else None


def fidelity_in(best: State) -> Fidelity:
    """The fidelity that a state of `Looks.best` holds."""
    return Fidelity(best["kind"], best["values"], best["agreement"])


def as_metrics(fidelity: Fidelity) -> Metrics:
    """As metrics of a step; without what is not finite."""
    return {LOOKED + name: value for name, value in fidelity.to_json().items() if value is not None}


def meets(problem: Problem, candidate: Candidate) -> bool:
    """Whether the masks of a candidate keep what its allocation says; in training, a wider budget may hold at first."""
    sizes = problem.budget.sizes(candidate.allocation.kept)
    return all(name in candidate.masks and int(candidate.masks[name].sum()) == sizes[name] for name in sizes)
