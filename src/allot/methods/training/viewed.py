"""A method whose calibration inputs are pictures and views of them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from allot.run.problem import Candidate, Method, Metrics, Problem
from allot.run.store import State
from allot.run.views import with_views


@dataclass(frozen=True)
class Viewed:
    """The method, on `views` views of every picture beside it.

    State:
        as the method's.
    """

    method: Method
    views: int
    _viewed: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    role = "repair"
    needs_data = True

    @property
    def parallel(self) -> bool:
        """Whether processes share the method's passes."""
        return bool(getattr(self.method, "parallel", False))

    def init(self, problem: Problem, candidate: Candidate) -> State:
        return self.method.init(self._with_views(problem), candidate)

    def step(self, problem: Problem, candidate: Candidate, state: State) -> Metrics:
        return self.method.step(self._with_views(problem), candidate, state)

    def finish(self, problem: Problem, candidate: Candidate, state: State) -> Candidate:
        return self.method.finish(self._with_views(problem), candidate, state)

    def _with_views(self, problem: Problem) -> Problem:
        """One value for one problem: methods remember what they worked on."""
        if self._viewed.get("of") is not problem:
            self._viewed.update(
                of=problem, viewed=replace(problem, calibration=with_views(problem.inputs(), self.views))
            )
        viewed: Problem = self._viewed["viewed"]
        return viewed
