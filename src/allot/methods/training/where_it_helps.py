"""A training that runs only where it can help: where the net is still far, and training inputs can tell it more.

    D       mean distance from the dense net, `allot.run.fidelity`
    share   D(inputs of training) / D(watch set),   of the net before any training

A net that answers like the dense one on the inputs that it was fitted to, and on others does not, gains nothing from
more steps on the same inputs: at a share of 0.04 every training of EfficientNet-lite0 on photographs made it worse.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from allot.errors import check_number
from allot.run.guard import fidelity_of, fitted_share
from allot.run.problem import Candidate, Metrics, Problem
from allot.run.store import State


@dataclass(frozen=True)
class Helps:
    """When a training runs.

    Args:
        unfitted: where `share` is this or more; 0: always.
        far: where D(watch set) is more than this, in nats, or as a relative error; 0: always.
    Raises:
        UsageError: a value out of its range.
    """

    unfitted: float = 0.0
    far: float = 0.0

    def __post_init__(self) -> None:
        check_number("unfitted", self.unfitted, 0)
        check_number("far", self.far, 0)


@dataclass(frozen=True)
class WhereItHelps:
    """The method, a repair, where `when` says so; else the net stays.

    State:
        share, distance: see the top of this file; None before the first step, and where they are not known.
        inner: state of the method; empty where it does not run.
    """

    method: Any
    when: Helps

    role = "repair"
    needs_data = True

    @property
    def parallel(self) -> bool:
        """Whether processes share the method's passes."""
        return bool(getattr(self.method, "parallel", False))

    def init(self, problem: Problem, candidate: Candidate) -> State:
        inner = self.method.init(problem, candidate)
        return {"step": 0, "steps": 1 + inner["steps"], "share": None, "distance": None, "inner": inner}

    def step(self, problem: Problem, candidate: Candidate, state: State) -> Metrics:
        """First, whether it helps; then the method's steps."""
        state["step"] += 1
        if state["step"] > 1:
            metrics: Metrics = self.method.step(problem, candidate, state["inner"])
            state["steps"] = state["step"] + state["inner"]["steps"] - state["inner"]["step"]
            return metrics
        earlier = candidate.diagnostics.get("helps")
        state["share"] = earlier[0]["share"] if earlier else fitted_share(problem, candidate)
        found = fidelity_of(problem, candidate)
        state["distance"] = found.mean if found else None
        if self._left_out(state):
            state |= {"inner": {}, "steps": 1}
        return {"forward": 0, "backward": 0, "watched": len(problem.watch or ()) * (1 if earlier else 4)}

    def finish(self, problem: Problem, candidate: Candidate, state: State) -> Candidate:
        ran = bool(state["inner"])
        made = self.method.finish(problem, candidate, state["inner"]) if ran else candidate
        row = {"share": state["share"], "distance": state["distance"], "ran": ran, "left_out": self._left_out(state)}
        rows = [*candidate.diagnostics.get("helps", []), row]
        return replace(made, diagnostics={**made.diagnostics, "helps": rows})

    def _left_out(self, state: State) -> str:
        """Why the method does not run; empty where it does."""
        share, distance = state["share"], state["distance"]
        if distance is not None and distance <= self.when.far:
            return f"the net is near enough ({distance:.3g})"
        if share is not None and share < self.when.unfitted:
            return f"the net fits its inputs: its distance there is {share:.0%} of that on the watch set"
        return ""
