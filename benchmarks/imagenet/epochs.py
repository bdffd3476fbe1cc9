"""Never run on ImageNet. A method that trains weights, scored after every epoch: what choosing one on test data gives.

`Epochs` is itself a method, so that `allot.prune` saves its scores with the state and goes on with them. It changes
nothing in what it holds but the pictures that it trains on, and the scores decide nothing: all epochs are run, and the
last step is what the run returns.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

from allot.errors import UsageError
from allot.methods.distill import Distill
from allot.methods.fcpts import Fcpts, FcptsPaper
from allot.methods.unipts import Unipts
from allot.run.evaluate import evaluate
from allot.run.problem import Candidate, Method, Metrics, Problem, finished
from allot.run.store import State

TRAINING = (Fcpts, FcptsPaper, Distill, Unipts)  # what trains all weights of a net on pictures


@dataclass(frozen=True)
class Epochs:
    """`inner`, and after every epoch the score of the net as it is then.

    As it is then: its masks, with the running statistics that training leaves behind. Of `fcpts-paper`, thresholds are
    shifted to meet the budget, as at the end of its run. An epoch of a net that is still wider than the budget allows
    is marked, and is no candidate for the best.

    Args:
        name: of `inner`.
        judge: data to score on, see `Judge`.
        source: what is trained on in place of the calibration pictures: the same ones, drawn anew.
        every: epochs from score to score; the last step is scored in any case.
    """

    inner: Method
    name: str
    judge: Judge
    source: Any = None
    every: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.inner, TRAINING):
            raise UsageError(f"{self.name} trains no weights epoch by epoch.")

    @property
    def __name__(self) -> str:
        return self.name

    @property
    def role(self) -> str:
        """That of `inner`."""
        return self.inner.role

    @property
    def needs_data(self) -> bool:
        """As `inner` does."""
        return self.inner.needs_data

    def init(self, problem: Problem, candidate: Candidate) -> State:
        """No epoch scored."""
        return self.inner.init(self._own(problem), candidate) | {"epochs": []}

    def step(self, problem: Problem, candidate: Candidate, state: State) -> Metrics:
        """A step of `inner`; at the end of an epoch, its score."""
        own = self._own(problem)
        metrics = self.inner.step(own, candidate, state)
        if "training" not in state:  # a step of its start
            return metrics
        step, batches = state["training"]["step"], own.inputs().batches
        if step % (batches * self.every) and not finished(state):
            return metrics
        started = time.monotonic()
        found = self.inner.finish(own, candidate, dict(state))
        kept = {layer.name: int(found.masks[layer.name].sum()) for layer in problem.scope}
        top1 = self.judge(own, found)
        state["epochs"].append(
            {
                "epoch": step / batches,
                "top1": top1,
                "kept": sum(kept.values()),
                "fits": bool(problem.scope.groups) or problem.budget.fits(kept),
                "seconds": time.monotonic() - started,
            }
        )
        logging.info("  epoch %g: top-1 %.2f %%", step / batches, 100 * top1)
        return metrics | {"top1": top1}

    def finish(self, problem: Problem, candidate: Candidate, state: State) -> Candidate:
        """What `inner` makes of it, and the scores among the diagnostics."""
        found = self.inner.finish(self._own(problem), candidate, state)
        return replace(found, diagnostics={**found.diagnostics, "epochs": state["epochs"]})

    def _own(self, problem: Problem) -> Problem:
        """The problem with the pictures to train on, the same one every time."""
        if self.source is None or problem.calibration is None:
            return problem
        if self._made.get("of") is not problem:
            calibration = replace(problem.calibration, source=self.source)
            self._made.update(of=problem, own=replace(problem, calibration=calibration))
        return self._made["own"]

    @cached_property
    def _made(self) -> dict[str, Any]:
        return {}


class Judge:
    """Top-1 on `data` of a candidate; called what it scores on, for the run's record."""

    def __init__(self, data: Any, workers: int = 0) -> None:
        self.__name__ = f"top-1 on {len(data)} pictures"
        self._evaluate: Callable[..., Any] = partial(evaluate, data=data, workers=workers)

    def __call__(self, problem: Problem, candidate: Candidate) -> float:
        return self._evaluate(problem.model, tensors=candidate.effective(problem)).score


def best(epochs: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The epoch of the highest score, the earlier of equals, among those whose net met the budget."""
    fitting = [epoch for epoch in epochs if epoch["fits"]]
    return max(fitting, key=lambda epoch: epoch["top1"]) if fitting else None
