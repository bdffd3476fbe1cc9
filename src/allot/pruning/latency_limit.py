"""Counts of channels held to a limit of time as measured: tables say how to share it out, whole nets whether it is met.

A net's time is taken beside the dense net's, in turn in one process, and given in units of what the dense net took
when the tables were made: a machine that is busier now slows both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from allot.budget.allocation import Allocation
from allot.budget.channels import channel_budget
from allot.errors import BudgetError
from allot.export.files.latency_tables import tables_of
from allot.export.timing.latency import Runtime, time_both
from allot.network.channels import ChannelPlan, slimmed
from allot.run.driver import repeatable
from allot.run.problem import Candidate, Metrics, Problem, finished
from allot.run.store import State


@dataclass(frozen=True)
class Held:
    """The method behind an allocation under a limit of time: time the net, and share out anew where tables were wrong.

    The tables are taken to be as slow as the net was, and the same wishes make new counts: fewer channels where it was
    too slow, more where it had time left. The slowest net within the limit is kept.

    Args:
        attempts: nets that are timed, at most.
        near: a net that uses up the limit but for this share is good enough; halfway there is what is aimed for.
    """

    attempts: int = 6
    near: float = 0.05

    role = "allocate"
    needs_data = False

    def init(self, problem: Problem, candidate: Candidate) -> State:
        """The counts as they were allocated."""
        return {"step": 0, "steps": self.attempts, "kept": candidate.allocation.kept, "best": {}}

    def step(self, problem: Problem, candidate: Candidate, state: State) -> Metrics:
        """Time one net, and make the counts of the next one.

        Raises:
            BudgetError: the last one, too, is too slow.
        """
        budget, kept, best = channel_budget(problem.budget), state["kept"], state["best"]
        ceiling = _ceiling(problem)
        plan = ChannelPlan.of(problem.model, problem.scope.groups, {name: range(k) for name, k in kept.items()})
        taken = measured(problem, plan)
        found = taken["sparse"]
        if found <= ceiling:  # what only one of two measurements allows would be over the limit at the end
            found = max(found, measured(problem, plan)["sparse"])
        slow = (found - 0.5) / budget.slowed(1.0).time(kept)[0]  # tables this slow say what was measured
        state["step"] += 1
        if found <= ceiling and found > best.get("time", 0):
            state["best"] = best = {"time": found, "kept": kept, "slow": slow}
        state["kept"] = budget.slowed(slow / (1 - self.near / 2)).counts(dict(candidate.allocation))
        if (1 - self.near) * ceiling <= found <= ceiling or state["kept"] == kept:
            state["steps"] = state["step"]
        if finished(state) and not best:
            raise BudgetError(
                f"latency={budget.asked['latency']}: nets timed: {state['step']}; the last one took {found:,} ns, "
                f"{ceiling:,} are allowed. Allow more, or ask for channels in multiples (--pattern channels:8)."
            )
        return {"forward": 0, "backward": 0, **taken, "sparse": found}

    def finish(self, problem: Problem, candidate: Candidate, state: State) -> Candidate:
        """The candidate with the counts of the best net; how slow it was goes to the diagnostics, for `paced`."""
        best = state["best"]
        return replace(
            candidate,
            allocation=Allocation.of(best["kept"], candidate.allocation.total),
            diagnostics={**candidate.diagnostics, "latency": {"slow": best["slow"], "timed": state["step"]}},
        )


def paced(problem: Problem, diagnostics: Mapping[str, Any]) -> Problem:
    """The problem with tables as slow as a net was measured to be, where that was done."""
    if "latency" not in diagnostics:
        return problem
    return replace(problem, budget=channel_budget(problem.budget).slowed(diagnostics["latency"]["slow"]))


def measured(problem: Problem, plan: ChannelPlan) -> dict[str, int]:
    """`{dense, sparse}`: nanoseconds a batch, in units of the dense net's when the tables were made."""
    tables = tables_of(problem)
    dense = problem.model
    pair = time_both(dense, slimmed(dense, plan), problem.example, Runtime.parse(tables.runtime))
    return {"dense": tables.dense, "sparse": round(pair[1] / pair[0] * tables.dense)}


def told(problem: Problem, candidate: Candidate) -> dict[str, Any]:
    """What a report says of time: milliseconds of the dense net, allowed, foretold by the tables, and measured.

    Raises:
        BudgetError: in none of five measurements the limit holds.
    """
    tables, kept = tables_of(problem), candidate.allocation.kept
    plan = ChannelPlan.of(problem.model, problem.scope.groups, candidate.channels)
    budget, ceiling = channel_budget(problem.budget), _ceiling(problem)
    for _ in range(5):  # the net was within the limit before: mostly, something else ran meanwhile
        with repeatable(problem.model, problem.seed, "measured"):
            taken = measured(problem, plan)
        if taken["sparse"] <= ceiling:
            break
    else:
        raise BudgetError(
            f"latency={budget.asked['latency']}: at the end the net took {taken['sparse']:,} ns in the last of five "
            f"measurements, {ceiling:,} are allowed. Of a run that is saved, the same command measures again."
        )
    return {
        "runtime": tables.runtime,
        "batch": tables.batch,
        "dense_ms": tables.dense / 1e6,
        "limit_ms": ceiling / 1e6,
        "predicted_ms": budget.cost("latency", kept) / 1e6,
        "sparse_ms": taken["sparse"] / 1e6,
    }


def _ceiling(problem: Problem) -> int:
    return next(limit.ceiling for limit in channel_budget(problem.budget).limits if limit.kind == "latency")
