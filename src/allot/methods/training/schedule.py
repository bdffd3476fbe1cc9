"""When things change while weights are trained: masks, budget, learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass

from allot.budget.model_budget import ModelBudget
from allot.errors import check_number

FULL_RAMP = 250  # steps of a training, the default, from which on `ramp` holds as it is


@dataclass(frozen=True)
class Schedule:
    """When masks are selected again while weights train, and how many times the budget may be used on the way.

    In step t of T the budget is `Budget.widened(1 + (r - 1) (1 - t / (ramp_until T))^3)`, from ramp_until T on the
    budget itself, with

        r = min( ramp ^ min(1, sqrt(T / 250)),  Budget.widest )

    A short training has too few steps to come down from far, and the dense net is the widest. Masks change every
    `every` steps until step `freeze_at` T, the last one included.

    Args:
        every: steps, 1 or more.
        freeze_at: from 0 (masks are selected before the first step only) to 1, a fraction of the steps.
        ramp: how many times the budget may be used at first in a training of `FULL_RAMP` steps or more; 1 or more.
        ramp_until: fraction of the steps, from 0 to 1.
    Raises:
        UsageError: a value out of its range.
    """

    every: int = 5
    freeze_at: float = 0.8
    ramp: float = 1.0
    ramp_until: float = 0.6

    def __post_init__(self) -> None:
        check_number("every", self.every, 1, whole=True)
        check_number("ramp", self.ramp, 1)
        for name in ("freeze_at", "ramp_until"):
            check_number(name, getattr(self, name), 0, 1)

    def last(self, steps: int) -> int:
        """The step in which masks change for the last time."""
        return min(math.floor(self.freeze_at * steps), steps - 1)

    def due(self, t: int, steps: int) -> bool:
        """Whether masks are selected before step t."""
        return t == self.last(steps) or (t % self.every == 0 and t < self.last(steps))

    def fraction(self, t: int, steps: int, begin: float) -> float:
        """The fraction of a change that is made before step t, falling as a cosine; the fractions add up to 1.

        Args:
            begin: fraction of the steps after which the change begins; it ends with the last change of masks.
        """
        first, last = begin * steps, self.last(steps)
        updates = [k for k in range(max(math.ceil(first), 1), last + 1) if self.due(k, steps)]
        if t not in updates:
            return 0.0
        falling = {k: 1 + math.cos(math.pi * (k - first) / max(last - first, 1)) for k in updates}
        total = math.fsum(falling.values())
        return falling[t] / total if total > 1e-9 else 1 / len(updates)  # a single update at the very end weighs 0

    def budget(self, budget: ModelBudget, t: int, steps: int) -> ModelBudget:
        """The budget of step t; it changes where masks do."""
        return budget.widened(self.factor(t, steps, budget.widest))

    def factor(self, t: int, steps: int, widest: float = math.inf) -> float:
        """How many times the budget may be used in step t, where `widest` times it is the dense net.

        >>> [round(Schedule(ramp=8.0).factor(t, 250, 5.0), 2) for t in (0, 50, 100, 150)]
        [5.0, 2.19, 1.15, 1.0]
        >>> [round(Schedule(ramp=8.0).factor(0, steps), 1) for steps in (16, 40, 100, 250, 1000)]
        [1.7, 2.3, 3.7, 8.0, 8.0]
        """
        end = self.ramp_until * steps
        t = t - t % self.every if t < self.last(steps) else t
        if t >= min(end, self.last(steps)):
            return 1.0
        ramp = self.ramp ** min(1.0, math.sqrt(steps / FULL_RAMP))
        return 1 + (min(ramp, widest) - 1) * (1 - t / end) ** 3


def warm_cosine(t: int, steps: int, warm: int = 10) -> float:
    """Factor on a learning rate in step t of `steps`: linear over the first `warm` steps, cosine to zero.

    >>> [round(warm_cosine(t, 100), 2) for t in (0, 9, 50, 99)]
    [0.1, 0.98, 0.5, 0.0]
    """
    return min(1.0, (t + 1) / warm) * (1 + math.cos(math.pi * t / steps)) / 2
