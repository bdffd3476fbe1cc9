"""The driver saves often, and spends little on it."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from allot import Budget, Unstructured
from allot.pruning.setup import make_problem
from allot.run import driver
from allot.run.problem import Candidate


@dataclass(frozen=True)
class Counting:
    """Counts to 60, a second a step."""

    clock: list[float]

    role = "repair"
    needs_data = False

    def init(self, problem: Any, candidate: Any) -> dict[str, Any]:
        return {"step": 0, "steps": 60}

    def step(self, problem: Any, candidate: Any, state: Any) -> dict[str, Any]:
        self.clock[0] += 1.0
        state["step"] += 1
        return {"forward": 0, "backward": 0}

    def finish(self, problem: Any, candidate: Any, state: Any) -> Any:
        return candidate


class Slow:
    """A store that needs some time to save."""

    saved = None

    def __init__(self, seconds: float, clock: list[float]) -> None:
        self.seconds, self.clock, self.steps = seconds, clock, list[int]()

    def save(self, stage: str, candidate: Any, state: Any, log: Any, best: Any = None) -> None:
        self.steps.append(state["step"])
        self.clock[0] += self.seconds

    def write_step(self, *args: Any) -> None:
        pass


def test_a_state_that_is_slow_to_save_is_saved_less_often(monkeypatch: pytest.MonkeyPatch):
    clock = [0.0]
    monkeypatch.setattr(driver, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    model = nn.Linear(4, 4)
    problem = make_problem(model, Budget(sparsity=0.5), Unstructured(), example=torch.zeros(1, 4))
    slow, fast = Slow(1.0, clock), Slow(0.0, clock)
    for store in (slow, fast):
        driver.drive(Counting(clock), problem, Candidate.dense(problem), store=store)  # type: ignore[arg-type]
    assert fast.steps == list(range(0, 61, 6))  # more than 5 s after the last one
    assert slow.steps == [0, 5, 36]  # then 30 times the second that saving takes
