"""A method whose calibration inputs have views of them beside them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from allot.run.problem import Candidate, Method, Metrics, Problem
from allot.run.store import State
from allot.run.views import can_be_mixed, with_crops, with_mixtures


@dataclass(frozen=True)
class Viewed:
    """The method, on crops of every picture and mixtures of every input beside it; see `allot.run.views`.

    Args:
        crops: of a picture; the caller knows that inputs are pictures.
        mixtures: of an input; none where inputs cannot be mixed.
    State:
        as the method's.
    """

    method: Method
    crops: int = 0
    mixtures: int = 0
    _viewed: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    role = "repair"
    needs_data = True

    @property
    def parallel(self) -> bool:
        """Whether processes share the method's passes."""
        return bool(getattr(self.method, "parallel", False))

    @property
    def watched(self) -> bool:
        """Whether the method may be asked for its net on the way."""
        return bool(getattr(self.method, "watched", False))

    def init(self, problem: Problem, candidate: Candidate) -> State:
        return self.method.init(self._with_views(problem), candidate)

    def step(self, problem: Problem, candidate: Candidate, state: State) -> Metrics:
        return self.method.step(self._with_views(problem), candidate, state)

    def finish(self, problem: Problem, candidate: Candidate, state: State) -> Candidate:
        return self.method.finish(self._with_views(problem), candidate, state)

    def _with_views(self, problem: Problem) -> Problem:
        """One value for one problem: methods remember what they worked on."""
        if self._viewed.get("of") is not problem:
            inputs = problem.inputs()
            inputs = with_crops(inputs, self.crops) if self.crops else inputs
            if self.mixtures and can_be_mixed(problem.example):
                inputs = with_mixtures(inputs, self.mixtures)
            self._viewed.update(of=problem, viewed=replace(problem, calibration=inputs))
        viewed: Problem = self._viewed["viewed"]
        return viewed
